"""Measures how time and memory of the linear mixers grow with the number of tokens, forward + backward.

    python -m benchmarks.growth                    # about two minutes on two CPU cores
    python -m benchmarks.growth --sides 32,64,128 --width 256 --mixers linear,gla

The exponent compares the first and the last grid: 1 is linear in the tokens, 2 quadratic. Softmax attention
is measured up to --softmax_up_to tokens. All grids of a mixer take turns.
"""
import math
import statistics

from benchmarks.timing import make_parser, take_turns

MIXERS = {
    'linear': {'heads': 4}, 'sana': {'heads': 1}, 'edit': {'heads': 1}, 'gla': {'heads': 4},
    'dydila': {'heads': 1, 'projectors': 3, 'powers': 9, 'factors': 9}, 'softmax': {'heads': 4},
}


def parse_arguments():
    parser = make_parser(__doc__)
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
    """[(tokens, median milliseconds, MB of temporaries)] of each grid."""
    import jax
    sides = [side for side in sides if name != 'softmax' or side * side <= options.softmax_up_to]
    programs = {side: compiled(name, side, options.width) for side in sides}
    turns = {side: lambda program=program, arguments=arguments: jax.block_until_ready(program(*arguments))
             for side, (program, arguments) in programs.items()}
    take_turns(turns, 1, warm=False)
    times = take_turns(turns, options.repeats, warm=False)
    return [(side * side, statistics.median(times[side]),
             program.memory_analysis().temp_size_in_bytes / 1e6) for side, (program, _) in programs.items()]


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
