"""Tables and plots of the lab's results, for the docs and for the demo's report."""
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.mnist.arms import ARMS, BASES, WITH_FEW
from lit_jax.report.html import CURVE_COLOURS
from lit_jax.runtime.paths import write_bytes_atomic, write_text_atomic

TEACHERS = {'cost': ('teacher', 'DiT, the teacher'), 'flow': ('teacher_flow', 'flow teacher')}
BEGIN, END = '<!-- the lab writes from here -->', '<!-- to here -->'
HEADER = ('student', 'cost', 'steps (aligning + training)', 'Fréchet distance', 'of each seed', '× teacher',
          'KID', 'class accuracy')
# Lines of the plot of score against cost.
LINES = {'aligned and distilled': ('align_2', 'align_5', 'align_10'),
         'hybrid (third block softmax)': ('hybrid_2', 'hybrid_5'),
         "LiT's recipe, falling rate": ('fall_2', 'fall_5', 'fall_10', 'fall_full'),
         "LiT's recipe": ('lit_2', 'lit_5', 'lit_10', 'lit_full'), 'from scratch': ('scratch_5',)}
# Guidelines of LiT: what the paper finds, by group of ARMS.
CLAIMS = {
    'mixer': 'A 5x5 convolution on the values is what ReLU attention lacks; focusing adds nothing to it.',
    'heads': 'A few heads are enough.',
    'teacher': 'A teacher that was trained for longer gives a better student.',
    'copy': 'Inherit everything but the attention: its projections need not be copied.',
    'loss': 'Distilling noise and variance beats noise alone, and that beats no distillation.'}
FLOW = ('The same network with a velocity as its prediction (`configs/mnist_flow.py`: the linear path, '
        'rotary positions), trained for as many steps; its students are `configs/mnist_lit.py:flow`. '
        'Drawn by the ODE with `euler`, as many evaluations as `ddpm` has; figures over this teacher.')
TITLES = {'mixer': 'The mixer', 'heads': 'Heads', 'teacher': 'The teacher', 'copy': 'What is copied',
          'loss': 'The loss'}


def by_arm(results: Mapping) -> dict[str, list[dict]]:
    """{arm: its finished runs}, in the order of ARMS."""
    arms: dict[str, list[dict]] = {}
    for run in results['runs']:
        arms.setdefault(run['arm'], []).append(run)
    return arms


def mean(runs: Sequence[Mapping], name: str = 'distance') -> float:
    return float(np.mean([run[name] for run in runs]))


def cells(title: str, runs: Sequence[Mapping], teacher: Mapping) -> tuple[str, ...]:
    """A row under HEADER."""
    each = ' / '.join(f'{run["distance"]:.3f}' for run in runs)
    first = runs[0]
    steps = f'{first["align_steps"]:,} + {first["steps"]:,}' if first.get('align_steps') else \
        f'{first.get("steps", 0):,}'
    share = f'{100 * first["cost"]:.1f}' if 'cost' in first else '100'
    return (title, share + '\N{NO-BREAK SPACE}%', steps, f'{mean(runs):.3f}', each,
            f'{mean(runs) / teacher["distance"]:.2f}', f'{mean(runs, "kid"):.4f}',
            f'{mean(runs, "accuracy_unguided"):.3f}')


def teacher_of(results: Mapping, group: str) -> Mapping:
    """The figures of the teacher that the arms of a group are compared with; {} before they are measured."""
    return results.get(TEACHERS.get(group, TEACHERS['cost'])[0], {})


def rows_of(results: Mapping, group: str) -> list[tuple[str, ...]]:
    """Rows of the finished arms of a group, its teacher or its base first."""
    arms, teacher = by_arm(results), teacher_of(results, group)
    if not teacher:
        return []
    first = [cells(TEACHERS[group][1], [teacher], teacher)] if group in TEACHERS else []
    named = {name: ARMS[name].title for name in ARMS if ARMS[name].group == group}
    if group in BASES:
        named = {BASES[group][0]: BASES[group][1], **named}
    return first + [cells(title, arms[name], teacher) for name, title in named.items() if name in arms]


def few_steps(results: Mapping) -> list[tuple[str, ...]]:
    """Header and rows: distances by the number of evaluations of the model, means over seeds."""
    arms = {name: [results[name]] for name in WITH_FEW if name in results} | by_arm(results)
    measured = {name: [{**run['few'], '25': run['distance']} for run in arms.get(name, ()) if 'few' in run]
                for name in WITH_FEW}
    counts = sorted({count for runs in measured.values() for run in runs for count in run}, key=int)
    rows = [(WITH_FEW[name], *(f'{mean(runs, count):.3f}' for count in counts))
            for name, runs in measured.items() if runs]
    return [('Fréchet distance with so many evaluations', *counts), *rows] if rows else []


def verdict(results: Mapping, group: str) -> str:
    """The change of each arm of a group against its base, in words; differences within the spread are named
    so. The spread is the standard error of a difference of means, from the seeds of both."""
    arms, base, parts = by_arm(results), BASES[group][0], []
    for name in (name for name in arms if ARMS[name].group == group and base in arms):
        runs, other = ([run['distance'] for run in arms[one]] for one in (name, base))
        if ARMS[name].row == 'aligned':      # compared with the aligned student
            other = [run['distance'] for run in arms.get('align_5', ())] or other
        change = np.mean(runs) / np.mean(other) - 1
        if min(len(runs), len(other)) < 2:
            parts.append(f'{ARMS[name].title}: {change:+.0%} (one seed)')
            continue
        spread = np.hypot(np.std(runs, ddof=1) / len(runs) ** 0.5,
                          np.std(other, ddof=1) / len(other) ** 0.5) / np.mean(other)
        seen = 'within the spread' if abs(change) < 2 * spread else 'worse' if change > 0 else 'better'
        parts.append(f'{ARMS[name].title}: {change:+.0%} ± {spread:.0%}, {seen}')
    return '; '.join(parts)


