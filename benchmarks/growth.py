"""How time and memory of every linear mixer grow with the tokens, forward + backward, on this machine.

    python benchmarks/growth.py                    # about two minutes on two CPU cores
    python benchmarks/growth.py --sides 32,64,128 --width 256 --mixers linear,gla

The exponent is that of a power of the number of tokens between the first and the last grid: 1 is linear, 2
quadratic. Softmax attention stands beside them up to --softmax_up_to tokens. All in one process, in turn.
"""
import argparse
import math
import statistics
import time

MIXERS = {
    'linear': {'heads': 4}, 'sana': {'heads': 1}, 'edit': {'heads': 1}, 'gla': {'heads': 4},
    'dydila': {'heads': 1, 'projectors': 3, 'powers': 9, 'factors': 9}, 'softmax': {'heads': 4},
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sides', default='32,64,128', help='of the square token grids')
    parser.add_argument('--width', type=int, default=256)
    parser.add_argument('--mixers', default=','.join(MIXERS))
    parser.add_argument('--softmax_up_to', type=int, default=4096)
    parser.add_argument('--repeats', type=int, default=3)
    return parser.parse_args()


def compiled(name: str, side: int, width: int):
    """(program, arguments): a mixer's output and the gradients of its input and parameters."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lit_jax.models.mixers import build_mixer
    graphdef, params = nnx.split(build_mixer({'name': name, **MIXERS[name]}, width, dtype=jnp.float32,
                                             rngs=nnx.Rngs(0)))
    x, cotangent = (jax.random.normal(jax.random.key(i), (1, side * side, width)) for i in range(2))

    def both(params, x, cotangent):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, (side, side)), params, x)
        return y, pull(cotangent)

    arguments = params, x, cotangent
    return jax.jit(both).lower(*arguments).compile(), arguments


def measure(name: str, sides: list[int], options) -> list[tuple[int, float, float]]:
    """[(tokens, milliseconds, MB of temporaries)], the median of turns that go through all grids."""
    import jax
    sides = [side for side in sides if name != 'softmax' or side * side <= options.softmax_up_to]
    programs = [compiled(name, side, options.width) for side in sides]
    seconds = [[] for _ in sides]
    for turn in range(options.repeats + 1):
        for times, (program, arguments) in zip(seconds, programs, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:
                times.append(time.perf_counter() - began)
    return [(side * side, 1e3 * statistics.median(times), program.memory_analysis().temp_size_in_bytes / 1e6)
            for side, times, (program, _) in zip(sides, seconds, programs, strict=True)]


def exponent(points, column: int) -> float:
    (n, *first), (m, *last) = points[0], points[-1]
    return math.log(last[column] / first[column]) / math.log(m / n)


def main() -> None:
    options = parse_arguments()
    print(f'width {options.width}, float32, one image; ms and MB of temporaries, forward + backward')
    print('| mixer | tokens: ms, MB | time exponent | memory exponent |')
    print('|---|---|---|---|')
    for name in options.mixers.split(','):
        points = measure(name, [int(side) for side in options.sides.split(',')], options)
        cells = '; '.join(f'{tokens:,}: {ms:.1f}, {megabytes:.0f}' for tokens, ms, megabytes in points)
        print(f'| {name} | {cells} | {exponent(points, 0):.2f} | {exponent(points, 1):.2f} |', flush=True)


if __name__ == '__main__':
    main()
