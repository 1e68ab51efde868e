"""The dtype in which sums are taken."""
import jax.numpy as jnp


def accumulator(*values) -> jnp.dtype:
    """The dtype for sums, norms, losses and sampling states of these dtypes or arrays: at least float32."""
    return jnp.result_type(jnp.float32, *(getattr(value, 'dtype', value) for value in values))
