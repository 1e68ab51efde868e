"""Making cached latents: what is written, going on after any interruption, and what is refused."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from buckets import Store, bucket  # noqa: F401
from image_files import encoded, noise, write_folder
from latent_sets import killed_in, write_tiny_vae
from processes import assert_all_good, on_cpu, run_processes

from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.data import latent_shards
from lit_jax.data.latents import open_latents
from lit_jax.data.sources import open_source
from lit_jax.latents import prepare as preparation
from lit_jax.latents.prepare import prepare_latents
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import files_under

ROOT = Path(__file__).parents[2]
BAD = ('a/4.png', 'b/0.png')  # examples 5 and 11 of 22, as a/10.png comes before a/2.png

# The eight devices of the tests hold more than a shard of five, one device holds less.
STANDARD = {'batch_size': 4, 'shard_size': 5, 'threads': 2}


@pytest.fixture(scope='module')
def vae(tmp_path_factory):
    return write_tiny_vae(tmp_path_factory.mktemp('vae') / 'tiny')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    files = {f'{name}/{i}.png': None for name in 'ab' for i in range(11)}
    files |= {'a/2.png': encoded(noise(31, 13)), BAD[0]: b'', BAD[1]: encoded(noise(12, 10))[:60]}
    return write_folder(tmp_path_factory.mktemp('pictures'), **files)


@pytest.fixture
def request_for(vae, images):
    """request_for(out, ...): 22 images of 8 pixels."""
    def make(out, **options):
        where = {'data': 'folder', 'path': str(images), 'vae': str(vae), 'image_size': 8}
        return PrepareOptions(**{**where, **STANDARD, **options}, out=str(out))
    return make


@pytest.fixture(scope='module')
def whole(tmp_path_factory, vae, images):
    """A data set that was made without interruption."""
    out = tmp_path_factory.mktemp('whole') / 'latents'
    prepare_latents(PrepareOptions(data='folder', path=str(images), vae=str(vae), image_size=8, out=str(out),
                            **STANDARD))
    return out


def contents(folder) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in files_under(folder)}


def test_the_moments_are_those_of_the_vae(whole, vae, images):
    source = open_latents(whole)
    opened = open_source('folder', path=images, image_size=8)
    good = [i for i, name in enumerate(opened.files) if name not in BAD]
    assert len(source) == len(good) == 20
    batch = source.take(range(20))
    assert batch['label'].tolist() == [int(opened.labels[i]) for i in good]
    loaded = load_vae(vae)
    image = np.stack([opened.load(i)['image'] for i in good])
    for view, seen in enumerate((image, image[:, :, ::-1])):
        mean, logvar = loaded.encode(seen)
        np.testing.assert_allclose(batch['moments'][:, view, ..., :3], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(batch['moments'][:, view, ..., 3:], logvar, rtol=1e-4, atol=1e-5)
    assert not np.allclose(batch['moments'][:, 0], batch['moments'][:, 1], atol=1e-3)


def test_the_metadata_say_what_it_is(whole, vae, images):
    metadata, source = json.loads((whole / 'metadata.json').read_text()), open_latents(whole)
    loaded = load_vae(vae)
    assert metadata['vae'] == {'id': 'tiny-0', 'sha256': loaded.sha256, 'scale': 4.0, 'shift': 0.0,
                               'downscale': 2, 'channels': 3, 'dtype': 'float32'}
    assert (metadata['image_size'], metadata['latent_size'], metadata['crop']) == (8, 4, 'adm-center-crop')
    assert (metadata['classes'], metadata['count'], metadata['bad']) == (['a', 'b'], 20, 2)
    identity = open_source('folder', path=images, image_size=8).content()
    assert metadata['source'] == {**identity, 'split': 'train'} and identity['count'] == 22
    assert [shard['count'] for shard in metadata['shards']] == [5, 4, 4, 5, 2]
    mean = source.take(range(20))['moments'][..., :3].astype(np.float64)
    np.testing.assert_allclose(metadata['stats']['mean'], mean.mean((0, 1, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(metadata['stats']['std'], mean.std((0, 1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(metadata['stats']['scaled_std'], 4 * mean.std(), rtol=1e-6)
    lines = (whole / 'bad_pictures.txt').read_text().splitlines()
    assert [line.split('\t')[0] for line in lines] == [str(images / name) for name in BAD]
    assert 'it is empty (0 bytes)' in lines[0]


def test_half_precision(whole, request_for, tmp_path):
    prepare_latents(request_for(tmp_path / 'half', dtype='float16', split='train'))
    half, single = open_latents(tmp_path / 'half').take(range(20)), open_latents(whole).take(range(20))
    np.testing.assert_array_equal(half['moments'], single['moments'].astype(np.float16))


def test_other_sources_than_images(vae, tmp_path):
    request = PrepareOptions(data='synthetic', vae=str(vae), image_size=8, num_classes=3, batch_size=2,
                      shard_size=10_000, out=str(tmp_path / 'latents'))
    source = open_source('synthetic', image_size=8, channels=3, num_classes=3)
    plan = preparation.make_plan(request, preparation.read_vae_config(vae), source)
    assert plan['crop'] == 'none' and plan['source'] == {'name': 'synthetic', 'split': 'train',
                                                         'count': 10_000, 'classes': 3}


# ------------------------------------------------------------------------------------------------------
# Interruptions


STEPS = {'begin': (preparation, 'write_text_atomic', 0), 'first shard': (latent_shards, 'count_records', 0),
         'a shard without its note': (latent_shards, 'write_text_atomic', 2),
         'later shard': (os, 'replace', 5), 'checking': (latent_shards, 'find_shard_damage', 3),
         'metadata': (preparation, 'write_text_atomic', 2)}


@pytest.mark.parametrize('step', STEPS)
def test_stopped_at_any_step_it_goes_on_to_the_same_bytes(step, whole, request_for, tmp_path, monkeypatch):
    out, (module, name, count) = tmp_path / 'latents', STEPS[step]
    with killed_in(monkeypatch, module, name, count):
        prepare_latents(request_for(out))
    assert not (out / 'metadata.json').exists()
    if (out / 'shards').exists():
        (out / 'shards' / '.00001.array_record.1.partial').write_bytes(b'left by a run that was killed')
    made = {name: (out / name).stat().st_mtime_ns for name in files_under(out)
            if name.endswith('.array_record')}
    prepare_latents(request_for(out))
    assert contents(out) == contents(whole)
    again = [name for name, time in made.items() if (out / name).stat().st_mtime_ns != time]
    assert len(again) == (step == 'a shard without its note')  # all others were kept


def test_the_same_command_checks_a_whole_set_and_changes_nothing(whole, request_for, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / 'latents')
    monkeypatch.setattr(preparation, 'load_vae', None)  # not even the VAE is read
    said = prepare_latents(request_for(out))
    assert '20 images, each with its mirror image' in said and 'all shards checked' in said
    assert 'left out: 2 images' in said
    assert contents(out) == contents(whole)


def test_a_damaged_shard_is_found_and_made_again(whole, request_for, tmp_path):
    out = shutil.copytree(whole, tmp_path / 'latents')
    path = out / 'shards' / '00002.array_record'
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError,
                       match=r'1 shards of .* are damaged:\n  shards/00002.array_record: its sha256'):
        prepare_latents(request_for(out))
    with pytest.raises(UserError, match='not finished'):
        open_latents(out)
    prepare_latents(request_for(out))
    assert contents(out) == contents(whole)


def test_a_missing_shard_is_made_again(whole, request_for, tmp_path):
    out = shutil.copytree(whole, tmp_path / 'latents')
    (out / 'shards' / '00000.array_record').unlink()
    prepare_latents(request_for(out))
    assert contents(out) == contents(whole)


def test_into_a_bucket_goes_the_same(whole, request_for, bucket):  # noqa: F811
    prepare_latents(request_for(f'{bucket}/latents'))
    root = f'{bucket}/latents/'.removeprefix('gs://')
    assert {name.removeprefix(root): data for name, data in Store.objects.items()} == contents(whole)


# ------------------------------------------------------------------------------------------------------
# Refused


def test_strict_stops_at_a_bad_image(request_for, images, tmp_path):
    with pytest.raises(UserError, match='a/4.png cannot be decoded: it is empty'):
        prepare_latents(request_for(tmp_path / 'latents', strict=True))
    with pytest.raises(UserError, match='not finished.*--strict'):
        open_latents(tmp_path / 'latents')


def test_nothing_but_bad_images(request_for, tmp_path):
    folder = write_folder(tmp_path / 'bad', **{'a.png': b'', 'b.png': b'no'})
    with pytest.raises(UserError, match='none of the images can be decoded'):
        prepare_latents(request_for(tmp_path / 'latents', path=str(folder)))


def test_a_folder_of_other_latents_is_refused(whole, request_for, tmp_path):
    other = write_tiny_vae(tmp_path / 'other', seed=1, scale=2.0)
    before = contents(whole)
    with pytest.raises(UserError, match='has other latents') as caught:
        prepare_latents(request_for(whole, vae=str(other), image_size=16, dtype='float16', shard_size=3))
    for line in ("vae.id: 'tiny-0' there, 'tiny-1' now", 'vae.scale: 4.0 there, 2.0 now',
                 'image_size: 8 there, 16 now', "dtype: 'float32' there, 'float16' now",
                 'shard_size: 5 there, 3 now', 'vae.sha256: '):
        assert line in str(caught.value), line
    assert contents(whole) == before


def test_other_images_of_the_same_names_are_another_data_set(whole, request_for, images, tmp_path):
    latents, others = (shutil.copytree(path, tmp_path / path.name) for path in (whole, images))
    (others / 'a' / '0.png').write_bytes(encoded(noise(12, 10, seed=99)))
    with pytest.raises(UserError, match='has other latents:\n  source.some_bytes: '):
        prepare_latents(request_for(latents, path=str(others)))
    claim = json.loads((latents / 'preparation.json').read_text())
    del claim['checksum'], claim['plan']['source']['some_bytes']         # as an earlier version began it
    (latents / 'preparation.json').write_text(json.dumps(claim))
    assert 'all shards checked' in prepare_latents(request_for(latents))


def test_a_folder_of_something_else_is_refused(request_for, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='is not empty .notes.txt. and was not begun'):
        prepare_latents(request_for(tmp_path))
    with pytest.raises(UserError, match='is a file'):
        prepare_latents(request_for(tmp_path / 'notes.txt'))
    assert files_under(tmp_path) == {'notes.txt': 4}


@pytest.mark.parametrize('options, message', [
    ({'image_size': 9}, '--image_size=9: this VAE needs a multiple of 2'),
    ({'dtype': 'int8'}, 'unknown --dtype=int8; known: float32, float16'),
    ({'vae_dtype': 'int8'}, 'unknown --vae_dtype=int8'),
    ({'batch_size': 0}, '--batch_size must be at least 1, got 0'),
    ({'data': 'latents'}, 'are latents already'),
    ({'vae': 'no/such/vae'}, 'not a VAE folder'),
    ({'path': 'no/such/folder'}, 'does not exist')])
def test_wrong_options_are_refused_before_anything_is_written(options, message, request_for, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare_latents(request_for(tmp_path / 'latents', **options))
    assert not (tmp_path / 'latents').exists()


def test_the_space_is_checked_before_the_start(request_for, tmp_path, monkeypatch):
    """22 records of 772 bytes and five files; nothing is encoded."""
    monkeypatch.setattr(shutil, 'disk_usage',
                        lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 500_000, 500_000))
    monkeypatch.setattr(preparation, 'load_vae', None)
    with pytest.raises(UserError,
                       match=r'needs about 672.5 kB, and 500.0 kB are free .*checked before writing'):
        prepare_latents(request_for(tmp_path / 'latents'))
    assert not files_under(tmp_path / 'latents' / 'shards')


def test_the_space_that_is_checked_is_about_what_is_taken(request_for, vae, tmp_path, monkeypatch, caplog):
    needed = []
    monkeypatch.setattr(preparation.storage, 'check_free_space', lambda path, size: needed.append(size))
    write_folder(tmp_path / 'many', **{f'{i}.png': None for i in range(60)})
    prepare_latents(request_for(tmp_path / 'latents', path=str(tmp_path / 'many'), image_size=64,
                                shard_size=30))
    taken = sum(files_under(tmp_path / 'latents' / 'shards').values())
    assert 0.95 * taken < needed[0] < 1.1 * taken


def test_a_disk_that_fills_up_is_named(request_for, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            Path(path).write_bytes(b'a part')

        def write(self, record):
            pass

        def is_open(self):
            return False

        def close(self):
            raise RuntimeError('write() failed: No space left on device; writing x; at byte 65536')

    monkeypatch.setattr(latent_shards, 'ArrayRecordWriter', Full)
    with pytest.raises(UserError, match='no room to write .*No space left'):
        prepare_latents(request_for(tmp_path / 'latents'))
    assert not files_under(tmp_path / 'latents' / 'shards')


def test_a_scale_that_does_not_fit_is_said(whole, request_for, tmp_path, caplog):
    caplog.set_level('WARNING', 'lit_jax')
    spread = json.loads((whole / 'metadata.json').read_text())['stats']['scaled_std'] / 4
    right, wrong = (write_tiny_vae(tmp_path / name, scale=scale)
                    for name, scale in (('right', 1 / spread), ('wrong', 3 / spread)))
    prepare_latents(request_for(tmp_path / 'one', vae=str(right)))
    assert 'standard deviation' not in caplog.text
    prepare_latents(request_for(tmp_path / 'two', vae=str(wrong)))
    assert 'have a standard deviation of 3;' in caplog.text


@pytest.mark.parametrize('factor, dtype', [(np.nan, 'float32'), (1e6, 'float16')])
def test_values_that_cannot_be_kept_are_refused(factor, dtype, request_for, vae, tmp_path, monkeypatch):
    loaded = load_vae(vae)
    params = {**loaded.params, 'quant_conv': jax.tree.map(lambda leaf: leaf * factor,
                                                          loaded.params['quant_conv'])}
    monkeypatch.setattr(preparation, 'load_vae',
                        lambda *_: type(loaded)(loaded.network, params, loaded.config))
    with pytest.raises(UserError, match='the VAE encodes example 0 to NaN, or to more than'):
        prepare_latents(request_for(tmp_path / 'latents', dtype=dtype))
    assert not files_under(tmp_path / 'latents' / 'shards')


# ------------------------------------------------------------------------------------------------------
# The script


def command(request: PrepareOptions) -> list[str]:
    return ['prepare_latents.py', *request.command().split()[2:], f'--out={request.out}']


def test_the_script_makes_the_same_bytes_on_one_device(whole, request_for, tmp_path):
    """`whole` comes from eight devices: what an image becomes does not depend on how many there are."""
    out = tmp_path / 'latents'
    done = subprocess.run([sys.executable, *command(request_for(out))], cwd=ROOT, env=on_cpu(),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '22 of 22 images (100 %)' in done.stderr and 'all shards checked' in done.stdout
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(whole, request_for, tmp_path):
    out = tmp_path / 'latents'
    several = ['--coordinator={coordinator}', '--num_processes={num_processes}', '--process_id={process_id}']
    results = run_processes([*command(request_for(out)), *several], 2, devices_each=2)
    assert_all_good(results)
    assert contents(out) == contents(whole)
    assert 'all shards checked' in results[0][1] and 'all shards checked' not in results[1][1]


@pytest.mark.slow
def test_two_processes_fail_together(request_for, tmp_path):
    several = ['--coordinator={coordinator}', '--num_processes={num_processes}', '--process_id={process_id}']
    results = run_processes([*command(request_for(tmp_path / 'latents', strict=True)), *several], 2)
    assert [status for status, _ in results] == [1, 1]
    for _, output in results:
        assert 'cannot be decoded' in output and 'Traceback' not in output


@pytest.mark.slow
def test_killed_ten_times_at_random_it_ends_with_the_same_bytes(request_for, tmp_path):
    """SIGKILL while shards are made: each run gets a few shards further, and leaves what it was at."""
    folder = write_folder(tmp_path / 'many', **{f'{i}.png': None for i in range(120)})
    request = request_for(tmp_path / 'reference', path=str(folder), image_size=32, shard_size=2, batch_size=2)
    prepare_latents(request)
    out = tmp_path / 'latents'
    arguments = command(request)[:-1] + [f'--out={out}']
    rng, unfinished = random.Random(), 0
    for _ in range(10):
        before, wanted = shard_count(out), rng.randint(0, 5)
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=on_cpu(),
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and shard_count(out) < before + wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if wanted else 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += not (out / 'metadata.json').exists()
    assert unfinished >= 5, 'the kills came too late to show anything'
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=on_cpu(), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / 'reference')


def shard_count(out) -> int:
    return sum(name.endswith('.json') and not name.startswith('.') for name in os.listdir(out / 'shards')) \
        if (out / 'shards').exists() else 0
