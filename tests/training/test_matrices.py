"""How leaves are read as matrices."""
import numpy as np
import pytest
from tiny import PIXART

from lit_jax import recipes
from lit_jax.convert.torch_keys import model_leaves
from lit_jax.models.network import Network
from lit_jax.recipes.systems import SYSTEMS, system
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training.matrices import matrix_axes


def networks():
    for name, entry in SYSTEMS.items():
        config = system(recipes.default(), name, next(iter(entry.sizes)))
        yield pytest.param(recipes.architecture(config), id=name)
    yield pytest.param(Network(PIXART).arch, id='pixart')


@pytest.mark.parametrize('arch', list(networks()))
def test_leaves_are_read_as_the_matrices_of_pytorch(arch):
    """By the converter's own rules: a tensor is [out, in, ...] or a vector. Rules that copy say nothing of
    the kind."""
    shapes = {path: leaf.shape for path, leaf in named_leaves(Network(arch).abstract()).items()}
    for leaf in model_leaves(arch):
        shape, axes = shapes[leaf.path], matrix_axes(leaf.path, len(shapes[leaf.path]), arch)
        rows, columns = (int(np.prod([shape[axis] for axis in part])) for part in (axes.rows, axes.columns))
        if leaf.rule.transform == 'copy':
            continue
        assert axes.layers == (() if leaf.blocks is None else (0,)), leaf.path
        first, *rest = leaf.torch_shape
        assert (columns, rows if axes.is_matrix else 1) == (first, int(np.prod(rest))), leaf.path
        assert axes.is_matrix == bool(rest), leaf.path


def with_mixer(name):
    return {'depth': 2, 'mixer': {'name': name}, 'ffn': 'mlp', 'stages': ({'depth': 1}, {'depth': 1})}


def test_leaves_without_a_tensor_in_pytorch():
    for mixer, path, rank, want in (
            ('dydila', 'blocks/attn/routed_q/kernel', 5, ((0, 1), (2,), (3, 4))),
            ('dydila', 'blocks/attn/gamma', 2, ((0,), (), (1,))),
            ('edit', 'blocks1/attn/v/kernel', 5, ((0,), (1, 2), (3, 4))),
            ('edit', 'blocks/attn/fusion/restore/kernel', 5, ((0,), (1, 2, 3), (4,))),
            ('softmax', 'blocks/scale_shift_table', 3, ((0,), (1,), (2,))),
            ('softmax', 'y_embedder/table', 2, ((), (0,), (1,))),
            ('softmax', 'joins4/bias', 2, ((0,), (), (1,))),
            ('softmax', 'a', 0, ((), (), ()))):
        assert matrix_axes(path, rank, with_mixer(mixer)) == want, path
