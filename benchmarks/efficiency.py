"""The efficiency figures of the papers, measured on whatever machine this runs on, next to what is published.

    python -m benchmarks.efficiency --figure lit_4       # LiT figure 4: a module, 256 to 2048 px
    python -m benchmarks.efficiency --figure lit_5       # heads: GMACs rise, latency does not (5 and 9)
    python -m benchmarks.efficiency --figure lit_9       # PixArt-Σ, compressed keys, LiT (tables 9, 10)
    python -m benchmarks.efficiency --figure dig         # resolution: DiT, DiG, U-DiG (DiG figure 2)
    python -m benchmarks.efficiency --figure dydi        # cost of the DyDi-LiT comparison (figure 1a)
    python -m benchmarks.efficiency --figure lit_4 --plan v5e      # the TPU compiler's forecast instead

Writes FIGURE.md and FIGURE.png into --out. On a CPU the smaller sizes, on an accelerator all of them; --tiny
takes the smallest only. Published figures are marked with their hardware; on other hardware only ratios and
exponents can be compared.
"""
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import make_parser, take_turns

PUBLISHED = {
    'lit_4': 'NVIDIA A100, DiT-S/2, batch 1 (LiT §3.2): linear nearly 9 times faster at 2048 px, memory '
             'about 14 GB to 4 GB',
    'lit_5': 'NVIDIA A100 and V100, batch 8 (LiT figures 5 and 9): GMACs rise as heads become fewer, latency '
             'does not',
    'lit_9': 'NVIDIA A100 40 GB, batch 1, 20 steps (LiT table 9): PixArt-Σ with compressed keys 4.38 s at '
             '1K and 32.16 s at 2K, LiT 3.93 s and 14.59 s: 10 % and 55 % less',
    'dig': 'DiG figure 2: DiG-S/2 trains 2.5 times faster than DiT-S/2 at 1792 px and saves 75.7 % of the '
           'memory (its hardware is not named beside the figure)',
    'dydi': 'GFLOPs (multiply-accumulates) of arXiv 2601.13683, table 1: DiT-S 6.06, DiG-S 5.92, '
            'Sana-S 5.97, EDiT 5.91, DyDi-LiT-S 5.98; DiT-B 10.50, Sana-B 10.38, DyDi-LiT-B 10.39'}


def compiled(function: Callable, arguments, plan: str):
    """(milliseconds or None, bytes of temporaries): measured here, or forecast for a chip."""
    import jax
    import jax.numpy as jnp
    if plan:
        from benchmarks.forecast import CHIPS
        from lit_jax.plan.forecast import forecast
        from lit_jax.plan.topology import find_topology
        topology = find_topology(CHIPS[plan])
        place = jax.sharding.SingleDeviceSharding(topology.devices[0])
        arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                                 arguments)
        program = jax.jit(function).lower(*arguments).compile()
        found = forecast(program.as_text(), topology.chip, 1.0)
        return 1e3 * found.seconds, program.memory_analysis().temp_size_in_bytes
    program = jax.jit(function).lower(*arguments).compile()

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return (0.02 * jax.random.normal(jax.random.key(0), leaf.shape)).astype(leaf.dtype)

    values = jax.tree.map(draw, arguments)
    turns = {'it': lambda: jax.block_until_ready(program(*values))}
    once = take_turns(turns, 1)['it'][0]
    repeats = 3 if once > 300 else 7
    return (statistics.median(take_turns(turns, repeats, warm=False)['it']),
            program.memory_analysis().temp_size_in_bytes)


def precision(plan: str):
    import jax
    import jax.numpy as jnp
    return jnp.float32 if not plan and jax.default_backend() == 'cpu' else jnp.bfloat16


