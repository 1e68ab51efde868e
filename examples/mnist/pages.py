"""Writes the results of the demo as text and as report.html."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples import ruler
from examples.mnist import lab, lab_pages
from examples.mnist.arms import ARMS, DEMO, Run
from examples.words import format_columns
from lit_jax.report.grids import make_grid, to_uint8
from lit_jax.report.html import INHERITANCE, Report, add_inheritance, loss_series
from lit_jax.runtime.json_file import read_json
from lit_jax.training.telemetry import read_lines

TEACHER = lab_pages.TEACHERS['cost'][1]


def table_rows(result: Mapping, recorded: Mapping) -> list[tuple[str, ...]]:
    """The teacher and the students of this run, then those of the lab, as recorded."""
    arms, teacher, known = lab_pages.by_arm(result), result['teacher'], lab_pages.by_arm(recorded)
    return [lab_pages.cells(TEACHER, [teacher], teacher),
            *(lab_pages.cells(ARMS[name].title, arms[name], teacher) for name in DEMO if name in arms),
            *(lab_pages.cells(f'recorded: {ARMS[name].title}', known[name], recorded['teacher'])
              for name in known if ARMS[name].group == 'cost'),
            *((f'recorded: {first}', *rest) for first, *rest in lab_pages.rows_of(recorded, 'flow'))]


def notes(result: Mapping) -> str:
    """How the figures were measured."""
    s = ruler.MNIST
    return (f'Fréchet distance of {ruler.COUNT:,} unguided samples to the 8,000 real training digits, in the '
            f'features of a classifier of real digits. The floor is that of as many real held-out digits: '
            f'{result["floor"]:.3f}. KID, beside it, is unbiased: 0 for real digits, on average. Class '
            f'accuracy of that classifier on the same samples (on real held-out digits: '
            f'{result["judge_accuracy"]:.3f}). {s.method}, {s.steps} steps, the same noise and classes. '
            f'Cost: multiply-accumulates of all stages, the teacher\'s forward passes too, over those of '
            f'the teacher\'s training.')


def figures_as_text(result: Mapping, recorded: Mapping) -> str:
    """The tables for a terminal."""
    header, rows = block_table(result)
    return '\n'.join(['', *format_columns([lab_pages.HEADER, *table_rows(result, recorded)]), '',
                      notes(result), '', *format_columns([header, *rows])])


def block_table(result: Mapping) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows): time and memory of a block of both, by the number of tokens."""
    both: dict[int, dict[str, Mapping]] = {}
    for block in result['blocks']:
        both.setdefault(block['tokens'], {})[block['name']] = block
    rows = [(f'{tokens:,}', *(f'{blocks[name][key]:.1f}' for key in ('milliseconds', 'megabytes')
                              for name in ('teacher', 'student')),
             f'{blocks["teacher"]["milliseconds"] / blocks["student"]["milliseconds"]:.1f}')
            for tokens, blocks in both.items()]
    return ('tokens', 'teacher ms', 'student ms', 'teacher MiB', 'student MiB', 'times as fast'), rows


def grid_of(images: np.ndarray) -> np.ndarray:
    """A grid with one class per column, enlarged three times."""
    return make_grid(images, columns=10, scale=3)


def write_demo_report(workdir: Path, runs: Sequence[Run], result: Mapping, recorded: Mapping) -> None:
    """report.html: figures, images side by side, score against cost, blocks, curves, what was inherited."""
    report = Report('From DiT to LiT on handwritten digits, for a twentieth of the cost')
    report.paragraph('A diffusion transformer is converted from a PyTorch checkpoint. Its students inherit '
                     'all its weights except the attention. First their mixers learn what its attention '
                     'returns (alignment), then the whole is distilled from its noise and variance, and '
                     'from what each of its blocks returns.')
    report.heading('Figures')
    report.table(lab_pages.HEADER, table_rows(result, recorded))
    report.paragraph(notes(result))
    report.paragraph('Recorded: ' + lab_pages.how(recorded).replace('`', ''))
    _add_images(report, workdir, runs)

    report.heading('Score against cost')
    own = {f'{ARMS[run.arm].title} (this run)': ([100 * one['cost']], [one['distance'] /
                                                                     result['teacher']['distance']])
           for run in runs for one in result['runs'] if one['arm'] == run.arm}
    report.curves(lab_pages.cost_series(recorded) | own, log_x=True, marker='o',
                  caption='lines: recorded, means over seeds; a point each: this run',
                  x_label="cost, % of the teacher's training", y_label="Fréchet distance / the teacher's")

    report.heading('The reason: a block by the number of tokens')
    header, rows = block_table(result)
    report.table(header, rows)
    report.paragraph('One image, float32, measured on this machine. These digits have 49 tokens, where '
                     'nothing is gained; an image of 1024 pixels has 4,096 in the latent space of a DiT. '
                     'Memory is what the program needs beside inputs and result: attention is computed in '
                     'pieces, so no map of all pairs is kept.')
    for key, unit in (('milliseconds', 'ms'), ('megabytes', 'MiB')):
        series = {name: tuple(zip(*[(block['tokens'], block[key]) for block in result['blocks']
                                    if block['name'] == name], strict=True))
                  for name in ('teacher', 'student')}
        report.curves(series, log_x=True, marker='o', caption=f'{unit} of one block', x_label='tokens',
                      y_label=unit)
    _add_training(report, runs)
    report.write(workdir / 'report.html')


def _add_images(report: Report, workdir: Path, runs: Sequence[Run]) -> None:
    report.heading('Images')
    real = ruler.everything('mnist', 'held_out')
    report.image(grid_of(to_uint8(real['image'][ruler.first_of_each(real['label'])])), 'real digits')
    models = {TEACHER: workdir / 'teacher'} | {ARMS[run.arm].title: run.path for run in runs}
    for title, path in models.items():
        report.image(grid_of(np.load(path / lab.SHOWN)), f'{title} (same noise, without guidance)')


def _add_training(report: Report, runs: Sequence[Run]) -> None:
    report.heading('Training')
    records = {run.arm: read_lines(run.path / 'metrics.jsonl') for run in runs}
    errors = sorted({name for line in records['align_5'] for name in line if name.startswith('align/error')})
    series = loss_series(records['align_5'], errors)
    layers = {f'block {int(name[-2:])}': points for name, points in series.items()}
    report.curves(layers, caption='alignment: squared error over the variance of the target, by block',
                  x_label='step', y_label='relative error')
    curves = {ARMS[arm].title: series for arm, lines in records.items()
              for series in loss_series(lines, ['loss/mse']).values()}
    report.curves(curves, caption='mean squared error of the noise', x_label='step', y_label='mse')
    report.heading('Inheritance')
    add_inheritance(report, read_json(runs[0].path / 'inheritance.json', INHERITANCE))
