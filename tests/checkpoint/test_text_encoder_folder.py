"""Text encoder folders: what is saved is loaded, in every form of the weights, and each mistake is named."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_encoder_samples import (
    ARCH,
    random_params,
    same_trees,
    tokenizer,
    tokenizer_json,
    write_text_encoder,
)

from lit_jax.checkpoint import arrays
from lit_jax.checkpoint.load import load
from lit_jax.checkpoint.model_folder import is_model_folder
from lit_jax.checkpoint.text_encoder_folder import (
    KERNELS,
    is_text_encoder_folder,
    load_text_encoder,
    pack,
    read_text_encoder_config,
    save_text_encoder_folder,
)
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves, unflatten
from lit_jax.training.mesh import make_mesh, state_shardings


def in_form(params, form):
    flat = {}
    for name, leaf in named_leaves(params).items():
        flat |= pack(name, leaf if name in KERNELS else [leaf], len(leaf), form)
    return unflatten(flat)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp('text') / 't5')


def test_a_folder_gives_back_what_was_saved(folder):
    assert is_text_encoder_folder(folder) and not is_model_folder(folder)
    encoder = load_text_encoder(folder, 'float32')
    assert same_trees(encoder.params, random_params())
    assert (encoder.id, encoder.width, encoder.weights,
            encoder.network.arch) == ('tiny-t5', 16, 'float32', ARCH)
    assert encoder.tokenizer.content == tokenizer_json() == (folder / 'tokenizer.json').read_bytes()
    assert len(encoder.sha256) == 64
    config = read_text_encoder_config(folder)
    assert config['tokenizer'] == 'tokenizer.json' and config['weights'] == 'float32' and config[
        'kind'] == 'text_encoder'
    ids = np.full((1, 4), 3, np.int32)
    assert encoder.encode(ids, ids).dtype == jnp.float32


def test_equal_weights_have_one_sha256(folder, tmp_path):
    other = random_params()
    other['embed']['table'][0, 0] += 1
    one, two = write_text_encoder(tmp_path / 'one'), write_text_encoder(tmp_path / 'two', params=other)
    sums = [read_text_encoder_config(path)['provenance']['sha256'] for path in (folder, one, two)]
    assert sums[0] == sums[1] != sums[2]


@pytest.fixture(params=[False, True], ids=['whole', 'by layer'])
def by_layer(request, monkeypatch):
    """Stacks as they are stored when they are small, and when they are large."""
    monkeypatch.setattr(arrays, 'LARGE_STACK', 0 if request.param else 2 ** 27)
    return request.param


@pytest.mark.parametrize('stored', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('asked', ['float32', 'bfloat16', 'int8'])
def test_forms(tmp_path, stored, asked, by_layer):
    """Weights are narrowed when asked for, never widened; what is computed in is told apart from that."""
    encoder = load_text_encoder(write_text_encoder(tmp_path / 't5', params=in_form(random_params(), stored)),
                                asked)
    form = max(stored, asked, key=('float32', 'bfloat16', 'int8').index)
    want = in_form(random_params(), stored)
    want = want if form == stored else in_form(want, form)
    assert encoder.weights == form and encoder.config['weights'] == stored
    parts = [rows for rows in arrays.each_rows(tmp_path / 't5' / 'arrays') if rows.name in KERNELS]
    assert len(parts) == len(KERNELS) * (ARCH['layers'] if by_layer else 1)
    assert same_trees(encoder.params, want)
    # of int8: on CPU
    assert encoder.network.dtype == (jnp.bfloat16 if asked == 'bfloat16' else jnp.float32)


def test_the_compute_dtype_can_be_told(folder):
    assert load_text_encoder(folder, 'int8', compute='bfloat16').network.dtype == jnp.bfloat16


@pytest.mark.parametrize('asked', ['float32', 'int8'])
def test_shards(tmp_path, asked, by_layer):
    """Cut as the mesh says, loaded as stored and rounded while loading."""
    arch = {**ARCH, 'heads': 4}
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2, 'seq': 1}, jax.devices()[:4])
    path = write_text_encoder(tmp_path / 't5', arch, random_params(arch))
    encoder = load_text_encoder(path, asked, shard=lambda abstract: state_shardings(abstract, mesh))
    kernel = encoder.params['blocks']['attn']['qkv']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert same_trees(encoder.params, in_form(random_params(arch), asked))


# ------------------------------------------------------------------------------------------------------
# Bad input


def test_other_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match='there is no such folder'):
        load_text_encoder(tmp_path / 'nothing')
    with pytest.raises(UserError, match='has no config.json'):
        load_text_encoder(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match='convert_torch_ckpt.py .* makes one'):
        load_text_encoder(tmp_path)
    (tmp_path / 'config.json').write_text('{"kind": "vae"}')
    with pytest.raises(UserError, match='describes vae, not a text encoder'):
        load_text_encoder(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match='is not JSON'):
        load_text_encoder(tmp_path)
    with pytest.raises(UserError, match='is a text encoder folder, not a diffusion model'):
        load(folder)
    with pytest.raises(UserError, match='unknown dtype'):
        load_text_encoder(folder, 'float16')


@pytest.mark.parametrize('change, words', [
    ({'weights': 'int4'}, '"weights" must be one of'), ({'id': ''}, '"id" must be'),
    ({'tokenizer': '../x'}, '"tokenizer" must be'),
    ({'format': 9}, 'has format 9'), ({'text_encoder': {'vocab': 3}}, 'text_encoder.width'),
    ({'provenance': {}}, 'sha256')])
def test_wrong_configs_are_named(folder, tmp_path, change, words):
    config = json.loads((folder / 'config.json').read_text()) | change
    del config['checksum']      # as an edit by hand does
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        read_text_encoder_config(tmp_path)


def test_damage_is_named(tmp_path):
    path = write_text_encoder(tmp_path / 't5')
    (path / 'tokenizer.json').write_bytes(tokenizer_json()[:-9])
    with pytest.raises(UserError, match='tokenizer.json: .* bytes where'):
        load_text_encoder(path)
    (path / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='tokenizer.json: missing'):
        load_text_encoder(path)


def test_nothing_is_written_that_does_not_fit(folder, tmp_path):
    config = {'text_encoder': ARCH, 'id': 'x'}
    with pytest.raises(UserError, match='missing: final_norm/gain'):
        save_text_encoder_folder(tmp_path / 't5', config,
                                 {k: v for k, v in random_params().items() if k != 'final_norm'}, tokenizer())
    small = {**ARCH, 'vocab': 20}
    with pytest.raises(UserError, match='the tokenizer has .* tokens, the embedding of the text encoder 20 '
                                        'rows'):
        save_text_encoder_folder(tmp_path / 't5', {'text_encoder': small, 'id': 'x'}, random_params(small),
                                 tokenizer())
    assert not (tmp_path / 't5').exists()
    with pytest.raises(UserError, match='not empty'):
        write_text_encoder(folder)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'file').touch()
    with pytest.raises(UserError, match='will not be overwritten'):
        save_text_encoder_folder(tmp_path / 'other', config, random_params(), tokenizer(), overwrite=True)
