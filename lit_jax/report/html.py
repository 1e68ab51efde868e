"""Writes `report.html`: one self-contained page with the tables, curves and images of a run."""
import base64
import html
import io
import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lit_jax.runtime.image_errors import DECODE_ERRORS
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.paths import as_path, write_text_atomic

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto;
       padding: 0 1.5rem;
       color: #1c1c1c; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.6rem 0; }
th, td { padding: 0.25rem 0.8rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
p { max-width: 46rem; }
th { background: #f5f5f5; font-weight: 600; }
figure { display: inline-block; margin: 0.6rem 2rem 0.6rem 0; vertical-align: top; max-width: 100%; }
img { max-width: 100%; height: auto; }
figcaption { font-size: 0.9rem; color: #555; }
img.pixels { image-rendering: pixelated; }
.scroll { overflow: auto; max-height: 24rem; border: 1px solid #e4e4e4; }
pre { background: #f5f5f5; padding: 0.6rem; overflow: auto; font-size: 0.85rem; }"""
_PAGE, _NAMED = 1_200, 32      # pixels of the page's width; classes named below a grid
CURVE_COLOURS = ('#0b5fa5', '#c4500c', '#2b7a3d', '#7a3b9d', '#555555')


class Report:
    """Collects sections and writes them as one HTML file with its images, without scripts or links."""

    def __init__(self, title: str):
        self._title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f'<h2>{html.escape(text)}</h2>')

    def paragraph(self, text: str) -> None:
        self._parts.append(f'<p>{html.escape(text)}</p>')

    def preformatted(self, text: str) -> None:
        self._parts.append(f'<pre>{html.escape(text)}</pre>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence], *, scroll: bool = False) -> None:
        """A table; the first column is text, the others are right-aligned numbers."""
        def line(tag, cells):
            return '<tr>' + ''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells) + '</tr>'

        body = '<table>' + line('th', header) + ''.join(line('td', row) for row in rows) + '</table>'
        self._parts.append(f'<div class="scroll">{body}</div>' if scroll else body)

    def image(self, image: np.ndarray, caption: str, zoom: int = 1) -> None:
        """A uint8 image [H, W], [H, W, 1] or [H, W, 3], enlarged `zoom` times with hard pixels."""
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, format='PNG')
        self._figure(buffer, image.shape[1] * zoom, caption, 'class="pixels" ')

    def curves(self, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, caption: str,
               x_label: str, y_label: str, log_y: bool = True, log_x: bool = False, marker: str = '') -> None:
        """Lines through (xs, ys), one colour per name; `marker` ('o') also marks the points."""
        figure = Figure(figsize=(7.0, 3.4), layout='constrained')
        axes = figure.subplots()
        for (name, (xs, ys)), colour in zip(series.items(), itertools.cycle(CURVE_COLOURS), strict=False):
            axes.plot(xs, ys, label=name, color=colour, linewidth=1.4, marker=marker, markersize=4)
        axes.set(xlabel=x_label, ylabel=y_label, xscale='log' if log_x else 'linear',
                 yscale='log' if log_y else 'linear')
        axes.grid(alpha=0.25, which='both')
        axes.legend(frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png', dpi=130)
        self._figure(buffer, 700, caption)

    def _figure(self, png: io.BytesIO, width: int, caption: str, attributes: str = '') -> None:
        caption, source = html.escape(caption), base64.b64encode(png.getvalue()).decode('ascii')
        self._parts.append(f'<figure><img {attributes}width="{width}" alt="{caption}" '
                           f'src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>')

    def write(self, path) -> None:
        """Writes the page, whole or not at all. Its folder must exist."""
        title = html.escape(self._title)
        body = '\n'.join(self._parts)
        write_text_atomic(path, '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                                f'<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>\n'
                                f'{body}\n</body></html>\n')


def loss_series(records: Sequence[Mapping], names: Sequence[str]) -> dict[str, tuple[list, list]]:
    """{name: (steps, values)} of the metrics that appear in the records."""
    series = {}
    for name in names:
        points = [(record['step'], record[name]) for record in records if record.get(name) is not None]
        if points:
            series[name] = tuple(map(list, zip(*points, strict=True)))
    return series


INHERITANCE = {'rows': [{'path': str, 'shape': [int], 'count': int, 'status': str, 'source?': str}]}


def add_inheritance(report: Report, inheritance: Mapping) -> None:
    """The table of all parameters, inherited or fresh, and their totals."""
    rows = [(row['path'], tuple(row['shape']), f'{row["count"]:,}', row['status'], row.get('source') or '')
            for row in inheritance['rows']]
    totals = {status: sum(row['count'] for row in inheritance['rows'] if row['status'] == status)
              for status in ('inherited', 'fresh')}
    fixed = inheritance.get('fixed', 0)
    table = f', {fixed:,} of the fixed position table' if fixed else ''
    report.paragraph(f'{totals["inherited"]:,} parameters inherited, {totals["fresh"]:,} fresh{table}: '
                     f'{sum(totals.values()) + fixed:,} in all.')
    report.table(('leaf', 'shape', 'count', 'status', 'from'), rows, scroll=True)


def add_alignment(report: Report, records: Sequence[Mapping]) -> None:
    """The table "relative error by layer" of a run that aligned its mixers, if it did: at its first and its
    last record of that."""
    aligned = [record for record in records if any(name.startswith(_ALIGNED) for name in record)]
    first, last = (aligned[0], aligned[-1]) if aligned else ({}, {})
    names = [name for name in last if name.startswith(_ALIGNED) and name in first]
    if not names:
        return
    report.heading('Relative error by layer')
    report.paragraph('Alignment: squared error of each mixer over the variance of what its block of the '
                     "teacher's attention returns for the same tokens (1: no better than the best constant); "
                     f'means of the intervals up to step {first["step"]:,} and up to step {last["step"]:,}.')
    report.table(('layer', f'step {first["step"]:,}', f'step {last["step"]:,}'),
                 [*((name.removeprefix(_ALIGNED).lstrip('0') or '0', _number(first[name]),
                     _number(last[name])) for name in names),
                  ('mean', *(_number(np.mean([one[name] for name in names])) for one in (first, last)))])


_ALIGNED = 'align/error_'      # metrics of the stage, with the number of the block


def _figures(record: Mapping) -> dict[str, float]:
    """What can be drawn of a line of metrics.jsonl, which anybody may edit."""
    return {name: value for name, value in record.items()
            if isinstance(value, int | float) and abs(value) < 1e300}


def _number(value) -> str:
    return '' if value is None else f'{value:,.5g}'


def write_run_report(workdir, records: Sequence[Mapping], config: Mapping, *, shown: Sequence[str] = (),
                     following: Sequence[str] = ()) -> None:
    """The report of a training run: curves, newest sample grid, inherited parameters, and the recipe.
    shown: name of the class of each sample. following: commands to try next."""
    workdir = as_path(workdir)
    report, records = Report(config['recipe']['name'] or workdir.name), [_figures(line) for line in records]
    records = [record for record in records if 'step' in record]
    scored = [record for record in records if any(name.startswith('eval/') for name in record)]
    records = [record for record in records if record not in scored]
    if records:
        last = records[-1]
        report.heading('Current state')
        report.table(('metric', 'value'), [(name, f'{value:,.6g}' if isinstance(value, float) else value)
                                           for name, value in last.items() if '_q' not in name])
        report.heading('Loss')
        distilled = sorted(name for name in last if name.startswith('loss/distill_') and '_q' not in name)
        terms = ['loss/total', 'loss/align', 'loss/mse', 'loss/vb', 'loss/cosine', *distilled]
        terms += [name for name in last
                  if name.startswith('loss/') and '_q' not in name and name not in terms]
        report.curves(loss_series(records, terms), caption='each term, mean over an interval', x_label='step',
                      y_label='loss')
        term = distilled[0].removeprefix('loss/') if distilled else 'mse'
        quarters = loss_series(records, [f'loss/{term}_q{i}' for i in range(1, 5)])
        if quarters:      # alignment has none
            report.curves(quarters, caption=f'{term} by quarter of the timestep range (q1 = least noise)',
                          x_label='step', y_label='loss')
        add_alignment(report, records)
    if scored:
        report.heading('Scores')
        names = [name for name in scored[-1] if name.startswith('eval/')]
        report.table(('step', *(name.removeprefix('eval/') for name in names)),
                     [(f'{record["step"]:,}', *(_number(record.get(name)) for name in names))
                      for record in scored])
        for metric in dict.fromkeys(name.split('_cfg')[0] for name in names if '_cfg' in name):
            report.curves(loss_series(scored, [name for name in names if name.split('_cfg')[0] == metric]),
                          caption=f'{metric.removeprefix("eval/")} of EMA samples, by guidance scale',
                          x_label='step', y_label=metric.removeprefix('eval/'), log_y=False)
    samples = workdir / 'samples'
    grids = sorted(path for path in samples.iterdir() if path.suffix == '.png') if samples.is_dir() else []
    if grids:
        report.heading('Samples')
        _add_samples(report, grids[-1], shown)
    if following:
        report.heading('Next')
        report.preformatted('\n'.join(following))
    if (workdir / 'inheritance.json').exists():
        report.heading('Inheritance')
        add_inheritance(report, read_json(workdir / 'inheritance.json', INHERITANCE))
    report.heading('Recipe')
    report.preformatted(json.dumps(config['recipe'], indent=1))
    report.write(workdir / 'report.html')


def _add_samples(report: Report, path, shown: Sequence[str]) -> None:
    """The newest grid, over the width of the page; one that cannot be read is named in its place."""
    runs = [(name, len(list(equal))) for name, equal in itertools.groupby(shown)]
    names = ', '.join(name if count == 1 else f'{name} ({count})' for name, count in runs[:_NAMED])
    names = f': {names}{", ..." if len(runs) > _NAMED else ""}' if names else ''
    try:
        grid = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
        report.image(grid, f'EMA weights at step {int(path.stem):,}, row by row{names}',
                     zoom=max(1, _PAGE // grid.shape[1]))
    except DECODE_ERRORS:
        report.paragraph(f'{path.name} is damaged and cannot be shown')
