"""Random arrays, trees and modules for tests, drawn by numpy or in one program: jax.random on its own
compiles a program for every shape."""
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def normal(seed: int, shape, dtype=None):
    """Standard normal numbers as a jax array: float32, or float64 where it is turned on, or `dtype`."""
    dtype = dtype or jax.dtypes.canonicalize_dtype(np.float64)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def random_tree(abstract, seed: int = 0, scale: float = 0.2):
    """Normal float32 weights of the given shapes: gates that begin at zero carry signal, too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray((scale * rng.standard_normal(leaf.shape)).astype(np.float32)), abstract)


def made(build):
    """The nnx module that `build()` returns, its parameters drawn in one program."""
    graphdef, _ = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.to_pure_dict(nnx.state(build())))())


def applied(module, *args):
    """module(*args) in one program; arguments that are no arrays, as the grid, stay what they are."""
    graphdef, params = nnx.split(module)
    arrays = [a for a in args if hasattr(a, 'dtype')]

    def call(params, arrays):
        rest = iter(arrays)
        return nnx.merge(graphdef, params)(*(next(rest) if hasattr(a, 'dtype') else a for a in args))

    return jax.jit(call)(params, arrays)


def graph(build):
    """The graphdef of the module that `build()` returns: its parameters come from elsewhere."""
    return nnx.split(nnx.eval_shape(build))[0]


def pulled(function, *args):
    """(output, pullback of its cosine to every argument) in one program."""
    def both(*args):
        y, pull = jax.vjp(function, *args)
        return y, pull(jnp.cos(y))
    return jax.jit(both)(*args)
