"""Sets of images through `draw`: what is written, the same bytes after any kill, and what is refused."""
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import assert_all_good, on_cpu, run_processes
from sampling_models import save_latent_model, save_model, save_vae

from lit_jax.report.grids import to_pil, to_uint8
from lit_jax.runtime.errors import UserError
from lit_jax.sampling import draw as drawing
from lit_jax.sampling import model_pipeline as pipeline
from lit_jax.sampling.draw import draw
from lit_jax.sampling.pipelines import open_pipeline
from lit_jax.sampling.request import SampleRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp('models') / 'model'))


@pytest.fixture(scope='module')
def latent_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('latent_models')
    return str(save_latent_model(folder / 'model')), str(save_vae(folder / 'vae'))


@pytest.fixture
def request_of(model, tmp_path):
    return SampleRequest(out=str(tmp_path / 'set.npz'), source=model, count=300, steps=3, cfg_scale=2.0)


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def test_where_nothing_can_be_written_nothing_is_drawn(request_of, tmp_path, monkeypatch, read_only):
    monkeypatch.setattr(drawing.Plan, 'draw_groups', pytest.fail)
    with pytest.raises(UserError, match='cannot be written: its disk is mounted read-only'):
        draw(replace(request_of, out=str(tmp_path / 'grid.png'), count=None))
    assert list(tmp_path.iterdir()) == []