def mixer_cost(name: str, heads: int, width: int, pixels: int, plan: str = '', batch: int = 1) -> dict:
    """One mixer, forward: {'ms', 'MiB', 'GMACs'}."""
    import jax
    from flax import nnx

    from lit_jax.models.macs import count_macs
    from lit_jax.models.mixers import build_mixer
    side, dtype = pixels // 16, precision(plan)
    options = {'name': name, 'heads': heads}
    graphdef, state = nnx.split(nnx.eval_shape(
        lambda: build_mixer(options, width, dtype=dtype, rngs=nnx.Rngs(0))))
    arguments = nnx.to_pure_dict(state), jax.ShapeDtypeStruct((batch, side * side, width), dtype)

    def run(params, x):
        return nnx.merge(graphdef, params)(x, (side, side))

    ms, size = compiled(run, arguments, plan)
    return {'ms': ms, 'MiB': size / 2**20, 'GMACs': count_macs(run, *arguments) / 1e9}


def network_cost(arch, plan: str = '', batch: int = 1, train: bool = False) -> dict:
    """One call of a network, or also the gradients of its weights: {'ms', 'MiB', 'GMACs'}."""
    import jax

    from lit_jax.models.cost import network_macs
    from lit_jax.models.network import Network
    network = Network(arch, dtype=precision(plan))
    inputs = network.example_inputs(batch)

    def loss(params, inputs):
        return network.apply(params, *inputs).astype('float32').mean()

    run = jax.grad(loss) if train else lambda params, inputs: network.apply(params, *inputs)
    ms, size = compiled(run, (network.abstract(), inputs), plan)
    return {'ms': ms, 'MiB': size / 2**20, 'GMACs': batch * network_macs(network) / 1e9}


