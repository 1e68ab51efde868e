"""A folder with everything that drawing needs draws what its parts draw, without a network."""
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sampling_models import save_latent_model, save_vae
from text_models import save_system

import lit_jax
from lit_jax.app.drawing import open_studio
from lit_jax.checkpoint.model_folder import load_model_folder, save_model_folder
from lit_jax.checkpoint.text_encoder_folder import read_text_encoder_config
from lit_jax.deploy.offline import make_bundle
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.pipelines import open_pipeline

ROOT = Path(__file__).parents[2]
SETTINGS = {'prompts': ['a red circle'], 'seed': 0, 'steps': 3}


def without_sources(parts, tmp_path):
    """What a system draws; then its bundle is made, and its folders are gone."""
    expected = open_pipeline(**parts, text_dtype='int8').sample(**SETTINGS)
    said = make_bundle(parts['source'], tmp_path / 'laptop', vae=parts['vae'],
                       text_encoder=parts['text_encoder'])
    assert all(name in said for name in ('model', 'vae', 'text_encoder'))
    for folder in parts.values():
        Path(folder).rename(f'{folder}_gone')
    return expected


@pytest.mark.slow
def test_a_bundle_draws_without_its_sources(tmp_path):
    expected = without_sources(save_system(tmp_path), tmp_path)
    bundle = tmp_path / 'laptop'
    assert read_text_encoder_config(bundle / 'text_encoder')['weights'] == 'int8'
    np.testing.assert_array_equal(open_pipeline(bundle).sample(**SETTINGS), expected)
    np.testing.assert_array_equal(lit_jax.load(bundle).sample(**SETTINGS), expected)
    assert str(tmp_path) not in (bundle / 'config.json').read_text()
    studio = open_studio(str(bundle), low_memory=True)      # what app.py draws with
    assert studio.takes == 'text' and studio.pipeline.vae is not None
    # A bundle of a bundle is whole again.
    make_bundle(bundle, tmp_path / 'again')
    np.testing.assert_array_equal(open_pipeline(tmp_path / 'again').sample(**SETTINGS), expected)
    make_bundle(tmp_path / 'again', tmp_path / 'again', overwrite=True)
    np.testing.assert_array_equal(open_pipeline(tmp_path / 'again').sample(**SETTINGS), expected)


# Every address but that of this process's own machine is refused.
NO_NETWORK = """
import runpy, socket, sys

def refuse(*args, **kwargs):
    raise SystemExit(f'the network was asked: {args[1:]}')

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
sys.argv[0] = 'lit-jax'
runpy.run_module('lit_jax', run_name='__main__', alter_sys=False)
"""


@pytest.mark.slow
def test_the_commands_of_its_readme_need_no_network(tmp_path):
    parts = save_system(tmp_path)
    make_bundle(parts['source'], tmp_path / 'laptop', vae=parts['vae'], text_encoder=parts['text_encoder'])
    readme = (tmp_path / 'laptop' / 'README.md').read_text()
    page, sample = [line.split() for line in readme.splitlines() if line.startswith('    ')]
    assert page == 'lit-jax app --from laptop --low_memory'.split()
    command = [sys.executable, '-c', NO_NETWORK, *sample[1:3], 'laptop', '--prompt', 'a red circle', '--out',
               'drawn.png', '--steps', '2', '--low_memory']
    done = subprocess.run(command, cwd=tmp_path, timeout=300, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / 'drawn.png').size > (8, 8)


@pytest.mark.slow
def test_models_of_classes_have_a_vae_only(tmp_path):
    model, vae = save_latent_model(tmp_path / 'model'), save_vae(tmp_path / 'vae')
    said = make_bundle(model, tmp_path / 'laptop', vae=vae)
    assert 'text_encoder' not in said and '--classes 0,1' in (tmp_path / 'laptop' / 'README.md').read_text()
    expected = open_pipeline(model, vae).sample([0, 1], steps=2)
    np.testing.assert_array_equal(open_pipeline(tmp_path / 'laptop').sample([0, 1], steps=2), expected)


@pytest.mark.slow
@pytest.mark.parametrize('changes, said', [
    ({'vae': None}, 'need the VAE that decodes them'), ({'text_encoder': None}, 'needs the text encoder'),
    ({'vae': 'nowhere'}, 'nowhere'), ({'text_encoder': 'nowhere'}, 'nowhere'),
    ({'source': 'nowhere'}, 'nowhere does not exist'), ({'source': 'broken'}, 'holds NaN or infinity'),
    ({'out': 'full'}, 'exists and is not empty'), ({'out': 'full/file/out'}, 'something else stands there')])
def test_what_is_missing_is_told_and_nothing_written(changes, said, tmp_path, system):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').touch()
    given = {**system, 'out': 'out', **changes}
    out = tmp_path / given.pop('out')
    given = {name: str(tmp_path / value) if value == 'nowhere' else value for name, value in given.items()}
    if given['source'] == 'broken':
        given['source'] = str(Path(system['source']).parent / 'broken')
    with pytest.raises(UserError, match=said):
        make_bundle(given['source'], out, vae=given['vae'], text_encoder=given['text_encoder'])
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['file', 'full']


@pytest.fixture(scope='module')
def system(tmp_path_factory):
    folder = tmp_path_factory.mktemp('system')
    parts = save_system(folder)
    config, params = load_model_folder(parts['source'])
    save_model_folder(folder / 'broken', config, jax.tree.map(lambda leaf: leaf + np.nan, params))
    return parts
