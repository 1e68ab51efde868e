"""Low-rank updates as an adapter of peft: its files, and what its tensors mean in the modules of diffusers.
(Names and shapes follow peft's documentation; the package itself is not used.)"""
import json

import numpy as np
import pytest
from torch_samples import LINEAR, SOFTMAX, random_params, tiny_arch
from torchvision_shim import import_oracle

from lit_jax.convert import peft_adapter
from lit_jax.convert.peft_adapter import CONFIG, WEIGHTS, export_adapter, to_peft_state
from lit_jax.convert.torch_export import to_torch_state
from lit_jax.models.low_rank import B, is_update, merge_updates, with_updates
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves, unflatten
from lit_jax.training.state import updated_kernels

PIXART = {'family': 'pixart', 'cross_heads': 2, 'caption_channels': 12, 'caption_tokens': 5, 'base_size': 2,
          'pe_interpolation': 0.125}


def system(mixer=SOFTMAX, trained='final_layer', **changes):
    """(architecture, parameters, the same with updates of rank 3 on all that is not `trained`)."""
    arch = tiny_arch(mixer, **changes)
    if arch['family'] == 'pixart':
        del arch['num_classes']
    params, rng = random_params(arch), np.random.default_rng(1)
    frozen = [name for name in named_leaves(params) if trained in name]
    updated = with_updates(params, updated_kernels('x', frozen, params, arch, 3), 3, seed=0)
    return arch, params, unflatten({name: rng.standard_normal(leaf.shape).astype(np.float32)
                                    if name.endswith(B) else np.asarray(leaf)
                                    for name, leaf in named_leaves(updated).items()})


def factors_of(params) -> dict:
    return {name: leaf for name, leaf in named_leaves(params).items() if is_update(name)}


@pytest.mark.parametrize('changes', [{}, PIXART, {'stages': [{'depth': 1}, {'depth': 1}]}])
def test_each_module_gets_its_part_of_the_update(changes):
    arch, params, updated = system(**changes)
    state = to_peft_state(factors_of(updated), arch, 'run')
    base, merged = (to_torch_state(tree, arch, 'diffusers') for tree in (params, merge_updates(updated)))
    modules = {key.removeprefix('base_model.model.').rpartition('.lora_')[0] for key in state}
    changed = {key.removesuffix('.weight') for key in base if not np.array_equal(base[key], merged[key])}
    assert modules == changed and 'transformer_blocks.1.attn1.to_q' in modules
    assert len(state) == 2 * len(modules)
    for module in modules:
        a, b = (state[f'base_model.model.{module}.lora_{part}.weight'] for part in 'AB')
        assert a.shape[0] == b.shape[1] == 3
        np.testing.assert_allclose(base[f'{module}.weight'] + b @ a, merged[f'{module}.weight'], rtol=1e-4,
                                   atol=1e-4)


def test_what_diffusers_has_no_name_for_is_refused():
    arch, _, updated = system(LINEAR)
    with pytest.raises(UserError, match='run: diffusers has no projection .* updates of:\n  blocks.attn'):
        to_peft_state(factors_of(updated), arch, 'run')


def test_the_folder_is_what_peft_reads(tmp_path, monkeypatch):
    from safetensors.numpy import load_file
    arch, _, updated = system(LINEAR, trained='attn')
    trained = factors_of(updated) | {'blocks/attn/q/kernel': np.zeros(1)}
    monkeypatch.setattr(peft_adapter, 'load_updates', lambda path: ({'model': arch}, trained))
    done = export_adapter('run', tmp_path / 'adapter')
    assert '1 more trained arrays' in done.notes[0]
    config = json.loads((tmp_path / 'adapter' / CONFIG).read_text())
    state = load_file(tmp_path / 'adapter' / WEIGHTS)
    assert (config['peft_type'], config['r'], config['lora_alpha']) == ('LORA', 3, 3)
    assert sorted(state) == sorted(f'base_model.model.{module}.lora_{part}.weight'
                                   for module in config['target_modules'] for part in 'AB')
    with pytest.raises(UserError, match='exists already'):
        export_adapter('run', tmp_path / 'adapter')
    export_adapter('run', tmp_path / 'adapter', overwrite=True)
    monkeypatch.setattr(peft_adapter, 'load_updates', lambda path: ({'model': arch}, {}))
    with pytest.raises(UserError, match='without low-rank updates'):
        export_adapter('run', tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


@pytest.mark.peers
def test_the_modules_are_those_of_diffusers():
    diffusers = import_oracle('diffusers')
    sizes = {'num_attention_heads': 2, 'attention_head_dim': 8, 'in_channels': 4, 'num_layers': 2,
             'sample_size': 4, 'patch_size': 2}
    for kind, changes, more in ((diffusers.DiTTransformer2DModel, {}, {'num_embeds_ada_norm': 3}),
                                (diffusers.PixArtTransformer2DModel, PIXART,
                                 {'cross_attention_dim': 16, 'caption_channels': 12})):
        modules = dict(kind(**sizes, **more).named_modules())
        arch, _, updated = system(**changes)
        for key, value in to_peft_state(factors_of(updated), arch, 'run').items():
            module, _, part = key.removeprefix('base_model.model.').rpartition('.lora_')
            outputs, inputs = modules[module].weight.shape
            assert value.shape == ((3, inputs) if part.startswith('A') else (outputs, 3)), key
