"""Reads the golden diffusion files in NHWC and compares with them."""
import jax.numpy as jnp
import numpy as np
from goldens import weights

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