def test_a_set_holds_rgb_bytes_labels_and_its_recipe(request_of, tmp_path):
    line = draw(request_of)
    arrays = read(tmp_path / 'set.npz')
    assert '300 images now' in line and sorted(arrays) == ['arr_0', 'arr_1']
    assert arrays['arr_0'].shape == (300, 8, 8, 3) and arrays['arr_0'].dtype == np.uint8
    assert (arrays['arr_0'] == arrays['arr_0'][..., :1]).all() and 20 < arrays['arr_0'].std() < 120
    assert arrays['arr_1'].shape == (300,) and set(arrays['arr_1']) == set(range(10))
    assert sorted(os.listdir(tmp_path)) == ['set.json', 'set.npz']
    card = json.loads((tmp_path / 'set.json').read_text())
    assert card['sampler'] == {'method': 'ddpm', 'steps': 3, 'eta': 0.0, 'cfg_scale': 2.0, 'cfg_channels': 3,
                               'cfg_interval': [0.0, 1.0]}
    assert card['pictures']['count'] == 300 and card['pictures']['labels'] == 'random' and card['pictures'][
        'seed'] == 0
    assert card['vae'] is None and len(card['model']['sha256']) == 64 and card['computed']['jax']
    assert {info.date_time for info in zipfile.ZipFile(tmp_path / 'set.npz').infolist()} == {
        (1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize('batch_size', [7, 64])
def test_the_batch_does_not_change_a_byte(request_of, tmp_path, batch_size):
    draw(request_of)
    draw(replace(request_of, out=str(tmp_path / 'other.npz'), batch_size=batch_size))
    assert (tmp_path / 'other.npz').read_bytes() == (tmp_path / 'set.npz').read_bytes()


def test_a_larger_set_begins_with_the_smaller_one(request_of, tmp_path):
    draw(request_of)
    draw(replace(request_of, out=str(tmp_path / 'large.npz'), count=330))
    small, large = read(tmp_path / 'set.npz'), read(tmp_path / 'large.npz')
    for name in small:
        np.testing.assert_array_equal(large[name][:300], small[name])


def test_a_whole_set_is_not_drawn_again_and_another_is_not_overwritten(request_of, tmp_path, monkeypatch):
    draw(request_of)
    written = (tmp_path / 'set.npz').stat().st_mtime_ns
    monkeypatch.setattr(pipeline, 'GroupSampler', None)      # nothing may be drawn
    assert 'whole already' in draw(request_of)
    for change, message in (({'seed': 1}, 'pictures.seed: 0 there, 1 now'),
                            ({'steps': 4}, 'sampler.steps: 3 there, 4 now'),
                            ({'cfg_interval': (0.2, 0.8)}, 'sampler.cfg_interval'),
                            ({'group': 8}, 'computed.group')):
        with pytest.raises(UserError, match=f'belongs to another recipe(.|\n)*{message}'):
            draw(replace(request_of, **change))
    assert (tmp_path / 'set.npz').stat().st_mtime_ns == written
    (tmp_path / 'set.json').unlink()
    with pytest.raises(UserError, match='set.npz exists, and no recipe card'):
        draw(request_of)


def stop_after(monkeypatch, parts):
    """Makes the run end, as by a kill, when it wants to write one part more."""
    from lit_jax.sampling.stores import NpzStore
    write, written = NpzStore.write, []

    def stopping(self, part, images):
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, images)

    monkeypatch.setattr(NpzStore, 'write', stopping)
    return written


def test_a_stopped_run_goes_on_with_what_is_missing(request_of, tmp_path, monkeypatch, caplog):
    draw(replace(request_of, out=str(tmp_path / 'straight.npz')))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        draw(request_of)
    parts = tmp_path / 'set.npz.parts'
    assert sorted(os.listdir(parts)) == ['000000000-000000128.npy',
                                         'card.json'] and not (tmp_path / 'set.npz').exists()
    with pytest.raises(UserError, match='set.npz.parts belongs to another recipe(.|\n)*pictures.seed'):
        draw(replace(request_of, seed=1))
    with monkeypatch.context() as patch:
        written = stop_after(patch, 99)
        draw(request_of)
    assert written == [1, 2] and not parts.exists()
    assert (tmp_path / 'set.npz').read_bytes() == (tmp_path / 'straight.npz').read_bytes()


def test_a_part_that_was_cut_off_is_drawn_again(request_of, tmp_path, monkeypatch, caplog):
    draw(replace(request_of, out=str(tmp_path / 'straight.npz')))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        draw(request_of)
    part = tmp_path / 'set.npz.parts' / '000000000-000000128.npy'
    part.write_bytes(part.read_bytes()[:-1])
    draw(request_of)
    assert '000000000-000000128.npy incomplete or damaged, will be made again' in caplog.text
    assert (tmp_path / 'set.npz').read_bytes() == (tmp_path / 'straight.npz').read_bytes()


def test_a_damaged_set_and_foreign_files_in_the_way_are_named(request_of, tmp_path):
    (tmp_path / 'set.json').write_text('{"mine": 1}')
    with pytest.raises(UserError, match='set.json is in the way'):
        draw(request_of)
    (tmp_path / 'set.json').unlink()
    draw(request_of)
    (tmp_path / 'set.npz').write_bytes((tmp_path / 'set.npz').read_bytes()[:1000])
    with pytest.raises(UserError, match='damaged'):
        draw(request_of)


def test_a_full_disk_is_said_before_the_start(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: type('Usage', (), {'free': 50_000})())
    with pytest.raises(UserError, match='needs about 115.2 kB, and 50.0 kB are free'):
        draw(request_of)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------
# Files, latents


def test_single_files_are_the_images_of_the_set(request_of, tmp_path):
    balanced = replace(request_of, count=None, per_class=4, classes='3,7')
    draw(balanced)
    folder = replace(balanced, out=str(tmp_path / 'files'))
    assert '8 PNG files' in draw(folder)
    arrays = read(tmp_path / 'set.npz')
    np.testing.assert_array_equal(arrays['arr_1'], [3, 7] * 4)
    for i, (image, label) in enumerate(zip(arrays['arr_0'], arrays['arr_1'], strict=True)):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / 'files' / f'{i:06d}_class{label:04d}.png')), image[..., 0])
    (tmp_path / 'files' / '000003_class0007.png').unlink()
    draw(folder)
    assert len(os.listdir(tmp_path / 'files')) == 9
    assert 'whole already' in draw(folder)
    with pytest.raises(UserError, match='belongs to another recipe'):
        draw(replace(folder, seed=1))


