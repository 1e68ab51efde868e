"""Times one call of LiT's text-to-image backbone against PixArt-Σ, also with compressed keys (LiT, table 9).

    python -m benchmarks.backbone --pixels 1024,2048 --depth 2 --repeats 3

Full width, 300 caption tokens, one image, float32, random weights; the models take turns. `depth` blocks
stand for the model's 28: all costs but the embedders' are proportional to them. Compressed keys are in the
later half of the blocks (of 28: 14 to 27, rate 2).
"""
import statistics

from benchmarks.timing import make_parser, take_turns


def networks(pixels: int, depth: int) -> dict:
    """{name: network} of the three models at a size."""
    from lit_jax import recipes
    from lit_jax.models.network import Network

    def network(mixer: str, stages=()):
        config = recipes.text_to_image(recipes.default(), pixels, mixer)
        config.model.update({'depth': depth, 'stages': tuple(stages)})
        return Network(recipes.architecture(config), scan_layers=False)

    halves = ({'depth': depth // 2}, {'depth': depth - depth // 2, 'mixer': {'compress': 2}})
    return {'PixArt-Σ': network('softmax'), 'PixArt-Σ, compressed keys': network('softmax', halves),
            'LiT': network('linear')}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--pixels', default='1024,2048')
    parser.add_argument('--depth', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    import jax
    import jax.numpy as jnp

    from lit_jax.models.cost import network_macs
    print('| pixels | model | GMACs | s, median / minimum | to PixArt-Σ | to compressed keys '
          '|\n|---|---|---|---|---|---|', flush=True)
    for pixels in map(int, args.pixels.split(',')):
        models = networks(pixels, args.depth)
        x, t, cond = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype),
                                  models['LiT'].example_inputs())
        calls = {name: (jax.jit(network.apply, compiler_options=network.inference_options()),
                        network.init(jax.random.key(0)))
                 for name, network in models.items()}
        def timed(name, calls=calls, inputs=(x, t, cond)):
            call, params = calls[name]
            return lambda: jax.block_until_ready(call(params, *inputs))

        turns = {name: timed(name) for name in calls}
        take_turns(turns, 1, warm=False)      # compiles
        times = {name: [milliseconds / 1e3 for milliseconds in own]
                 for name, own in take_turns(turns, args.repeats, warm=False).items()}
        medians = {name: statistics.median(own) for name, own in times.items()}
        for name, own in times.items():
            ratios = ' | '.join(f'{medians[name] / medians[other] - 1:+.0%}' for other in list(models)[:2])
            print(f'| {pixels} | {name} | {network_macs(models[name]) / 1e9:.0f} | {medians[name]:.2f} / '
                  f'{min(own):.2f} | {ratios} |', flush=True)


if __name__ == '__main__':
    main()
