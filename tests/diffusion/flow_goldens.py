"""Reads the golden files of flows in NHWC; the toy model of tests/goldens/README.md."""
import jax.numpy as jnp
import numpy as np
from goldens import weights

DTYPES = (jnp.float32, 2e-5), (jnp.float64, 1e-9)      # with the largest error, relative to the largest value


def load_flow(path):
    """(meta, arrays), images NHWC."""
    meta, _, arrays = weights.load(path)
    return meta, {name: np.moveaxis(value, -3, -1) if value.ndim >= 4 else value
                  for name, value in arrays.items()}


def toy_flow(x, t, labels=None, xp=jnp):
    """f of the README: a velocity; labels [B] with 1000 for none. xp: numpy, or jax's."""
    t = t.astype(x.dtype).reshape(-1, 1, 1, 1)
    f = (0.8 * xp.cos(1.3 * x + 2 * t) + 0.3 * xp.sin(2.1 * x - t) + 0.15 * x.mean((1, 2), keepdims=True)
         + 0.1 * xp.roll(x, 1, -1) * xp.cos(3 * t))
    if labels is not None:
        c = 0.3 * xp.sin(0.7 * labels.astype(x.dtype) + 0.2)
        f = f + c.reshape(-1, 1, 1, 1) * (1 + 0.5 * xp.sin(x))
    return f


def toy(prediction):
    """The toy as a model function of this prediction."""
    def model(x, t, cond):
        u = t.astype(x.dtype).reshape(-1, 1, 1, 1)
        noise = (1 - u) * x + u * toy_flow(x, t)
        return {'velocity': lambda: toy_flow(x, t, cond.get('label')), 'noise': lambda: noise,
                'score': lambda: -noise}[prediction]()

    return model
