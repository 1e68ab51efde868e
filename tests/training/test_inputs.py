"""The identity of data and weights: equal wherever they lie, another one for others."""
import shutil

import numpy as np
import pytest
from image_files import encoded, noise, write_folder
from ml_collections import ConfigDict
from tiny import tiny_recipe

from lit_jax.checkpoint import model_folder
from lit_jax.checkpoint.identity import weights_identity
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.workdir import claim_workdir, read_inputs
from lit_jax.data.sources import open_source
from lit_jax.models.network import Network
from lit_jax.recipes.recipe import architecture, finalize
from lit_jax.runtime.errors import UserError
from lit_jax.training import loop
from lit_jax.training.inputs import identify_inputs

IMAGES = ('cat/a.png', 'cat/b.png', 'dog/a.png', 'dog/b.png')


def data_of(folder, **options):
    config = ConfigDict({'data': {'name': 'folder'}, 'teacher': {'path': ''}, 'inherit': {'path': ''},
                         'latent': {'space': 'pixels'}})
    return identify_inputs(config, open_source('folder', path=folder, image_size=8, **options), {})['data']


def test_images_are_known_by_their_names_and_bytes_wherever_they_lie(tmp_path):
    one = write_folder(tmp_path / 'one', **dict.fromkeys(IMAGES))
    known = data_of(one)
    assert data_of(shutil.move(one, tmp_path / 'two')) == known
    others = write_folder(tmp_path / 'three', **{name: encoded(noise(12, 10, seed=9)) for name in IMAGES})
    assert data_of(others) != known and data_of(others) | {'some_bytes': ''} == known | {'some_bytes': ''}
    (tmp_path / 'list.txt').write_text('dog')
    assert data_of(tmp_path / 'two', classes=str(tmp_path / 'list.txt')) != known
    (tmp_path / 'two' / 'dog').rename(tmp_path / 'two' / 'fox')
    assert data_of(tmp_path / 'two') != known


def weights_of(arch: dict, seed: float) -> dict:
    import jax
    return jax.tree.map(lambda leaf: np.full(leaf.shape, seed, leaf.dtype), Network(arch).abstract())


@pytest.fixture
def teacher():
    config = finalize(tiny_recipe(), 1)
    arch = architecture(config)
    about = {'model': arch, 'diffusion': {'steps': 1000, 'kind': 'linear'}, 'classes': None,
             'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}}
    return arch, about, config.to_dict()


def test_a_model_folder_is_known_by_its_weights(tmp_path, teacher):
    arch, about, _ = teacher
    for name, seed, source in (('one', 1, 'a.pt'), ('again', 1, 'b.pt'), ('other', 2, 'a.pt')):
        config = {**about, 'provenance': {'source': source, 'sha256': 'same'}}
        model_folder.save_model_folder(tmp_path / name, config, weights_of(arch, seed))
    one, again, other = (weights_identity(tmp_path / name) for name in ('one', 'again', 'other'))
    assert one == again != other and set(one) == {'sha256'}
    (tmp_path / 'one' / 'manifest.json').write_text('{}')
    with pytest.raises(UserError, match='manifest.json is missing or damaged'):
        weights_identity(tmp_path / 'one')


def test_of_a_workdir_that_trains_on_the_known_step_is_kept(tmp_path, teacher):
    arch, about, recipe = teacher
    path = tmp_path / 'run'
    claim_workdir(path, recipe, about)

    def save(step):
        with Checkpoints(path, keep_latest=2) as checkpoints:
            checkpoints.save(step, {'ema': weights_of(arch, step)}, {})

    save(3)
    known = weights_identity(path)
    save(6)
    newest = weights_identity(shutil.copytree(path, tmp_path / 'moved'))
    assert (known['step'], newest['step']) == (3, 6) and known['run'] == newest['run']
    assert weights_identity(path, known) == known
    save(9)                                          # the known one is gone
    assert weights_identity(path, known)['step'] == 9
    assert weights_identity(path, known, needed=False) == known      # only to begin with
    other = {**known, 'run': 1.0}
    assert weights_identity(path, other, needed=False)['step'] == 9


def folder_recipe(folder, **train):
    config = tiny_recipe(steps=2, batch_size=8, **train)
    config.checkpoint.every = 1
    config.data.update({'name': 'folder', 'path': str(folder), 'num_classes': 2})
    config.latent.channels = 3
    return config


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_data_or_weights(tmp_path):
    data = write_folder(tmp_path / 'data', **{f'{name}{i}.png': None for name in ('cat/', 'dog/')
                                              for i in range(8)})
    others = write_folder(tmp_path / 'others', **{f'{name}{i}.png': None for name in ('cat/', 'fox/')
                                                  for i in range(8)})
    run = tmp_path / 'run'
    loop.train(folder_recipe(data), run)
    before = (run / 'config.json').read_bytes()
    with pytest.raises(UserError, match="other data or weights:\n  data.sha256(.|\n)*class 1: 'dog' there, "
                                        "'fox' now") as caught:
        loop.train(folder_recipe(others), run)
    assert str(run) in str(caught.value) and (run / 'config.json').read_bytes() == before
    data = shutil.move(data, tmp_path / 'moved')
    config = folder_recipe(data)
    config.train.steps = 3
    assert loop.train(config, run) == 'done'

    # A student: its teacher trains on, then is another; the weights of the old run go on with other data.
    student = folder_recipe(data)
    student.teacher.path = student.inherit.path = str(run)
    loop.train(student, tmp_path / 'student')
    assert read_inputs(tmp_path / 'student')['teacher']['step'] == 3
    config.train.steps = 4
    loop.train(config, run)
    student.train.steps = 3
    assert loop.train(student, tmp_path / 'student') == 'done'
    assert read_inputs(tmp_path / 'student')['teacher']['step'] == 3
    student.teacher.path, student.train.steps = str(tmp_path / 'student'), 4
    with pytest.raises(UserError, match='teacher.run'):
        loop.train(student, tmp_path / 'student')
    onward = folder_recipe(others)
    onward.inherit.update({'path': str(run), 'copy': 'all'})
    assert loop.train(onward, tmp_path / 'onward') == 'done'