def model_cost(name: str, width: int, pixels: int, depth: int, plan: str = '') -> dict:
    """One call of a DiT (softmax, heads of 64 or 72) or LiT (linear) of patch 2."""
    wide = width == 1152
    heads = {'softmax': 16 if wide else max(1, width // 64), 'linear': 4 if wide else 2}[name]
    return network_cost({'family': 'dit', 'depth': depth, 'width': width, 'patch': 2, 'channels': 4,
                         'input_size': [pixels // 8, pixels // 8], 'num_classes': 1000,
                         'mixer': {'name': name, 'heads': heads}}, plan)


# Each figure yields (series, x, row)


def lit_4(size: str, plan: str):
    """One module of DiT-S/2 and linear DiT-S/2."""
    for pixels in {'tiny': (256,), 'small': (256, 512, 1024), 'all': (256, 512, 1024, 1536, 2048)}[size]:
        for name, heads in (('softmax', 6), ('linear', 2)):
            yield name, pixels, mixer_cost(name, heads, 384, pixels, plan)


def lit_5(size: str, plan: str):
    """Linear attention of S and B (and L, XL) with different numbers of heads, 256 px, batch 8."""
    widths = {'tiny': (384,), 'small': (384, 768), 'all': (384, 768, 1024, 1152)}[size]
    for width in widths:
        for heads in (1, 2) if size == 'tiny' else (1, 2, 3, 4, 6, 12, 16):
            if width % heads == 0:
                yield f'width {width}', heads, mixer_cost('linear', heads, width, 256, plan, batch=8)


def lit_9(size: str, plan: str):
    """One call of the text-to-image backbones; 20 guided steps are 40 of them."""
    from benchmarks.backbone import networks
    depth = 28 if size == 'all' else 2
    for pixels in {'tiny': (256,), 'small': (512, 1024), 'all': (1024, 2048)}[size]:
        for name, network in networks(pixels, depth).items():
            yield f'{name}, {depth} blocks', pixels, network_cost(network.arch, plan)


def dig(size: str, plan: str):
    """A training pass (forward and backward) of DiT, DiG and U-DiG of size S."""
    from lit_jax import recipes
    from lit_jax.recipes.systems import system
    for pixels in {'tiny': (256,), 'small': (256, 512), 'all': (256, 512, 1024, 1792)}[size]:
        for name in ('dit', 'dig', 'udig'):
            config = system(recipes.default(), name, 's')
            config.data.image_size = pixels
            if size != 'all' and name != 'udig':
                config.model.depth = 2
            yield name, pixels, network_cost(recipes.architecture(config), plan, train=True)


def dydi(size: str, plan: str):
    """One call of the systems of the DyDi-LiT comparison."""
    from lit_jax import recipes
    from lit_jax.recipes.systems import system
    for name, own in (('dit', 'dydi_s'), ('sana', 's'), ('dydi_lit', 's')) if size == 'tiny' else (
            ('dit', 'dydi_s'), ('dig', 'dydi_s'), ('sana', 's'), ('edit', 's'), ('dydi_lit', 's'),
            ('dit', 'dydi_b'), ('sana', 'b'), ('dydi_lit', 'b')):
        config = system(recipes.default(), name, own)
        yield f'{name} {own}', 256, network_cost(recipes.architecture(config), plan)


FIGURES = {'lit_4': lit_4, 'lit_5': lit_5, 'lit_9': lit_9, 'dig': dig, 'dydi': dydi}


def table(figure: str, rows: list, machine: str) -> str:
    """Markdown; ratios are to the first series at the same x."""
    lines = [f'{FIGURES[figure].__doc__} {machine}.', '', f'Published: {PUBLISHED[figure]}.', '',
             '| series | px or heads | ms | to the first | temporaries MiB | GMACs |', '|' + '---|' * 6]
    first: dict = {}
    for series, x, row in rows:
        base = first.setdefault(x, row['ms'])
        lines.append(f'| {series} | {x} | {row["ms"]:.2f} | {row["ms"] / base:.2f} | {row["MiB"]:.0f} | '
                     f'{row["GMACs"]:.2f} |')
    exponents = []
    for series in dict.fromkeys(series for series, *_ in rows):
        own = [(x, row['ms']) for name, x, row in rows if name == series]
        if len(own) > 1 and figure != 'lit_5':
            (x0, y0), (x1, y1) = own[0], own[-1]
            exponent = math.log(y1 / y0) / math.log((x1 / x0) ** 2)
            exponents.append(f'{series}: time grows as tokens^{exponent:.2f}')
    return '\n'.join([*lines, '', *exponents]) + '\n'


def draw(figure: str, rows: list, path: Path) -> None:
    from matplotlib.figure import Figure
    found = Figure(figsize=(9, 3.5))
    axes = found.subplots(1, 2)
    for axis, field in zip(axes, ('ms', 'GMACs' if figure == 'lit_5' else 'MiB'), strict=True):
        for series in dict.fromkeys(series for series, *_ in rows):
            own = [(x, row[field]) for name, x, row in rows if name == series]
            axis.plot(*zip(*own, strict=True), marker='o', label=series)
        axis.set(xlabel='heads' if figure == 'lit_5' else 'pixels', ylabel=field, yscale='log')
    axes[0].legend(fontsize=7)
    found.tight_layout()
    found.savefig(path, dpi=120)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--figure', choices=list(FIGURES), required=True)
    parser.add_argument('--out', default='.', help='folder')
    parser.add_argument('--plan', default='', help='a chip to forecast for: v5e, v6e, v5p')
    parser.add_argument('--tiny', action='store_true')
    options = parser.parse_args()
    import jax
    if options.plan:
        machine = f'Forecast for {options.plan} by the TPU compiler; no TPU has confirmed it'
    else:
        machine = f'Measured on {jax.devices()[0].device_kind}, {precision("").__name__}'
    small = not options.plan and jax.default_backend() == 'cpu'
    size = 'tiny' if options.tiny else 'small' if small else 'all'
    rows = []
    for series, x, row in FIGURES[options.figure](size, options.plan):
        rows.append((series, x, row))
        print(f'{series} {x}: {row["ms"]:.2f} ms, {row["MiB"]:.0f} MiB, {row["GMACs"]:.2f} GMACs', flush=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f'{options.figure}.md').write_text(table(options.figure, rows, machine))
    draw(options.figure, rows, out / f'{options.figure}.png')


if __name__ == '__main__':
    main()