def test_a_folder_with_something_else_is_left_alone(request_of, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter.txt').write_text('dear')
    with pytest.raises(UserError, match='mine is not empty'):
        draw(replace(request_of, out=str(tmp_path / 'mine')))
    assert os.listdir(tmp_path / 'mine') == ['letter.txt']


def test_latents_are_decoded_with_their_vae(request_of, tmp_path, latent_model):
    source, vae = latent_model
    wanted = replace(request_of, source=source, vae=vae, count=5)
    draw(wanted)
    arrays = read(tmp_path / 'set.npz')
    assert arrays['arr_0'].shape == (5, 16, 16, 3) and 5 < arrays['arr_0'].std()
    card = json.loads((tmp_path / 'set.json').read_text())
    assert card['vae']['id'] == 'tiny vae' and len(card['vae']['sha256']) == 64
    with pytest.raises(UserError, match=r"need the VAE that decodes them: --vae DIR \(id 'tiny vae'"):
        draw(replace(wanted, vae=None, out=str(tmp_path / 'other.npz')))


@pytest.mark.parametrize('change, message', [
    ({'id': 'stranger'}, "vae: 'stranger' in .*, 'tiny vae' in "),
    ({'scale': 0.5}, 'scale: 0.5 in .*, 300.0 in ')])
def test_another_vae_is_refused_with_both_values(request_of, tmp_path, latent_model, change, message):
    with pytest.raises(UserError, match=message):
        draw(replace(request_of, source=latent_model[0], vae=str(save_vae(tmp_path / 'vae', **change))))
    assert not (tmp_path / 'set.npz.parts').exists()


def test_the_two_decoders_of_one_encoder_are_exchangeable(request_of, tmp_path):
    source = save_latent_model(tmp_path / 'model', vae='stabilityai/sd-vae-ft-ema')
    vae = save_vae(tmp_path / 'vae', id='stabilityai/sd-vae-ft-mse')
    draw(replace(request_of, source=str(source), vae=str(vae), count=2))
    assert json.loads((tmp_path / 'set.json').read_text())['vae']['id'] == 'stabilityai/sd-vae-ft-mse'


def test_images_from_python_are_those_of_the_command(request_of, tmp_path, latent_model):
    source, vae = latent_model
    wanted = replace(request_of, source=source, vae=vae, count=None, per_class=2, classes='3,7')
    draw(wanted)
    images = open_pipeline(source, vae).sample(classes=[3, 7] * 2, steps=3, cfg_scale=2.0)
    np.testing.assert_array_equal(images, read(tmp_path / 'set.npz')['arr_0'])
    assert to_pil(images[0]).size == (16, 16)
    for options, message in (({'prompts': ['a cat']}, 'draws classes: give classes'),
                             ({'classes': [10]}, 'out of range'),
                             ({'classes': [1], 'eta': 0.5}, 'belongs to ddim')):
        with pytest.raises(UserError, match=message):
            open_pipeline(source, vae).sample(**options)


@pytest.mark.parametrize('change, message', [
    ({'count': None}, 'neither'), ({'per_class': 3}, 'both'),
    ({'labels': 'balanced', 'count': 301}, 'take --count 300'),
    ({'classes': '10'}, 'class 10 is out of range'), ({'vae': 'models/vae'}, 'nothing to decode'),
    ({'seed': -1}, 'seed must be'), ({'seed': 1 << 32}, 'seed must be'), ({'group': 0}, '--group must be'),
    ({'method': 'euler'}, 'take ddpm'), ({'cfg_interval': (0.5, 0.1)}, 'guidance interval'),
    ({'eta': 0.5}, 'belongs to ddim'), ({'source': None}, 'one of --from'),
    ({'compare': ('a', 'b')}, 'one of --from'),
    ({'source': None, 'compare': ('a', 'b')}, 'must end with .png'),
    ({'out': 'set.jpg'}, r'\.jpg is not known'), ({'cfg_scale': float('nan')}, 'guidance scale')])
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(request_of, tmp_path, change,
                                                                            message):
    with pytest.raises(UserError, match=message):
        draw(replace(request_of, **change))
    assert os.listdir(tmp_path) == []


def test_models_that_take_different_noise_are_not_compared(model, tmp_path):
    other = save_model(tmp_path / 'other', input_size=(4, 4),
                       latent={'space': 'pixels', 'vae': None, 'scale': 3.0})
    with pytest.raises(UserError, match=r'latent.scale: 300.0 in .*, 3.0 in .*') as raised:
        draw(SampleRequest(out=str(tmp_path / 'pair.png'), compare=(model, str(other))))
    assert 'input_size: [8, 8] in ' in str(raised.value) and not (tmp_path / 'pair.png').exists()


def test_images_that_are_not_numbers_stop_the_run(request_of, tmp_path, monkeypatch):
    def poisoned(images):
        return to_uint8(np.where(np.arange(len(images))[:, None, None, None] == 3, np.nan, images))

    monkeypatch.setattr(drawing, 'to_uint8', poisoned)
    with pytest.raises(UserError, match='contain NaN'):
        draw(request_of)
    assert not (tmp_path / 'set.npz').exists()


# ------------------------------------------------------------------------------------------------------
# Kills and processes


def command(request, *extra):
    return ['sample.py', '--from', request.source, '--out', request.out, '--count', str(request.count),
            '--steps', str(request.steps), '--cfg_scale', str(request.cfg_scale), *map(str, extra)]


def start(request, *extra, devices=1):
    return subprocess.Popen([sys.executable, *command(request, *extra)], cwd=ROOT, env=on_cpu(devices),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(request, parts, delay=0.0, **options):
    """Starts sample.py and kills it when so many parts lie there; returns how many were left behind."""
    process, folder = start(request, **options), Path(request.out + '.parts')
    deadline = time.monotonic() + 100
    while len(list(folder.glob('*.npy'))) < parts and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode, len(list(folder.glob('*.npy')))


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(request_of, tmp_path):
    """The reference is drawn here, on eight devices; the killed one by a process of one device."""
    wanted = replace(request_of, count=1280, steps=10)
    draw(replace(wanted, out=str(tmp_path / 'straight.npz')))
    status, parts = kill_when(wanted, 2)
    assert status == -signal.SIGKILL and 2 <= parts < 10
    process = start(wanted)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and 'already done' in output, output
    assert (tmp_path / 'set.npz').read_bytes() == (tmp_path / 'straight.npz').read_bytes()
    assert sorted(os.listdir(tmp_path)) == ['set.json', 'set.npz', 'straight.json', 'straight.npz']


@pytest.mark.slow
def test_two_thousand_images_killed_at_random_on_changing_devices(request_of, tmp_path):
    """1 and 8 devices, batches of 7 and 64, five kills: one file."""
    wanted, dice = replace(request_of, count=2000, steps=20), random.Random(0)
    for name, devices, batch in (('one', 1, 7), ('eight', 8, 64)):
        process = start(replace(wanted, out=str(tmp_path / f'{name}.npz')), '--batch_size', batch,
                        devices=devices)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for k in range(5):
        kill_when(wanted, 2 * k + 1, dice.uniform(0, 0.3), devices=dice.choice([1, 2, 8]))
    process = start(wanted)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    files = {(tmp_path / f'{name}.npz').read_bytes() for name in ('one', 'eight', 'set')}
    assert len(files) == 1 and read(tmp_path / 'set.npz')['arr_0'].shape == (2000, 8, 8, 3)


@pytest.mark.slow
def test_two_processes_draw_one_set(request_of, tmp_path):
    draw(replace(request_of, out=str(tmp_path / 'straight.npz')))
    join = ['--coordinator={coordinator}', '--num_processes={num_processes}', '--process_id={process_id}']
    results = run_processes(command(request_of, *join), 2, devices_each=2, timeout=150)
    assert_all_good(results)
    assert 'wrote' in results[0][1] and 'wrote' not in results[1][1]
    assert (tmp_path / 'set.npz').read_bytes() == (tmp_path / 'straight.npz').read_bytes()
    different = run_processes(command(request_of, '--seed={process_id}', *join), 2, timeout=150)
    for status, output in different:
        assert status == 1 and 'recipe card.pictures.seed: 0 on process 0' in output, output
