"""Low-rank updates of a run (train.lora_rank) as an adapter that peft loads onto the teacher in diffusers.

    adapter_config.json             rank, and the modules that have an update
    adapter_model.safetensors       base_model.model.MODULE.lora_A.weight [r, in], .lora_B.weight [out, r]

Names and files are those of peft's documentation of checkpoints
(huggingface.co/docs/peft/developer_guides/checkpoint). MODULE is diffusers' name of the projection, in
DiTTransformer2DModel or PixArtTransformer2DModel. A fused projection (qkv) is several there: each has the
same A and its part of B."""
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lit_jax.checkpoint.load import load_updates
from lit_jax.convert.torch_export import check_free, write_safetensors, write_whole
from lit_jax.convert.torch_import import Converted
from lit_jax.convert.torch_keys import ModelLeaf, model_leaves
from lit_jax.models.low_rank import A, B
from lit_jax.runtime.errors import UserError, listed
from lit_jax.runtime.paths import as_path, local_path

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_FACTORS = ('linear', 'linear_in')      # transforms of products that PyTorch holds as [out, in]


def export_adapter(src, out, *, overwrite: bool = False) -> Converted:
    """Writes the low-rank updates of a workdir (EMA, newest checkpoint) as a folder for peft, atomically.

    UserError for a run without them, and for projections that diffusers has no name for."""
    src, out = as_path(src), local_path(out)
    check_free(out, 'peft', overwrite)
    config, trained = load_updates(src)
    factors = {name: leaf for name, leaf in trained.items() if name.endswith((A, B))}
    if not factors:
        raise UserError(f'{src} was trained without low-rank updates (train.lora_rank); to export its '
                        f'weights leave --layout peft out')
    tensors = to_peft_state(factors, config['model'], str(src))
    rank = next(leaf for name, leaf in factors.items() if name.endswith(A)).shape[-1]

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(_adapter_config(rank, tensors), indent=2) + '\n')
        with open(folder / WEIGHTS, 'wb') as file:
            write_safetensors(file, {key: value.shape for key, value in tensors.items()},
                              iter(tensors.values()), {'format': 'pt'})

    write_whole(out, tensors, write)
    others = sorted(set(trained) - set(factors))
    notes = (f'{len(others)} more trained arrays are no updates and are left out (the first: {others[0]}): '
             f'this adapter alone is not the student',) if others else ()
    return Converted(str(src), 'ema', 'peft', config['model'], sum(value.size for value in tensors.values()),
                     out, notes)


def _adapter_config(rank: int, tensors: Mapping) -> dict:
    """lora_alpha / r is the factor of the product: 1. Modules are named in full."""
    modules = sorted({key.removeprefix(_PREFIX).rpartition('.lora_')[0] for key in tensors})
    return {'peft_type': 'LORA', 'task_type': None, 'base_model_name_or_path': None, 'inference_mode': True,
            'r': rank, 'lora_alpha': rank, 'lora_dropout': 0.0, 'bias': 'none', 'fan_in_fan_out': False,
            'init_lora_weights': True, 'use_rslora': False, 'modules_to_save': None,
            'target_modules': modules}


def to_peft_state(factors: Mapping[str, np.ndarray], arch: Mapping, source: str) -> dict[str, np.ndarray]:
    """{peft's name: float32 array} of low-rank updates, by the names of their factors in the parameter tree.
    UserError where diffusers has no such projection."""
    table = {leaf.path: leaf for leaf in model_leaves(arch)}
    kernels = {f'{name.removesuffix(A)}kernel' for name in factors if name.endswith(A)}
    leaves = [table[name] for name in sorted(kernels)]
    if unknown := [leaf.path for leaf in leaves
                   if not leaf.rule.diffusers or leaf.rule.transform not in _FACTORS]:
        raise UserError(f'{source}: diffusers has no projection for the updates of:{listed(unknown, 5)}\n'
                        f'Export merged weights instead: leave --layout peft out')
    state = {}
    for leaf in leaves:
        path = leaf.path.removesuffix('kernel')
        for layer, block in enumerate(leaf.blocks):
            state |= _of_block(leaf, block, factors[path + A][layer], factors[path + B][layer])
    return state


def _of_block(leaf: ModelLeaf, block: int, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    keys = leaf.rule.diffusers
    for key, part in zip(keys, np.split(b.T, len(keys)), strict=True):
        module = _PREFIX + key.replace('{i}', str(block)).removesuffix('.weight')
        yield f'{module}.lora_A.weight', np.ascontiguousarray(a.T)
        yield f'{module}.lora_B.weight', np.ascontiguousarray(part)
