"""What a network costs: multiply-accumulates counted from its traced program, and the table of its parameters.

The papers' "Gflops" are multiply-accumulates (DiT-XL/2 at 256px: 118.6), so that is what is counted here.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lit_jax.models.network import Network, count_parameters


def count_macs(fn, *args) -> int:
    """Multiply-accumulates of matrix products and convolutions in one call of `fn`; args may be ShapeDtypeStructs.

    Loops count by their length. Element-wise work (norms, activations, softmax) is not counted, as in the papers.
    """
    return _walk(jax.make_jaxpr(fn)(*args).jaxpr)


def _walk(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == 'dot_general':
            (contract, _), _ = params['dimension_numbers']
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            total += math.prod(eqn.outvars[0].aval.shape) * depth
        elif name == 'conv_general_dilated':
            kernel = eqn.invars[1].aval.shape
            outputs = kernel[params['dimension_numbers'].rhs_spec[0]]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // outputs
        elif name == 'platform_index':
            continue
        elif name == 'cond':                      # platform_dependent: every branch computes the same thing
            total += max(_walk(branch.jaxpr) for branch in params['branches'])
        else:
            repeat = params['length'] if name == 'scan' else 1
            total += repeat * sum(_walk(inner) for inner in _inner_jaxprs(params))
    return total


def _inner_jaxprs(params):
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def network_macs(network: Network) -> int:
    """Multiply-accumulates of one forward pass for one image."""
    arch = network.arch
    x = jax.ShapeDtypeStruct((1, *arch['input_size'], arch['channels']), jnp.float32)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    return count_macs(network.apply, network.abstract(), x, index, {'label': index})


def format_parameters(network: Network) -> str:
    """The parameter table: path, shape, dtype, count, MB; then totals and GMACs of one forward pass."""
    rows = [f'{"parameter":34} {"shape":26} {"dtype":8} {"count":>13} {"MB":>9}']
    for path, leaf in jax.tree_util.tree_leaves_with_path(network.abstract()):
        count = int(np.prod(leaf.shape))
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        rows.append(f'{name:34} {str(leaf.shape):26} {leaf.dtype!s:8} {count:13,} {count * leaf.dtype.itemsize / 1e6:9.2f}')
    leaves = jax.tree.leaves(network.abstract())
    trained = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    megabytes = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves) / 1e6
    rows.append(f'{"total":70} {trained:13,} {megabytes:9.2f}')
    rows.append(f'with the fixed position table, as the papers count: {count_parameters(network):,} parameters')
    rows.append(f'one forward pass of one image: {network_macs(network) / 1e9:.4g} GMACs')
    return '\n'.join(rows)
