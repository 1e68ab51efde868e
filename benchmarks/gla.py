"""Times the chunked form of gated linear attention against the recurrence, one token after the other.

    python -m benchmarks.gla                      # about a minute on two CPU cores
    python -m benchmarks.gla --heads 18 --tokens 1024,2048,4096,8192,16384 --skip_recurrence

Forward + backward: also the gradients of q, k, v and the gates. The two take turns. The exponents of time and
memory of the chunked form compare the first and the last number of tokens.
"""
import math
import statistics

from benchmarks.timing import make_parser, take_turns


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument('--tokens', default='1024,4096,16384')
    parser.add_argument('--heads', type=int, default=6, help='of 32 key and 64 value channels: 6 is DiG-S, '
                                                             '18 DiG-XL')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--recurrence_up_to', type=int, default=4096,
                        help='number of tokens; it stores a state for each')
    parser.add_argument('--skip_recurrence', action='store_true')
    return parser.parse_args()


def compiled(form, inputs):
    """{'forward', 'both'} -> compiled program."""
    import jax

    def both(q, k, v, g, cotangent):
        o, pull = jax.vjp(lambda *a: form(*a)[0], q, k, v, g)
        return o, pull(cotangent)

    return {'forward': jax.jit(lambda q, k, v, g, _: form(q, k, v, g)[0]).lower(*inputs).compile(),
            'both': jax.jit(both).lower(*inputs).compile()}


def inputs_of(tokens: int, arguments):
    import jax.numpy as jnp
    import numpy as np
    rng = np.random.default_rng(0)
    shape = (arguments.batch, tokens, arguments.heads)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(*shape, d)), jnp.float32) for d in (32, 32, 64, 64))
    g = jnp.asarray(np.log(rng.uniform(0.5, 1, size=q.shape)), jnp.float32)
    return q, k, v, g, cotangent


def main() -> None:
    arguments = parse_arguments()
    import jax

    from lit_jax.models.mixers.gla_chunked import chunked_gla, recurrent_gla
    print(f'{arguments.heads} heads of 32 and 64 channels, batch {arguments.batch}, float32; ms, median / '
          f'minimum')
    print('| tokens | pass | chunked | recurrence | recurrence / chunked, medians | minima | memory of '
          'chunked, MB |')
    print('|---|---|---|---|---|---|---|')
    grown = []
    for tokens in map(int, arguments.tokens.split(',')):
        inputs = inputs_of(tokens, arguments)
        forms = {'chunked': compiled(chunked_gla, inputs)}
        if tokens <= arguments.recurrence_up_to and not arguments.skip_recurrence:
            forms['recurrence'] = compiled(recurrent_gla, inputs)
        for name in ('forward', 'both'):
            taken = take_turns({form: lambda program=programs[name], inputs=inputs: jax.block_until_ready(
                program(*inputs)) for form, programs in forms.items()}, arguments.repeats)
            times = {form: (statistics.median(own), min(own)) for form, own in taken.items()}
            memory = forms['chunked'][name].memory_analysis().temp_size_in_bytes / 1e6
            cells = [f'{times[form][0]:.1f} / {times[form][1]:.1f}' if form in times else ''
                     for form in ('chunked', 'recurrence')]
            ratios = [f'{times["recurrence"][i] / times["chunked"][i]:.1f}' if 'recurrence' in times else ''
                      for i in (0, 1)]
            print(f'| {tokens} | {name} | {" | ".join([*cells, *ratios])} | {memory:.1f} |', flush=True)
        grown.append((tokens, times['chunked'][1], memory))
    if len(grown) > 1:
        first, last = grown[0], grown[-1]
        exponents = [math.log(last[i] / first[i]) / math.log(last[0] / first[0]) for i in (1, 2)]
        print(f'forward + backward, {first[0]} to {last[0]} tokens: time grows with exponent '
              f'{exponents[0]:.2f}, temporary memory with {exponents[1]:.2f}')


if __name__ == '__main__':
    main()
