"""Sana's linear attention (LiteLA; arXiv 2410.10629): ReLU features and a normaliser.

Unlike LiT's (`mixers/linear.py`) it adds nothing to the features, its epsilon of 1e-8 belongs to the sum over
the keys, not to their mean, and the convolution is in the Mix-FFN (`lit_jax.models.ffn`)."""
import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.layers import Array, Linear
from lit_jax.models.mixers.linear import bytes_of_sums, linear_attention
from lit_jax.models.mixers.mixer import Mixer
from lit_jax.models.mixers.softmax import QKV, QKV_PARTS, read_qkv
from lit_jax.models.partition import constrain
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown


class SanaAttention(Mixer):
    """o = relu(q)·(relu(k)ᵀv) / (relu(q)·Σ relu(k) + eps), then proj: [B, N, D] -> [B, N, D].

    Args:
        heads: width/32 in Sana's text-to-image models; 1 in the DyDi-LiT paper's Sana, by its GFLOPs.
        qkv_bias: none in Sana.
        eps: 1e-8 in the official block, 1e-15 in diffusers. A query with all features zero gives zero."""
    leaves, parts, published_ffn = QKV, QKV_PARTS, 'mix'
    state_bytes, read_torch = staticmethod(bytes_of_sums), staticmethod(read_qkv)
    usual_heads = 1

    def __init__(self, width: int, *, heads: int, qkv_bias: bool = False, eps: float = 1e-8,
                 dtype=jnp.float32, rngs: nnx.Rngs):
        if not eps > 0:
            raise UserError(f'mixer.eps must be positive, got {shown(eps)}: it prevents a division by zero')
        head = (heads, width // heads)
        self.dtype, self.eps = dtype, eps
        self.qkv = Linear(width, (3, *head), bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        """`grid` is not used: tokens carry their positions."""
        qkv = constrain(self.qkv(x_BND), 'batch', 'tokens', None, 'heads', None)
        acc = accumulator(self.dtype)
        q_BNKE, k_BNKE = (jax.nn.relu(qkv[:, :, i]).astype(acc) for i in range(2))
        eps = self.eps / x_BND.shape[1]      # linear_attention takes the keys' mean, not their sum
        return self.proj(linear_attention(q_BNKE, k_BNKE, qkv[:, :, 2], eps, shortest=True))
