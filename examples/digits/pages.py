"""Writes the results of the demo as text and as report.html."""
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.digits import figures
from lit_jax.checkpoint.load import load
from lit_jax.data.sources import open_source
from lit_jax.models.network import Model
from lit_jax.report.grids import make_grid, to_uint8
from lit_jax.report.html import INHERITANCE, Report, add_inheritance, loss_series
from lit_jax.runtime.json_file import read_json
from lit_jax.training.telemetry import read_lines

TITLES = {'teacher': 'DiT, the teacher', 'distilled': 'LiT, inherited and distilled',
          'inherited': 'LiT, inherited, not distilled', 'scratch': 'LiT from scratch'}
HEADER = ('model', 'steps', 'parameters', 'MMACs', 'Fréchet distance', '× teacher',
          'class accuracy', '× teacher')
SHOWN = 40    # images in a grid: four rows of the ten classes


def table_rows(result: Mapping) -> list[tuple]:
    """Means over the seeds, with the distance of each seed in brackets."""
    rows = []
    for row in result['rows']:
        each = ' / '.join(f'{run["distance"]:.2f}' for run in row['runs']) if len(row['runs']) > 1 else ''
        rows.append((TITLES[row['name']], f'{row["steps"]:,}', f'{row["parameters"]:,}',
                     f'{row["macs"] / 1e6:.2f}', f'{row["distance"]:.2f}' + (f' ({each})' if each else ''),
                     f'{row["distance_ratio"]:.2f}', f'{row["accuracy_unguided"]:.3f}',
                     f'{row["accuracy_unguided_ratio"]:.2f}'))
    return rows


def notes(result: Mapping) -> str:
    """How the figures were measured."""
    s = result['samples']
    return (f'Fréchet distance of {s["unguided"]:,} unguided samples to the 1,437 real training digits, in '
            f'the features of a classifier of real digits; floor (360 real held-out digits): '
            f'{result["floor"]:.2f}. Class accuracy of that classifier on the same samples (on real held-out '
            f'digits: {result["judge_accuracy"]:.3f}). {s["method"]}, {s["steps"]} steps, the same noise for '
            'all.')


def figures_as_text(result: Mapping) -> str:
    """The table for a terminal."""
    return '\n'.join(['', *format_columns([HEADER, *table_rows(result)]), '', notes(result)])


def format_columns(rows: list[tuple]) -> list[str]:
    """Lines of aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ['  '.join(cell.ljust(w) if i == 0 else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]


def grid_of(images: np.ndarray) -> np.ndarray:
    """A grid with one class per column, enlarged seven times."""
    return make_grid(to_uint8(images), columns=10, scale=7)


def write_demo_report(workdir: Path, teacher: Model, students: Mapping[str, Path], result: Mapping) -> None:
    """report.html: images side by side, the figures, loss curves, and what was inherited."""
    report = Report('From DiT to LiT on handwritten digits')
    report.paragraph('A diffusion transformer is converted from a PyTorch checkpoint. A linear one inherits '
                     'all its weights except the attention, and is distilled from its noise and variance.')
    report.heading('Figures')
    report.table(HEADER, table_rows(result))
    report.paragraph(notes(result))

    report.heading('Images')
    real = figures.all_of(open_source('digits', split='train'))
    columns = [np.flatnonzero(real['label'] == c)[:SHOWN // 10] for c in range(10)]
    report.image(grid_of(real['image'][np.stack(columns, axis=1).ravel()]), 'real digits')
    models = {'teacher': teacher} | {arm: load(path, scan_layers=False) for arm, path in students.items()}
    for name, model in models.items():
        report.image(grid_of(figures.draw(model, SHOWN, figures.CFG_SCALE)[0]),
                     f'{TITLES[name]} (same noise)')

    report.heading('Loss')
    records = {arm: read_lines(path / 'metrics.jsonl') for arm, path in students.items()}
    curves = {TITLES[arm]: loss_series(lines, ['loss/mse'])['loss/mse'] for arm, lines in records.items()}
    report.curves(curves, caption='mean squared error of the noise', x_label='step', y_label='mse')
    distilled = loss_series(records['distilled'], ['loss/distill_noise', 'loss/distill_variance', 'loss/vb'])
    report.curves(distilled, caption='the other terms of the distilled student', x_label='step',
                  y_label='loss')

    report.heading('Inheritance')
    add_inheritance(report, read_json(students['distilled'] / 'inheritance.json', INHERITANCE))
    report.write(workdir / 'report.html')
