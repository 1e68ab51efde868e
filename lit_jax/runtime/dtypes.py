"""The dtype in which sums are taken."""
import jax.numpy as jnp


def accumulator(*values) -> jnp.dtype:
    """The dtype of sums, norms, losses and sampling states: the widest of these dtypes or arrays, at least
    float32."""
    return jnp.result_type(jnp.float32,
                           *(value.dtype if hasattr(value, 'dtype') else value for value in values))
