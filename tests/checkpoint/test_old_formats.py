"""What earlier versions wrote, with the null caption among the parameters of text models, is still read."""
import json
import tarfile

import jax
import numpy as np
import pytest
from caption_latent_sets import null_of, write_caption_latents
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from lit_jax.checkpoint.load import load, load_weights, read_null_caption
from lit_jax.checkpoint.model_folder import load_model_folder, save_model_folder
from lit_jax.checkpoint.null_caption import FILE
from lit_jax.convert.torch_export import export
from lit_jax.recipes.recipe import default
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training import loop


@pytest.fixture
def old(goldens, tmp_path):
    """{model, workdir, ema_step4.npz} of goldens/old_formats."""
    with tarfile.open(goldens / 'old_formats' / 'text_v1.tar.xz') as archive:
        archive.extractall(tmp_path / 'old', filter='data')
    return tmp_path / 'old'


@pytest.fixture
def null():
    return null_of()[0].astype(np.float32)


@pytest.mark.parametrize('name', ['model', 'workdir'])
def test_weights_and_null_caption_are_read_apart(old, null, name):
    config, params = load_weights(old / name)
    assert 'null_caption' not in params['y_embedder']
    found = read_null_caption(old / name)
    np.testing.assert_allclose(found, null, rtol=1e-6)       # earlier versions averaged it with the weights
    assert load(old / name).network.abstract().keys() == params.keys()
    export(old / name, old / 'out.safetensors')
    assert np.array_equal(load_file(old / 'out.safetensors')['y_embedder.y_embedding'], found)


def test_a_folder_without_one_said_absent(old):
    path = old / 'model' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, 'text': {**config['text'], 'null_caption': 'absent'}}))
    assert read_null_caption(old / 'model') is None


def test_saved_again_it_is_of_the_new_format(old, tmp_path):
    config, params = load_model_folder(old / 'model')
    save_model_folder(tmp_path / 'new', config, params, null_caption=read_null_caption(old / 'model'))
    again, same = load_model_folder(tmp_path / 'new')
    assert (config['format'], again['format']) == (1, 2) and again['text']['null_caption'] != 'absent'
    assert np.array_equal(read_null_caption(tmp_path / 'new'), read_null_caption(old / 'model'))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    (tmp_path / 'new' / FILE).write_bytes(b'damaged')
    with pytest.raises(ValueError, match='is damaged'):
        load_model_folder(tmp_path / 'new')


# CAME divides by the size of a gradient. That of a key's bias is rounding alone (a softmax does not see it),
# and it scales the rest of its leaf.
ROUNDING = 'blocks/attn/qkv/bias', 'blocks/cross_attn/kv/bias'


@pytest.mark.peers      # optimized: CAME divides by the size of tiny gradients and shows their rounding
def test_a_run_goes_on_where_an_earlier_version_stopped(old, null, tmp_path, monkeypatch):
    """CAME, dropped captions, weight decay: two more steps come to what they came to then."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda *args: devices)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    write_caption_latents(tmp_path / 'latents', 12, shapes=((8, 8), (4, 16)))
    was, usual = json.loads((old / 'workdir' / 'config.json').read_text())['recipe'], default().to_dict()
    config = ConfigDict({name: {**value, **was.get(name, {})} if isinstance(value, dict) else was[name]
                         for name, value in usual.items()})      # recipes have gained fields since
    config.data.path, config.train.steps = str(tmp_path / 'latents'), 4
    assert loop.train(config, old / 'workdir') == 'done'
    assert np.array_equal(read_null_caption(old / 'workdir'), null) and (old / 'workdir' / FILE).exists()
    config, params = load_weights(old / 'workdir')
    assert config['provenance']['step'] == 4
    with np.load(old / 'ema_step4.npz') as want:
        got = named_leaves(params)
        assert set(want.files) - set(got) == {'y_embedder/null_caption'}
        for name, leaf in got.items():
            if name not in ROUNDING:
                np.testing.assert_allclose(leaf, want[name], rtol=1e-5, atol=5e-7, err_msg=name)
