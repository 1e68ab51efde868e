"""One call of the text-to-image backbone: LiT against PixArt-Σ, with and without compressed keys (LiT, table
9).

    python benchmarks/backbone.py --pixels 1024,2048 --depth 2 --repeats 3

Full width and 300 caption tokens, one image, float32, random weights, on the same cores in turn. `depth`
blocks stand for the 28 of the model: nothing but the embedders does not grow with them. Of the model with
compressed keys the later half of the blocks has them (28 blocks: 14 to 27, rate 2).
"""
import argparse
import statistics
import time


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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
        times = {name: [] for name in models}
        for repeat in range(args.repeats + 1):      # the first compiles
            for name, (call, params) in calls.items():
                began = time.perf_counter()
                jax.block_until_ready(call(params, x, t, cond))
                if repeat:
                    times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(own) for name, own in times.items()}
        for name, own in times.items():
            ratios = ' | '.join(f'{medians[name] / medians[other] - 1:+.0%}' for other in list(models)[:2])
            print(f'| {pixels} | {name} | {network_macs(models[name]) / 1e9:.0f} | {medians[name]:.2f} / '
                  f'{min(own):.2f} | {ratios} |', flush=True)


if __name__ == '__main__':
    main()
