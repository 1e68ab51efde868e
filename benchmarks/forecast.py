"""Makes the table of forecasts of docs/run/forecast.md: what the TPU compiler expects of steps and of mixers.

    python -m benchmarks.forecast --recipes lit_xl,dit_xl --slices v5e:4x4
    python -m benchmarks.forecast --mixers linear,softmax --tokens 256,4096 --chips v5e
    python -m benchmarks.forecast --all

Needs the extra tpu, but no TPU; no TPU has confirmed the figures. Each row is kept when it is made, in
docs/run/forecast.json, and compared with the last one of its name: what got slower or faster by more than 2 %
is named. A recipe takes a minute or more to compile.
"""
import json
from pathlib import Path

from benchmarks.timing import make_parser
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.paths import write_text_atomic

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / 'docs/run/forecast.json', ROOT / 'docs/run/forecast.md'
MARKS = ('<!-- tables of benchmarks/forecast.py -->', '<!-- end of the tables -->')
RECIPES = ('lit_s', 'lit_xl', 'lit_xl_512', 'lit_t2i_1024', 'dit_xl')
SLICES = ('v5e:4x4', 'v6e:4x4', 'v5p:2x2x4')
CHIPS = {'v5e': 'v5e:1x1', 'v6e': 'v6e:1x1', 'v5p': 'v5p:2x2x1'}      # one device of each is compiled for
TOKENS = (256, 1024, 4096, 16384)
WIDTH = 1152
# One mixer of each system, with the heads of its XL size where that is published.
MIXERS: dict[str, dict] = {
          'softmax': {'heads': 16}, 'kv': {'name': 'softmax', 'heads': 16, 'compress': 2},
          'linear': {'heads': 4}, 'gla': {'heads': 36}, 'moh': {'heads': 16, 'shared': 6, 'routed': 6},
          'sana': {'heads': 36}, 'edit': {'heads': 1}, 'dydila': {'heads': 1}}
NOTICEABLE = 0.02


def recipe_row(name: str, topology: str, batch: int = 0) -> dict:
    """One recipe on a slice; batch: of all devices, 0: the recipe's."""
    from lit_jax.plan.plan import make_plan, plan_json
    from lit_jax.recipes.recipe import load_recipe
    config = load_recipe(name)
    if batch:
        config.train.batch_size = batch
    plan = plan_json(make_plan(config, topology))
    found = plan['forecast']
    if found is None:
        return {'refused': True, 'batch': plan['batch_size']}
    parts = {}
    for part in found['parts']:
        key = ('teacher: ' if part['teacher'] else '') + part['part']
        parts[key] = round(1e3 * part['seconds'], 3)
    return {'ms': 1e3 * found['seconds'], 'peak_ms': 1e3 * found['peak_seconds'], 'mfu': found['mfu'],
            'links_ms': 1e3 * found['link_seconds'], 'temporaries': plan['memory']['temporaries'],
            'batch': plan['batch_size'], 'parts': parts, 'fits': plan['fits'], 'compiler': plan['compiler']}


