"""What the shapes demo shows: the figures as text, and its report.html."""
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.shapes import figures as shapes_figures
from lit_jax.metrics.geneval.geneval_prompts import TASKS
from lit_jax.report.grids import make_sheet, save_png
from lit_jax.report.html import Report, add_inheritance, loss_series
from lit_jax.training.telemetry import read_lines

TITLES = {'teacher': 'PixArt, the teacher', 'distilled': 'LiT, inherited and distilled',
          'scratch': 'LiT from scratch'}
# Two prompts of each task; none of them was chosen by looking at images.
SHOWN = ('a circle', 'a triangle', 'a square and a triangle', 'a circle and a square', 'two circles',
         'four squares',
         'a red triangle', 'a blue circle', 'a circle left of a square', 'a triangle above a circle',
         'a red circle and a blue square', 'a green triangle and a yellow circle')
COLUMNS = 4


def header() -> tuple[str, ...]:
    return ('model', 'steps', 'parameters', 'MMACs', *(task.replace('_', ' ') for task in TASKS), 'overall',
            '× teacher')


def table_rows(result: Mapping) -> list[tuple]:
    """Means over the seeds, with the overall score of each seed in brackets."""
    rows = []
    for row in result['rows']:
        each = ' / '.join(f'{run["overall"]:.3f}' for run in row['runs']) if len(row['runs']) > 1 else ''
        rows.append((TITLES[row['name']], f'{row["steps"]:,}', f'{row["parameters"]:,}',
                     f'{row["macs"] / 1e6:.1f}',
                     *(f'{row[task]:.2f}' for task in TASKS),
                     f'{row["overall"]:.3f}' + (f' ({each})' if each else ''),
                     f'{row["ratio"]:.2f}'))
    return rows


def notes(result: Mapping) -> str:
    """How the figures were taken."""
    s = result['samples']
    return (f'The tasks of GenEval with shapes: 84 prompts, {s["pictures"]} images of each ({s["singles"]} '
            f'of a single object), '
            f'judged by GenEval\'s rules from an exact detector of rendered shapes. {s["method"]}, '
            f'{s["steps"]} steps, guidance {s["cfg_scale"]:g}, the same noise for all models.')


def figures_as_text(result: Mapping) -> str:
    """The table for a terminal."""
    lines = [header(), *table_rows(result)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ['  '.join(cell.ljust(w) if i == 0 else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]
    return '\n'.join(['', *text, '', notes(result)])


def draw_sheet(workdir: Path, models: Mapping[str, Path]) -> np.ndarray:
    """Four images a prompt of every model, all from the same noise."""
    prompts, seeds = [prompt for prompt in SHOWN
                      for _ in range(COLUMNS)], [seed for _ in SHOWN for seed in range(COLUMNS)]
    panels = [(TITLES[name], shapes_figures.draw(shapes_figures.open_pipeline(path, workdir / 'text_encoder'),
                                                 prompts, seeds))
              for name, path in models.items()]
    return make_sheet(panels, COLUMNS, list(SHOWN), scale=3)


def write_report(workdir: Path, models: Mapping[str, Path], result: Mapping) -> None:
    """report.html and samples.png: the figures, images side by side, loss curves, and what was inherited."""
    report = Report('From PixArt to LiT: rendered shapes from captions')
    report.paragraph('A small text-to-image transformer and its text encoder are converted from PyTorch '
                     'checkpoints; a linear one inherits all its weights but the self-attention, learns its '
                     'noise and variance, and is compared with it.')
    report.heading('Figures')
    report.table(header(), table_rows(result))
    report.paragraph(notes(result))
    report.heading('Images')
    sheet = draw_sheet(workdir, models)
    save_png(workdir / 'samples.png', sheet)
    report.image(sheet, 'the same prompts and noise')
    report.heading('Loss')
    records = {name: read_lines(path / 'metrics.jsonl') for name, path in models.items()
               if (path / 'metrics.jsonl').exists()}
    curves = {TITLES[name]: loss_series(lines, ['loss/mse'])['loss/mse'] for name, lines in records.items()}
    report.curves(curves, caption='mean squared error of the noise', x_label='step', y_label='mse')
    report.heading('Inheritance')
    add_inheritance(report, json.loads((models['distilled'] / 'inheritance.json').read_text()))
    report.write(workdir / 'report.html')
