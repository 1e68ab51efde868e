"""Reads the golden diffusion files in NHWC and compares with them."""
import jax
import jax.numpy as jnp
import numpy as np
from goldens import weights

from lit_jax.convert.torch_export import to_torch_state
from lit_jax.convert.torch_import import from_torch_state

TAGS = {'': 'full', '250': '250', '20': '20', 'ddim50': 'ddim50'}   # respacing -> name in the files


def load_nhwc(path):
    """(meta, torch state, arrays), images NHWC; torch-layout gradients keep their layout."""
    meta, state, arrays = weights.load(path)
    channels_last = {k: v if v.ndim < 4 or k.startswith(('out_train_grad_x', 'out64_train_grad_x'))
                     else np.moveaxis(v, -3, -1) for k, v in arrays.items()}
    return meta, state, channels_last


def toy_model(x, t, cond):
    """The model of diffusion_toy (formula in tests/goldens/README.md)."""
    u = (t.astype(x.dtype) / 1000).reshape(-1, 1, 1, 1)
    s = jnp.sqrt(1 - jnp.exp(-(0.1 * u + 9.95 * u * u)))
    noise = s * x + 0.1 * jnp.sin(2 * x + 5 * u) + 0.05 * jnp.roll(x, 1, -1) * jnp.cos(3 * u)
    variance = 0.9 * jnp.cos(1.5 * x + 4 * u) + 0.2 * x.mean((1, 2), keepdims=True)
    return jnp.concatenate([noise, variance], -1)


def relative_error(got, want):
    """Largest difference over the largest value of `want`; NaN if anything is."""
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def tiny_dit(goldens):
    """(meta, arrays, arch, float32 params) of diffusion_dit."""
    meta, state, arrays = load_nhwc(goldens / 'diffusion_dit.npz')
    side = meta['config']['input']
    return meta, arrays, *from_torch_state(state, heads=meta['config']['heads'], input_size=(side, side))


def to_torch_float64(tree, arch):
    """A parameter-shaped tree in torch layout. The converter is float32, so each value travels as two of
    them."""
    whole = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    coarse = jax.tree.map(lambda leaf: leaf.astype(np.float32), whole)
    rest = jax.tree.map(lambda a, b: (a - b).astype(np.float32), whole, coarse)
    coarse, rest = to_torch_state(coarse, arch), to_torch_state(rest, arch)
    return {key: coarse[key].astype(np.float64) + rest[key] for key in coarse}
