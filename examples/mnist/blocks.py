"""Time and memory of one block of the teacher and of its student against the number of tokens, measured here.

The reason for all of it: softmax attention compares every token with every other, linear attention sums them
up once."""
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.dit import Block
from lit_jax.models.network import inference_options

TOKENS = (64, 256, 1_024, 4_096, 9_216)      # square numbers
SECONDS = 0.5                                # of repeated calls of one block


def measure_blocks(archs: Mapping[str, Mapping], tokens=TOKENS) -> list[dict]:
    """[{'name', 'tokens', 'milliseconds', 'megabytes'}] of a block of each architecture, one image, float32.
    megabytes: what the program needs beside its inputs and its result."""
    return [{'name': name, 'tokens': count, **_measure(arch, count)}
            for count in tokens for name, arch in archs.items()]


def _measure(arch: Mapping, tokens: int) -> dict[str, float]:
    width, side = arch['width'], round(tokens ** 0.5)
    graph, state = nnx.split(Block(width, arch['mlp_ratio'], arch['mixer'], arch['ffn'], dtype=jnp.float32,
                                   rngs=nnx.Rngs(0)))

    def apply(state, x, c):
        return nnx.merge(graph, state)(x, c, (side, side))

    x = jax.random.normal(jax.random.key(0), (1, tokens, width))
    args = state, x, x[:, 0]
    program = jax.jit(apply, compiler_options=inference_options(arch['mixer']['name'], tokens, width)
                      ).lower(*args).compile()
    memory = program.memory_analysis()
    return {'milliseconds': 1e3 * _median(lambda: jax.block_until_ready(program(*args))),
            'megabytes': memory.temp_size_in_bytes / 2 ** 20 if memory else float('nan')}


def _median(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
