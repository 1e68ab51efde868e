"""Compiler options (`compiler_options` of jax.jit) by which XLA is faster or leaner on a CPU; {} elsewhere,
and where this jaxlib does not know them."""
import functools

import jax
import numpy as np


def without_ynnpack() -> dict:
    """Matrix products by XLA itself in place of YNNPACK."""
    return _if_known('xla_cpu_experimental_ynn_fusion_type', '')


def least_memory() -> dict:
    """What a program computes is computed when it is needed. By default whatever can run at once is begun
    early: of a layer of int8 weights all kernels are then widened to floats together (T5-XXL: 0.81 GB in
        place of 0.39)."""
    return _if_known('xla_cpu_scheduler_type', 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED')


def wide_vectors() -> dict:
    """Vectors of 512 bits where the processor has them; the compiler's own choice is 256."""
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