def mixer_row(name: str, tokens: int, chip: str) -> dict:
    """One mixer alone, forward, one image, bfloat16, beside its roofline: q, k, v and o read or written once
    at the published rate, its products at peak, whichever takes longer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lit_jax.models.macs import count_macs
    from lit_jax.models.mixers import build_mixer
    from lit_jax.plan.forecast import forecast
    from lit_jax.plan.topology import find_topology
    topology, side = find_topology(CHIPS[chip]), int(tokens ** 0.5)
    options = {'name': name, **MIXERS[name]}
    graphdef, state = nnx.split(nnx.eval_shape(
        lambda: build_mixer(options, WIDTH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arguments = nnx.to_pure_dict(state), jax.ShapeDtypeStruct((1, tokens, WIDTH), jnp.bfloat16)
    params, x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments)

    def run(params, x):
        return nnx.merge(graphdef, params)(x, (side, side))

    flops = 2 * count_macs(run, params, x)
    compiled = jax.jit(run).lower(params, x).compile()
    found = forecast(compiled.as_text(), topology.chip, flops)
    roofline = max(flops / topology.chip.peak_flops, 4 * tokens * WIDTH * 2 / topology.chip.hbm_rate)
    return {'ms': 1e3 * found.seconds, 'roofline_ms': 1e3 * roofline, 'mfu': found.mfu,
            'temporaries': compiled.memory_analysis().temp_size_in_bytes}


def keep(name: str, row: dict) -> str:
    """Writes a row into the kept ones: what to say about it beside the last one."""
    kept = read_json(KEPT, dict, absent={})
    last = kept.get(name)
    write_text_atomic(KEPT, json.dumps({**kept, name: row}, indent=1, sort_keys=True) + '\n')
    said = f'{name}: {row["ms"]:.2f} ms, MFU {row["mfu"]:.1%}' if 'ms' in row else f'{name}: refused'
    return said + compare(last, row)


def compare(last: dict | None, row: dict) -> str:
    """'; slower: 5 % (10.00 ms before), feed-forward 4.0 to 4.5 ms', or '' within 2 %."""
    if not last or 'ms' not in last or 'ms' not in row:
        return ''
    change = row['ms'] / last['ms'] - 1
    if abs(change) < NOTICEABLE:
        return ''
    said = f'; {"SLOWER" if change > 0 else "faster"} by {abs(change):.1%} ({last["ms"]:.2f} ms before)'
    before, after = last.get('parts', {}), row.get('parts', {})
    moved = {part: after.get(part, 0) - before.get(part, 0) for part in before.keys() | after.keys()}
    return said + ''.join(f', {part} {before.get(part, 0):.1f} to {after.get(part, 0):.1f} ms'
                          for part in sorted(moved, key=lambda part: -abs(moved[part]))[:3]
                          if abs(moved[part]) > 0.05)


def tables(kept: dict) -> str:
    """Markdown of all kept rows."""
    lines = ['**No TPU has confirmed these figures**: they are the compiler\'s own estimates.', '',
             '| recipe | slice | batch | compute ms | ms at peak | MFU | collectives ms, one after the '
             'other | the three longest parts |', '|' + '---|' * 8]
    for name, row in sorted(kept.items()):
        recipe, _, topology = name.partition(' on ')
        if topology.partition(':')[0] not in CHIPS or 'roofline_ms' in row:
            continue
        if 'ms' not in row:
            lines.append(f'| {recipe} | {topology} | {row["batch"]} | does not fit | | | | |')
            continue
        longest = sorted(row['parts'].items(), key=lambda part: -part[1])[:3]
        lines.append(f'| {recipe} | {topology} | {row["batch"]} | {row["ms"]:.1f} | {row["peak_ms"]:.1f} | '
                     f'{row["mfu"]:.1%} | {row["links_ms"]:.1f} | '
                     f'{", ".join(f"{part} {ms:.1f}" for part, ms in longest)} |')
    lines += ['', f'One mixer of width {WIDTH}, forward, one image, bfloat16:', '',
              '| mixer | tokens | chip | ms | roofline ms | times roofline | temporaries MiB |',
              '|' + '---|' * 7]
    rows = [(*name.rsplit(' ', 3), row) for name, row in kept.items() if 'roofline_ms' in row]
    for mixer, tokens, _, chip, row in sorted(rows, key=lambda row: (row[0], row[3], int(row[1]))):
        lines.append(f'| {mixer} | {int(tokens):,} | {chip} | {row["ms"]:.3f} | {row["roofline_ms"]:.3f} | '
                     f'{row["ms"] / row["roofline_ms"]:.2f} | {row["temporaries"] / 2**20:.1f} |')
    return '\n'.join(lines)


def write_page() -> None:
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = f'{before}{MARKS[0]}\n{tables(read_json(KEPT, dict, absent={}))}\n{MARKS[1]}{after}'
    write_text_atomic(PAGE, text)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--recipes', default='', help=f'comma separated; all: {",".join(RECIPES)}')
    parser.add_argument('--slices', default=','.join(SLICES), help='topologies for the recipes')
    parser.add_argument('--batch', type=int, default=0, help='of all devices; 0: of the recipe')
    parser.add_argument('--mixers', default='', help=f'comma separated; all: {",".join(MIXERS)}')
    parser.add_argument('--tokens', default=','.join(map(str, TOKENS)), help='squares')
    parser.add_argument('--chips', default=','.join(CHIPS), help='for the mixers')
    parser.add_argument('--all', action='store_true', help='all recipes and mixers')
    options = parser.parse_args()
    recipes = RECIPES if options.all else list(filter(None, options.recipes.split(',')))
    mixers = MIXERS if options.all else list(filter(None, options.mixers.split(',')))
    for recipe in recipes:
        for topology in options.slices.split(','):
            suffix = f' batch {options.batch}' if options.batch else ''
            row = recipe_row(recipe, topology, options.batch)
            print(keep(f'{recipe}{suffix} on {topology}', row), flush=True)
            write_page()
    for mixer in mixers:
        for tokens in map(int, options.tokens.split(',')):
            for chip in options.chips.split(','):
                print(keep(f'{mixer} {tokens} on {chip}', mixer_row(mixer, tokens, chip)), flush=True)
                write_page()


if __name__ == '__main__':
    main()
