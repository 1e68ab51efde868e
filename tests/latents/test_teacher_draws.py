"""prepare_latents.py --teacher: what a teacher draws is training data, the same after any interruption."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from latent_sets import killed_in
from processes import assert_all_good, on_cpu, run_processes
from sampling_models import save_latent_model, save_model
from text_models import save_system

from lit_jax import recipes
from lit_jax.checkpoint.identity import are_weights, params_identity
from lit_jax.checkpoint.load import load_weights
from lit_jax.checkpoint.model_folder import save_model_folder
from lit_jax.data import latent_shards
from lit_jax.data.latents import open_latents
from lit_jax.data.sources import open_source
from lit_jax.latents import prepare as preparation
from lit_jax.latents.prepare import prepare_latents
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import files_under
from lit_jax.sampling.pipelines import open_pipeline
from lit_jax.training import loop
from lit_jax.training.from_teacher import complete

ROOT = Path(__file__).parents[2]
SETTINGS = {'steps': 3, 'cfg_scale': 2.0}
PROMPTS = ('red circle', 'a blue square', 'green')


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return save_latent_model(tmp_path_factory.mktemp('models') / 'mine', scale=1.5)


@pytest.fixture(scope='module')
def request_for(teacher):
    """request_for(out, ...): 75 images of ten classes, in three shards, the last of eleven images."""
    return lambda out, **options: PrepareOptions(**{
        'teacher': str(teacher), 'count': 75, 'shard_size': 32, **SETTINGS, **options}, out=str(out))


@pytest.fixture(scope='module')
def whole(tmp_path_factory, request_for):
    out = tmp_path_factory.mktemp('whole') / 'latents'
    prepare_latents(request_for(out))
    return out


def contents(folder) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in files_under(folder)}


# ------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize('options, message', [
    ({}, '--data, --vae, --image_size missing: give .*or --teacher=MODEL and --count=N'),
    ({'count': 3, 'cfg_scale': 2.0}, '--count, --cfg_scale: for images that a teacher draws: give --teacher'),
    ({'teacher': 'T'}, '--teacher needs --count=N'), ({'teacher': 'T', 'count': 0}, '--count must be at lea'),
    ({'teacher': 'T', 'count': 3, 'seed': -1}, 'the seed must be'),
    ({'teacher': 'no/such', 'count': 3}, 'no/such does not exist'),
    ({'teacher': 'T', 'count': 3, 'data': 'folder', 'vae': 'V'}, '--data, --vae: for images that a VAE enc')])
def test_flags_that_do_not_belong_together_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare_latents(PrepareOptions(**options, out=str(tmp_path / 'latents')))
    assert not (tmp_path / 'latents').exists()


def test_the_command_that_resumes_has_all_flags():
    request = PrepareOptions(teacher='my models/dit', count=9, cfg_interval=(0.1, 0.9), out='latents')
    assert request.command() == ("python prepare_latents.py --cfg_interval 0.1 0.9 "
                                 "--teacher='my models/dit' --count=9")


@pytest.mark.slow
@pytest.mark.parametrize('options, message', [
    ({'count': 7}, 'cannot show all 10 classes: give more, or some of them'),
    ({'steps': 0}, 'at least 1 step'),
    ({'classes': '3,11'}, 'class 11 is out of range'), ({'prompts': 'a.txt'}, '--prompts: .*draws classes'),
    ({'text_encoder': 'T'}, 'text_encoder.*draws classes'), ({'method': 'euler'}, 'euler')])
def test_what_the_teacher_cannot_draw_is_refused(options, message, request_for, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare_latents(request_for(tmp_path / 'latents', **options))
    assert not (tmp_path / 'latents').exists()


# ------------------------------------------------------------------------------------------------------
# Drawing


@pytest.mark.slow
def test_a_set_holds_what_the_pipeline_draws(whole, teacher):
    source, metadata = open_latents(whole), json.loads((whole / 'metadata.json').read_text())
    batch, pipeline = source.take(range(75)), open_pipeline(teacher)
    assert batch['label'].tolist() == [i % 10 for i in range(75)] == source.all_labels().tolist()
    settings = dataclasses.replace(pipeline.defaults, **SETTINGS)
    drawn = np.concatenate(list(pipeline.draw_groups(pipeline.encode(batch['label'], 0), range(5), settings)))
    np.testing.assert_array_equal(batch['moments'][:, 0, ..., :4], drawn)
    assert len({view.tobytes() for view in drawn}) == 75
    assert metadata['teacher'] == params_identity(teacher) and metadata['teacher']['name'] == 'mine'
    assert metadata['vae'] == {'id': 'tiny vae', 'sha256': None, 'scale': 1.5, 'shift': 0.0, 'downscale': 2,
                               'channels': 4}
    assert metadata['drawn']['seed'] == 0 and metadata['drawn']['sampler'] == settings.to_json()
    assert [shard['count'] for shard in metadata['shards']] == [32, 32, 11]


@pytest.mark.slow
def test_bits_depend_neither_on_shards_nor_on_devices(whole, request_for, tmp_path):
    prepare_latents(request_for(tmp_path / 'shards', shard_size=64))
    same = open_latents(tmp_path / 'shards').take(range(75))['moments']
    np.testing.assert_array_equal(same, open_latents(whole).take(range(75))['moments'])
    command = request_for(tmp_path / 'one').command().split()[1:]
    done = subprocess.run([sys.executable, *command, f'--out={tmp_path / "one"}'], cwd=ROOT, env=on_cpu(),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'all shards checked' in done.stdout, done.stderr
    assert contents(tmp_path / 'one') == contents(whole)
    several = ['--coordinator={coordinator}', '--num_processes={num_processes}', '--process_id={process_id}']
    results = run_processes([*command, f'--out={tmp_path / "two"}', *several], 2, devices_each=2)
    assert_all_good(results)
    assert contents(tmp_path / 'two') == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize('module, name, after', [(latent_shards, 'write_text_atomic', 1), (os, 'replace', 2),
                                                 (preparation, 'write_text_atomic', 1)])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(module, name, after, whole, request_for, tmp_path,
                                                       monkeypatch):
    out = tmp_path / 'latents'
    with killed_in(monkeypatch, module, name, after):
        prepare_latents(request_for(out))
    with pytest.raises(UserError, match='not finished. This command resumes: .*--teacher=.*--count=75'):
        open_latents(out)
    prepare_latents(request_for(out))
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_another_draw_does_not_go_on_in_its_folder(whole, request_for, tmp_path):
    other = save_latent_model(tmp_path / 'other', scale=1.5, seed=1)
    for change, line in (({'seed': 1}, 'drawn.seed: 0 there, 1 now'), ({'count': 90}, 'count: 75 there, 90'),
                         ({'cfg_scale': 1.0}, 'cfg_scale: 2.0 there, 1.0 now'), ({'group': 8}, 'group: 16'),
                         ({'classes': '1,2'}, "classes: 'all' there, "),
                         ({'teacher': str(other)}, 'teacher.sha256: ')):
        with pytest.raises(UserError, match='has other latents') as said:
            prepare_latents(request_for(whole, **change))
        assert line in str(said.value)


@pytest.mark.slow
def test_the_teacher_may_be_renamed_and_stored_anew(whole, teacher, request_for, tmp_path):
    shutil.copytree(teacher, tmp_path / 'renamed')
    config, params = load_weights(teacher)
    save_model_folder(tmp_path / 'anew', {**config, 'provenance': {'source': 'other'}}, params)
    # By its list of files, and where that differs by the parameters themselves.
    for manifest in (params_identity(teacher)['manifest'], 'ab' * 32, None):
        assert are_weights(tmp_path / 'anew', {**params_identity(teacher), 'manifest': manifest})
    out = shutil.copytree(whole, tmp_path / 'latents')
    for name in ('renamed', 'anew'):
        prepare_latents(request_for(out, teacher=str(tmp_path / name)))
    assert contents(out / 'shards') == contents(whole / 'shards')


# ------------------------------------------------------------------------------------------------------
# Training


def student(teacher, data, row='linear'):
    """What train.py makes of --config=configs/student.py:ROW with these two paths, three steps of it."""
    config = recipes.load_recipe(f'student:{row}')
    config.teacher.path, config.data.path = str(teacher), str(data)
    config.model.mixer.dwc_kernel = 3
    config.train.update({'steps': 3, 'batch_size': 8, 'dtype': 'float32'})
    config.sample.every = 0
    return complete(config)


@pytest.mark.slow
def test_a_student_trains_on_what_its_teacher_drew_and_on_no_other_set(whole, teacher, tmp_path):
    assert loop.train(student(teacher, whole), tmp_path / 'run') == 'done'
    other = save_latent_model(tmp_path / 'other', scale=1.5, seed=1)
    with pytest.raises(UserError, match='were drawn by another teacher than .*other: by mine .*sha256'):
        loop.train(student(other, whole), tmp_path / 'refused')
    assert not (tmp_path / 'refused').exists()
    config = student(other, whole).copy_and_resolve_references().unlock()
    config.teacher.path = ''      # nothing is asked of a teacher then
    assert loop.train(config.lock(), tmp_path / 'alone') == 'done'


@pytest.mark.slow
def test_a_teacher_of_pixels_draws_pixels(request_for, tmp_path):
    model = save_model(tmp_path / 'pixels')
    prepare_latents(request_for(tmp_path / 'drawn', teacher=str(model), classes='3,7', count=20))
    source = open_source('latents', path=tmp_path / 'drawn', image_size=8, channels=1, num_classes=10)
    assert set(source.all_labels().tolist()) == {3, 7} and source.metadata['space'] == 'pixels'
    assert loop.train(student(model, tmp_path / 'drawn'), tmp_path / 'run') == 'done'


@pytest.mark.slow
def test_a_teacher_of_prompts_draws_captioned_latents(tmp_path, monkeypatch):
    system = save_system(tmp_path / 'system')
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    request = PrepareOptions(teacher=system['source'], text_encoder=system['text_encoder'], count=13,
                             prompts=str(tmp_path / 'prompts.txt'), text_dtype='float32', shard_size=8,
                             **SETTINGS, out=str(tmp_path / 'whole'))
    prepare_latents(request)
    source = open_source('caption_latents', path=tmp_path / 'whole', image_size=8)
    pipeline = open_pipeline(system['source'], None, system['text_encoder'])
    images = pipeline.encode([PROMPTS[i % 3] for i in range(13)], 0)
    images = dataclasses.replace(images, numbers=np.arange(13, dtype=np.uint32))
    settings = dataclasses.replace(pipeline.defaults, **SETTINGS)
    drawn, cond = pipeline.draw(images, settings), images.rows(np.arange(13))['cond']
    for i, element in enumerate(source[i] for i in range(13)):
        np.testing.assert_array_equal(element['moments'][..., :4], drawn[i])
        mask = element['text_mask'][0]
        np.testing.assert_array_equal(mask, cond['text_mask'][i])
        np.testing.assert_array_equal(element['text'][0].astype(np.float32)[mask > 0],
                                      cond['text'][i][mask > 0].astype(element['text'].dtype).astype(
                                          np.float32))
    with killed_in(monkeypatch, preparation, 'write_text_atomic', 1):
        prepare_latents(dataclasses.replace(request, out=str(tmp_path / 'again')))
    prepare_latents(dataclasses.replace(request, out=str(tmp_path / 'again')))
    assert contents(tmp_path / 'again') == contents(tmp_path / 'whole')
    assert loop.train(student(system['source'], tmp_path / 'whole'), tmp_path / 'run') == 'done'
