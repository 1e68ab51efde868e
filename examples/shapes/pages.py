"""Writes the results of the shapes demo as text and as report.html."""
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from examples.shapes import figures as shapes_figures
from examples.words import format_columns
from lit_jax.metrics.geneval.geneval_prompts import TASKS
from lit_jax.report.grids import make_sheet, save_png
from lit_jax.report.html import INHERITANCE, Report, add_inheritance, loss_series
from lit_jax.runtime.json_file import read_json
from lit_jax.training.telemetry import read_lines

TITLES = {'teacher': 'PixArt, the teacher', 'distilled': 'LiT, inherited and distilled',
          'aligned': 'LiT, aligned and distilled, 5 %',
          'scratch': 'LiT from scratch'}
# Two prompts of each task, not chosen by their images.
SHOWN = ('a circle', 'a triangle', 'a square and a triangle', 'a circle and a square', 'two circles',
         'four squares', 'a red triangle', 'a blue circle', 'a circle left of a square',
         'a triangle above a circle', 'a red circle and a blue square', 'a green triangle and a yellow '
                                                                        'circle')
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
                     f'{row["macs"] / 1e6:.1f}', *(f'{row[task]:.2f}' for task in TASKS),
                     f'{row["overall"]:.3f}' + (f' ({each})' if each else ''), f'{row["ratio"]:.2f}'))
    return rows


def notes(result: Mapping) -> str:
    """How the figures were measured."""
    s = result['samples']
    return (f'The tasks of GenEval with shapes: 84 prompts, {s["pictures"]} images of each ({s["singles"]} '
            'of a '
            f'single object), scored by GenEval\'s rules with an exact detector of rendered shapes. '
            f'{s["method"]}, {s["steps"]} steps, guidance {s["cfg_scale"]:g}, the same noise for all models.')


def figures_as_text(result: Mapping) -> str:
    """The table for a terminal."""
    return '\n'.join(['', *format_columns([header(), *table_rows(result)]), '', notes(result)])


def draw_sheet(workdir: Path, models: Mapping[str, Path]) -> np.ndarray:
    """Four images per prompt of each model, all from the same noise."""
    prompts = [prompt for prompt in SHOWN for _ in range(COLUMNS)]
    panels = []
    for name, path in models.items():
        pipeline = shapes_figures.open_pipeline(path, workdir / 'text_encoder')
        panels.append((TITLES[name], shapes_figures.draw(pipeline, prompts, [*range(COLUMNS)] * len(SHOWN))))
    return make_sheet(panels, COLUMNS, list(SHOWN), scale=5)


def write_report(workdir: Path, models: Mapping[str, Path], result: Mapping) -> None:
    """report.html and samples.png: the figures, images side by side, loss curves, and what was inherited."""
    report = Report('From PixArt to LiT: rendered shapes from captions')
    report.paragraph('A small text-to-image transformer and its text encoder are converted from PyTorch '
                     'checkpoints. A linear one inherits all its weights except the self-attention, and is '
                     'distilled from its noise and variance.')
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
    add_inheritance(report, read_json(models['distilled'] / 'inheritance.json', INHERITANCE))
    report.write(workdir / 'report.html')
