"""Plans recipes for TPU slices and prints the table of docs/run/plans.md; needs the extra tpu, but no TPU.

    python -m benchmarks.plans --recipes lit_xl,lit_l --slices v5e:4x4,v5e:16x16
    python -m benchmarks.plans --recipes lit_xl_512+mesh.tensor=2 --slices v6e:16x16
    python -m benchmarks.plans --recipes lit_xl,dit_xl --smallest v5e,v6e,v5p --write docs/run/plans.md

A recipe is a name in configs/; `+field=value` changes its fields. `--smallest` finds the smallest slice of a
chip that the recipe fits on. `--write` puts the table between the two marks of a file.
"""
import sys
from pathlib import Path

from benchmarks.timing import make_parser
from lit_jax.plan.plan import Plan, make_plan, verdict
from lit_jax.recipes.recipe import load_recipe
from lit_jax.runtime.chips import CHIPS
from lit_jax.runtime.errors import UserError

MARKS = ('<!-- table of benchmarks/plans.py -->', '<!-- end of the table -->')
HEADER = ('recipe', 'slice', 'hosts', 'mesh', 'batch', 'fits', 'peak GiB', 'arguments', 'temporaries',
          'PFLOP a step', 'ms at peak', 'collectives, MiB a device a step', 'compile s')      # as in the docs


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument('--recipes', required=True, help='comma separated: NAME or NAME+field=value+...')
    parser.add_argument('--slices', default='', help='topologies, comma separated: v5e:4x4,v6e:16x16')
    parser.add_argument('--smallest', default='', help='chips, comma separated: v5e,v5p')
    parser.add_argument('--write', default='', help='also put the table into this file')
    return parser.parse_args()


def read_recipe(text: str):
    """The recipe of 'lit_xl+mesh.tensor=2'; the value gets the type of the field."""
    name, *changes = text.split('+')
    config = load_recipe(name)
    for change in changes:
        path, value = change.split('=', 1)
        *sections, field = path.split('.')
        section = config
        for part in sections:
            section = section[part]
        kind = type(section[field])
        section[field] = value.lower() == 'true' if kind is bool else kind(value)
    return config


def plan_row(recipe: str, topology: str) -> tuple[str, Plan | None]:
    """(a row of the table, the plan); None for a recipe that cannot be sharded over this slice."""
    try:
        plan = make_plan(read_recipe(recipe), topology)
    except UserError as error:
        reason = ' '.join(str(error).split())
        print(f'{recipe} on {topology}: {reason}', file=sys.stderr, flush=True)
        return f'| {recipe} | {topology} | | | | no | {reason} | | | | | | |', None
    print(f'{recipe} on {topology}: {verdict(plan)}, compiled in {plan.compile_seconds:.0f} s',
          file=sys.stderr, flush=True)
    memory = plan.memory
    mesh = ' '.join(f'{axis} {n}' for axis, n in plan.mesh.items() if n > 1) or 'one device'
    cells = (recipe, topology, plan.topology.hosts or '', mesh, plan.config.train.batch_size,
             'yes' if plan.fits else 'no',
             f'{gib(memory.peak)} of {plan.topology.usable_memory / 2**30:.2f}', gib(memory.arguments),
             gib(memory.temporaries), f'{plan.flops / 1e15:.2f}', f'{1e3 * plan.peak_seconds:.1f}'
             if plan.peak_seconds else '', collectives_cell(plan), f'{plan.compile_seconds:.0f}')
    return '| ' + ' | '.join(map(str, cells)) + ' |', plan


def gib(size: float) -> str:
    return f'{size / 2**30:.1f}'


def collectives_cell(plan: Plan) -> str:
    """'all-gather fsdp 812, all-reduce fsdp 120', the largest first."""
    if plan.collectives is None:
        return ''
    totals: dict[str, int] = {}
    for c in plan.collectives:
        name = f'{c.kind} {"·".join(c.axes)}'
        totals[name] = totals.get(name, 0) + c.total_bytes
    shown = [(name, total) for name, total in sorted(totals.items(), key=lambda item: -item[1])
             if total >= 2**20]
    return ', '.join(f'{name} {total / 2**20:,.0f}' for name, total in shown) or 'under 1'


def smallest_rows(recipe: str, chip_name: str) -> list[str]:
    """Rows of the smallest slice that fits and of the one before it."""
    chip = next((chip for chip in CHIPS if chip.name == chip_name and chip.shapes), None)
    if chip is None:
        sys.exit(f'unknown TPU {chip_name!r}; known: {", ".join(c.name for c in CHIPS if c.shapes)}')
    rows = []
    for shape in chip.shapes:
        row, plan = plan_row(recipe, f'{chip_name}:{shape}')
        rows.append(row)
        if plan is not None and plan.fits:
            break
    return rows[-2:]


def write_table(path: Path, table: str) -> None:
    text = path.read_text()
    if any(text.count(mark) != 1 for mark in MARKS):
        sys.exit(f'{path} must contain each of these two lines once:\n' + '\n'.join(MARKS))
    before, rest = text.split(MARKS[0])
    path.write_text(before + MARKS[0] + '\n' + table + '\n' + MARKS[1] + rest.split(MARKS[1])[1])


def main() -> None:
    arguments = parse_arguments()
    lines = ['| ' + ' | '.join(HEADER) + ' |', '|' + '---|' * len(HEADER)]
    print('\n'.join(lines), flush=True)
    for recipe in arguments.recipes.split(','):
        found = [row for chip in filter(None, arguments.smallest.split(','))
                 for row in smallest_rows(recipe, chip)]
        found += [plan_row(recipe, topology)[0] for topology in filter(None, arguments.slices.split(','))
                  if not any(f'| {topology} |' in row for row in found)]
        print('\n'.join(found), flush=True)      # each recipe when it is done: all of them take long
        lines += found
    if arguments.write:
        write_table(Path(arguments.write), '\n'.join(lines))


if __name__ == '__main__':
    main()
