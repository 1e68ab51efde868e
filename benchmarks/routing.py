"""Times the routed projection of DyDi-LiT against one dense projection of the same size, in the same run.

    python -m benchmarks.routing  # 4,096 tokens, width 768, 7 projectors: under a minute on two cores
    python -m benchmarks.routing --projectors 1,3,7,15,31 --forms loop --skew

`routed` is the whole projection: router, sorting, the grouped product in the platform's form, and the gate.
The other rows are the grouped product alone, in each form of `lit_jax.models.mixers.grouped`. All take turns;
the table has minimum and median, and the minimum divided by that of the dense product. Forward + backward:
gradients of the tokens and of all weights. With --skew, nine of ten tokens take one projector. The values are
checked first, against products of single tokens.
"""
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import make_parser, take_turns
from lit_jax.models.layers import Linear
from lit_jax.models.mixers.grouped import FORMS, grouped_product
from lit_jax.models.mixers.routing import RoutedLinear


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument('--tokens', type=int, default=4096)
    parser.add_argument('--width', type=int, default=768)
    parser.add_argument('--projectors', default='7', help='numbers, comma separated')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--forms', default=','.join(FORMS),
                        help='forms of the grouped product to time on their own')
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--skew', action='store_true', help='nine of ten tokens take the first projector')
    return parser.parse_args()


def both_passes(function, params, x):
    """{'forward': compiled call, 'both': compiled call} of function(params, x); each waits for its result."""
    @jax.jit
    def both(params, x):
        y, pull = jax.vjp(function, params, x)
        return y, pull(y)

    forward = jax.jit(function)
    return {'forward': lambda: jax.block_until_ready(forward(params, x)),
            'both': lambda: jax.block_until_ready(both(params, x))}


def contenders(arguments, projectors):
    """{name: {'forward': ..., 'both': ...}}, each checked."""
    dtype, n, d = jnp.dtype(arguments.dtype), arguments.tokens, arguments.width
    routed = RoutedLinear(d, (1, d), projectors, dtype=dtype, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, n, d), dtype)
    index = routed.router(x).index_BN[0]
    if arguments.skew:
        index = jnp.where(jnp.arange(n) % 10 == 0, index, 0)
    bank = routed.kernel[...].reshape(projectors, d, d).astype(dtype)
    sample = np.arange(0, n, max(n // 64, 1))
    want = np.einsum('nd,ndf->nf', np.asarray(x[0, sample], np.float64),
                     np.asarray(bank, np.float64)[np.asarray(index)[sample]])

    graphdef, params = nnx.split(routed)
    dense_graphdef, dense_params = nnx.split(Linear(d, d, bias=False, dtype=dtype, rngs=nnx.Rngs(0)))
    found = {'dense': both_passes(lambda p, x: nnx.merge(dense_graphdef, p)(x), dense_params, x)}
    if not arguments.skew:
        found['routed'] = both_passes(lambda p, x: nnx.merge(graphdef, p)(x)[0], params, x)
    for form in filter(None, arguments.forms.split(',')):
        found[form] = both_passes(lambda bank, x, form=form: grouped_product(x, bank, index, form), bank,
                                  x[0])
    for name, calls in found.items():
        got = np.asarray(calls['forward'](), np.float64).reshape(n, d)[sample]
        calls['both']()
        error = np.abs(got - want).max() / np.abs(want).max()
        if name != 'dense' and error > (3e-2 if dtype == jnp.bfloat16 else 2e-5):
            raise SystemExit(f'{name} is wrong: relative error {error:.1e}')
    return found


def main():
    arguments = parse_arguments()
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.tokens} tokens, width '
          f'{arguments.width}, {arguments.dtype}{", skewed" if arguments.skew else ""}')
    for projectors in map(int, arguments.projectors.split(',')):
        found = contenders(arguments, projectors)
        calls = {(name, kind): call for name, both in found.items() for kind, call in both.items()}
        times = take_turns(calls, arguments.repeats, warm=False)
        print(f'\n{projectors} projectors {"min ms":>12} {"median":>9} {"of dense":>9}   forward + backward')
        for name in found:
            row = [f'{name:12}']
            for kind in ('forward', 'both'):
                least = min(times[name, kind])
                row.append(f'{least:9.1f} {statistics.median(times[name, kind]):9.1f} '
                           f'{least / min(times["dense", kind]):8.2f}x')
            print('   '.join(row))


if __name__ == '__main__':
    main()
