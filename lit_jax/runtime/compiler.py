"""XLA options that make CPU programs faster or smaller; {} on other platforms and for unknown options."""
import functools

import jax
import numpy as np


def without_ynnpack() -> dict:
    """Computes matrix products with XLA itself instead of YNNPACK."""
    return _if_known('xla_cpu_experimental_ynn_fusion_type', '')


def least_memory() -> dict:
    """Starts each operation when its result is needed. By default XLA starts what it can early, and widens
    all int8 kernels of a layer to floats together (T5-XXL: 0.81 GB instead of 0.39)."""
    return _if_known('xla_cpu_scheduler_type', 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED')


def wide_vectors() -> dict:
    """Uses 512-bit vectors where the processor has them; the default is 256."""
    return _if_known('xla_cpu_prefer_vector_width', '512')


@functools.cache
def _if_known(name: str, value: str) -> dict:
    if jax.default_backend() != 'cpu':
        return {}
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value})(np.float32(0))
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return {name: value}
