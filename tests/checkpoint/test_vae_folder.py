"""VAE folders: what is written comes back, damage is named, and nothing else is taken for one."""
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_samples import random_params as random_dit
from torch_samples import tiny_arch
from vae_samples import ARCH, HUB, random_params, same_trees, write_hub_folder

import lit_jax
from lit_jax.checkpoint.model_folder import is_model_folder, save_model_folder
from lit_jax.checkpoint.vae_folder import (
    is_vae_folder,
    load_vae,
    read_vae_config,
    save_vae_folder,
)
from lit_jax.models.vae import check_vae_arch
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import params_sha256

CONFIG = {'vae': ARCH, 'id': 'mine/vae', 'scale': 0.5, 'provenance': {'source': 'here', 'sha256': 'a' * 64}}


@pytest.fixture
def folder(tmp_path):
    return save_vae_folder(tmp_path / 'vae', CONFIG, random_params())


def test_there_and_back(folder):
    vae = load_vae(folder)
    assert is_vae_folder(folder)
    assert (vae.id, vae.sha256, vae.scale, vae.shift) == ('mine/vae', 'a' * 64, 0.5, 0.0)
    assert vae.network.arch == check_vae_arch(ARCH) and vae.network.dtype == jnp.float32
    assert same_trees(vae.params, random_params())
    config = json.loads((folder / 'config.json').read_text())
    assert config['format'] == 1 and config['kind'] == 'vae' and config['vae']['widths'] == [8, 16]


def test_a_loaded_vae_encodes_and_decodes(folder):
    vae = load_vae(folder, dtype='bfloat16')
    mean, logvar = vae.encode(np.zeros((2, 8, 12, 3), np.float32), one_by_one=True)
    assert mean.shape == logvar.shape == (2, 4, 6, 2) and mean.dtype == jnp.float32
    image = vae.decode(mean, tile=4)
    assert image.shape == (2, 8, 12, 3) and image.dtype == jnp.float32 and np.isfinite(image).all()


def test_without_source_files_the_weights_name_themselves(tmp_path):
    config = {**CONFIG, 'provenance': {'source': 'trained here'}}
    first, again, other = (load_vae(save_vae_folder(tmp_path / name, config, random_params(seed=seed))).sha256
                           for name, seed in (('a', 0), ('b', 0), ('c', 1)))
    assert first == again == params_sha256(random_params()) and first != other and re.fullmatch(
        '[0-9a-f]{64}', first)


def test_parameters_can_be_spread_over_devices(folder):
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    vae = load_vae(folder, shard=lambda abstract: jax.tree.map(lambda _: whole, abstract))
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(vae.params))


def test_overwriting_has_to_be_asked_for(folder, tmp_path):
    with pytest.raises(UserError, match='exists and is not empty'):
        save_vae_folder(folder, CONFIG, random_params(seed=1))
    assert same_trees(load_vae(folder).params, random_params())
    save_vae_folder(folder, CONFIG, random_params(seed=1), overwrite=True)
    assert same_trees(load_vae(folder).params, random_params(seed=1))
    dit = {'model': tiny_arch(), 'diffusion': {'steps': 1000, 'kind': 'linear'}, 'classes': None,
           'provenance': {}, 'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}}
    save_model_folder(tmp_path / 'dit', dit, random_dit(tiny_arch()))
    with pytest.raises(UserError, match='not a VAE folder, so it will not be overwritten'):
        save_vae_folder(tmp_path / 'dit', CONFIG, random_params(), overwrite=True)
    with pytest.raises(UserError, match='describes a model, not a VAE'):
        load_vae(tmp_path / 'dit')
    assert not is_vae_folder(tmp_path / 'dit')


def test_damage_is_named(folder):
    victim = max((path for path in Path(folder, 'arrays').rglob('*') if path.is_file()),
                 key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf'is damaged; 1 of its files .*\n.*{re.escape(victim.name)}'):
        load_vae(folder)


def test_what_is_no_vae_folder_says_so(folder, tmp_path):
    for path, words in [(tmp_path / 'nowhere', 'there is no such folder'),
                        (folder / 'config.json', 'it is a file'),
                        (folder / 'arrays', 'it has no config.json')]:
        with pytest.raises(UserError, match=words):
            load_vae(path)
    with pytest.raises(UserError, match=r'hub \(AutoencoderKL\), not yet a VAE folder: python convert_torch'):
        load_vae(write_hub_folder(tmp_path / 'hub', config=HUB))
    with pytest.raises(UserError, match='unknown dtype'):
        load_vae(folder, dtype='float8')
    (folder / 'config.json').write_text('{')
    with pytest.raises(UserError, match='is not JSON'):
        read_vae_config(folder)


@pytest.mark.parametrize('change, words', [
    ({'format': 2}, 'format 2'), ({'vae': None}, '"vae" must hold'), ({'id': ''}, '"id"'),
    ({'scale': '1'}, '"scale"'), ({'scale': 0}, '"scale"'), ({'shift': None}, '"shift"'),
    ({'vae': {**ARCH, 'depth': 1}}, 'unknown fields depth')])
def test_wrong_configs_are_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        save_vae_folder(tmp_path / 'vae', {**CONFIG, **change}, random_params())
    assert not (tmp_path / 'vae').exists()


def test_parameters_of_another_architecture_are_refused(tmp_path):
    with pytest.raises(UserError, match='the parameters to be saved'):
        save_vae_folder(tmp_path / 'vae', {**CONFIG, 'vae': {**ARCH, 'channels': 3}}, random_params())
    assert not (tmp_path / 'vae').exists()


def test_a_vae_folder_is_not_taken_for_a_model_folder(folder):
    assert not is_model_folder(folder)
    with pytest.raises(UserError, match='is a VAE folder, not a diffusion model; give it as --vae'):
        lit_jax.load(folder)
    arch = tiny_arch()
    config = {'model': arch, 'diffusion': {'steps': 10, 'kind': 'linear'}, 'classes': None, 'provenance': {},
              'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}}
    with pytest.raises(UserError, match='is not a model folder, so it will not be overwritten'):
        save_model_folder(folder, config, random_dit(arch), overwrite=True)


def test_a_changed_config_is_refused(folder):
    path = folder / 'config.json'
    path.write_text(path.read_text().replace('"scale": 0.', '"scale": 1.'))
    with pytest.raises(UserError, match=r'config\.json is damaged: .* own checksum'):
        load_vae(folder)
