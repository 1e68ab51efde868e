"""Measures attention maps: the similarity of heads, and the rank of a head's map."""
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
SINGLE = float(np.finfo(np.float32).eps)
UNIFORM = 1e-5     # a map whose relative difference from the uniform one is smaller has no direction


@jax.jit
def head_similarity(maps_KNM: Array) -> tuple[Array, Array]:
    """(cosine, centred cosine): means over all pairs of different heads, float32; NaN for a single head.

    cosine: of the maps as vectors of N·M weights (LiT, arXiv 2501.12976, §4.1 and figure 10). Weights are
    positive, so even unrelated maps have a high cosine. centred: the same after subtracting 1/M, the weight
    of plain averaging, from each weight; pairs with a uniform map, which then has no direction, are left out.
    """
    flat_KF, uniform = maps_KNM.reshape(len(maps_KNM), -1), 1 / maps_KNM.shape[-1]
    least = UNIFORM * uniform * np.sqrt(flat_KF.shape[1])
    return _mean_cosine(flat_KF, 0.0), _mean_cosine(flat_KF - uniform, least)


def _mean_cosine(vectors_KF: Array, least: float) -> Array:
    norms_K = jnp.sqrt(jnp.square(vectors_KF).sum(-1))
    unit_KF = vectors_KF / jnp.where(norms_K > least, norms_K, jnp.nan)[:, None]
    cosines = jnp.einsum('kf,lf->kl', unit_KF, unit_KF, precision='highest')
    return jnp.nanmean(jnp.where(np.triu(np.ones(cosines.shape, bool), 1), cosines, jnp.nan))


def singular_values(matrices) -> np.ndarray:
    """[..., N, M] -> [..., min(N, M)], descending, in float64."""
    return np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)


def effective_rank(values) -> np.ndarray:
    """exp(entropy of the singular values / their sum) [..., r] -> [...] (Roy & Vetterli, EUSIPCO 2007).

    1 for a matrix of rank one, n for n equal singular values, at most the rank; 0 for a matrix of zeros."""
    values = np.asarray(values, np.float64)
    total = values.sum(-1, keepdims=True)
    p = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    entropy = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def numerical_rank(values, shape: tuple[int, int]) -> np.ndarray:
    """The number of singular values of [N, M] above max(N, M)·2^-23 times the largest: not 0 in float32."""
    values = np.asarray(values)
    return (values > values.max(-1, keepdims=True) * max(shape) * SINGLE).sum(-1)


def convolution_operator(kernel_kk1E, grid: tuple[int, int], channels) -> np.ndarray:
    """The depth-wise convolution of these channels of a head as matrices [C, N, N] on the N tokens of a grid.

    (M·v)[n] = Σ over the window around n of kernel·v, zeros outside the grid; without the bias."""
    kernel = np.asarray(kernel_kk1E, np.float64)[:, :, 0, list(channels)]
    rows, columns = grid
    reach = kernel.shape[0] // 2
    steps = np.arange(rows * columns)
    row, column = steps // columns, steps % columns
    down, right = row[None] - row[:, None] + reach, column[None] - column[:, None] + reach      # [to, from]
    inside = (down >= 0) & (down < kernel.shape[0]) & (right >= 0) & (right < kernel.shape[1])
    return np.moveaxis(np.where(inside[..., None], kernel[down.clip(0, kernel.shape[0] - 1),
                                                          right.clip(0, kernel.shape[1] - 1)], 0), -1, 0)


def same_time(t: float, count: int) -> np.ndarray:
    """The time t for each of `count` images [B]: int32 of a timestep, float32 of a time of a flow."""
    return np.full(count, t, np.int32 if isinstance(t, int) else np.float32)


def spread(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced numbers of 0..count-1, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