def cost_series(results: Mapping) -> dict[str, tuple[list, list]]:
    """{line: (costs in per cent, distances over the teacher's)}, means over seeds."""
    arms, teacher = by_arm(results), results['teacher'].get('distance')
    series = {}
    for line, names in LINES.items():
        points = [(100 * arms[name][0]['cost'], mean(arms[name]) / teacher) for name in names if name in arms]
        if points:
            series[line] = tuple(map(list, zip(*points, strict=True)))
    return series


def draw_cost(results: Mapping) -> bytes:
    """PNG of score against cost: every seed, and lines through the means."""
    figure = Figure(figsize=(7.0, 4.0), layout='constrained')
    axes, arms, teacher = figure.subplots(), by_arm(results), results['teacher']['distance']
    for (line, (xs, ys)), colour in zip(cost_series(results).items(), CURVE_COLOURS, strict=False):
        axes.plot(xs, ys, 'o-', label=line, color=colour, linewidth=1.4, markersize=4)
        for name in LINES[line]:
            for run in arms.get(name, ()):
                axes.plot(100 * run['cost'], run['distance'] / teacher, '.', color=colour, alpha=0.45)
    axes.axhline(1, color='#555555', linewidth=0.8, linestyle='--')
    axes.set(xscale='log', yscale='log', xlim=(1, 40),
             xlabel="cost: FLOPs of all stages, % of the teacher's training",
             ylabel="Fréchet distance over the teacher's")
    _plain_ticks(axes)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_guidelines(results: Mapping) -> bytes:
    """PNG with the students of each guideline as bars, every seed as a dot."""
    groups = [group for group in CLAIMS if len(rows_of(results, group)) > 1]
    figure = Figure(figsize=(9.0, 2.2 + 1.5 * len(groups)), layout='constrained')
    arms, teacher = by_arm(results), results['teacher']['distance']
    for axes, group in zip(np.ravel(figure.subplots(len(groups), 1, squeeze=False)), groups, strict=True):
        named = {BASES[group][0]: BASES[group][1],
                 **{name: ARMS[name].title for name in arms if ARMS[name].group == group}}
        named = {name: title for name, title in named.items() if name in arms}
        places = np.arange(len(named))
        axes.barh(places, [mean(arms[name]) / teacher for name in named], color='#9dbfdd', height=0.7)
        for place, name in zip(places, named, strict=True):
            axes.plot([run['distance'] / teacher for run in arms[name]], [place] * len(arms[name]), '.',
                      color='#0b5fa5')
        axes.set_yticks(places, named.values(), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(TITLES[group], fontsize=9, loc='left')
    figure.supxlabel("Fréchet distance over the teacher's, 5 % of its cost", fontsize=9)
    return _png(figure)


def write_docs(page: Path, results: Mapping) -> None:
    """Writes the tables between two marks of a Markdown page, and the plots beside it."""
    write_bytes_atomic(page.with_name('mnist_cost.png'), draw_cost(results))
    parts = ['![Score against cost](mnist_cost.png)', table('cost', results), how(results)]
    shown = [group for group in CLAIMS if len(rows_of(results, group)) > 1]
    if shown:
        write_bytes_atomic(page.with_name('mnist_guidelines.png'), draw_guidelines(results))
        parts += ['## The guidelines of LiT', '![The guidelines](mnist_guidelines.png)']
    for group in shown:
        parts += [f'### {TITLES[group]}', f'The paper: {CLAIMS[group]}', table(group, results),
                  f'Here, against "{BASES[group][1]}": {verdict(results, group)}.']
    if len(rows_of(results, 'flow')) > 1:
        parts += ['## A flow teacher', FLOW, table('flow', results), markdown(few_steps(results))]
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text_atomic(page, '\n\n'.join([before + BEGIN, *parts, END + after]))


def table(group: str, results: Mapping) -> str:
    return markdown([HEADER, *rows_of(results, group)])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, its header first."""
    header, *rows = lines
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (header, ('---',) * len(header), *rows))


def how(results: Mapping) -> str:
    """Command, seeds, versions and dates of the results."""
    runs = results['runs']
    if not runs:
        return 'nothing yet; `make lab` measures.'
    seeds = sorted({run['seed'] for run in results['runs']})
    dates = sorted({run['date'] for run in runs})
    versions = ', '.join(f'{name} {number}' for name, number in runs[-1]['versions'].items())
    return (f'`{results["command"]}`, {len(results["runs"])} students, seeds {", ".join(map(str, seeds))}; '
            f'{dates[0]}{f" to {dates[-1]}" if len(dates) > 1 else ""}; {versions}. The command of each run '
            f'is in `examples/mnist/recorded.json`.')


def _plain_ticks(axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter('{x:g}')
        axis.set_minor_formatter('{x:g}')
        axis.set_tick_params(which='minor', labelsize=7)
    axes.grid(alpha=0.25, which='both')


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=130)
    return buffer.getvalue()
