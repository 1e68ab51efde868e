"""Writes programs as StableHLO, through `jax.export`: `model.stablehlo`, weights in `model.safetensors`.

Both are read with jax and safetensors alone; the README of the folder says how."""
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax import export

from lit_jax.convert.torch_export import write_safetensors
from lit_jax.deploy.programs import Program
from lit_jax.runtime.leaves import named_leaves, unflatten

FILE, WEIGHTS = 'model.stablehlo', 'model.safetensors'
PLATFORMS = 'cpu', 'cuda', 'tpu'


def write_stablehlo(folder: Path, program: Program, params: Mapping) -> None:
    """Writes both files. The function takes {name: array} of the weights, then its inputs by name."""
    def function(weights, **inputs):
        return program.function(unflatten(weights), **inputs)

    abstract, flat = named_leaves(program.params), named_leaves(params)
    weights = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in abstract.items()}
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(weights, **program.inputs)
    (folder / FILE).write_bytes(exported.serialize())
    with open(folder / WEIGHTS, 'wb') as file:
        write_safetensors(file, {name: leaf.shape for name, leaf in abstract.items()},
                          (np.asarray(flat[name]) for name in abstract), {'format': 'np'})
