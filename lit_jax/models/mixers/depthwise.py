"""The depth-wise convolution of linear attention: one small kernel per channel, shared by all heads."""
import jax
import jax.numpy as jnp

from lit_jax.models.layers import Array


def depthwise_conv(x_BHWKE: Array, kernel_kk1E: Array, bias_E: Array) -> Array:
    """Each channel of each head with its own k x k kernel, zero padding: [B, H, W, K, E] -> the same."""
    reach = kernel_kk1E.shape[0] // 2
    b, h, w, *_ = x_BHWKE.shape
    padded = jnp.pad(x_BHWKE, ((0, 0), (reach, reach), (reach, reach), (0, 0), (0, 0)))
    y = jnp.broadcast_to(bias_E, x_BHWKE.shape)
    for i in range(2 * reach + 1):
        for j in range(2 * reach + 1):
            y = y + jax.lax.slice_in_dim(jax.lax.slice_in_dim(padded, i, i + h, axis=1), j, j + w, axis=2) * kernel_kk1E[i, j, 0]
    return y
