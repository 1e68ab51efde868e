"""Keeps the scores of a folder: scores.json, its table scores.md and its plots scores.png."""
import io
import itertools
import json
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lit_jax.report.html import CURVE_COLOURS
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import read_json, sealed, unsealed
from lit_jax.runtime.paths import as_path, write_bytes_atomic, write_text_atomic
from lit_jax.sampling.card import SHAPE as CARD_SHAPE

ROWS, TABLE, PLOTS = 'scores.json', 'scores.md', 'scores.png'
# Metric -> (heading, digits after the point).
COLUMNS = {'fid': ('FID', 3), 'sfid': ('sFID', 3), 'is': ('IS', 2), 'kid': ('KID', 5), 'skid': ('sKID', 5),
           'precision': ('P', 4), 'recall': ('R', 4), 'density': ('density', 4), 'coverage': ('coverage', 4)}

# What the table needs of a row.
_ROW = {'id': str, 'scores': {str: (float, None)}, 'impossible?': {str: str}, 'notes?': [str], 'card': {
    'samples': {'name': str, 'count': int, 'card?': CARD_SHAPE},
    'reference': {'id': str, 'sha256': str, 'statistics': str},
    'features': {'flavour': str, 'sha256': str, 'precision': str},
    'settings': {'pr_mode': str, 'neighbours': int, 'inception_score': str}}}


def read_rows(folder) -> list[dict]:
    """The rows of scores.json, [] without one. UserError if the file is something else, or damaged."""
    path = as_path(folder) / ROWS
    try:
        rows = read_json(path, [_ROW], absent=[])
    except UserError as error:
        raise UserError(f'{path} is no list of scores of evaluate.py; give another --out, or move the file '
                        f'({error})') from error
    return [unsealed(row, f'{path}: row {number}') for number, row in enumerate(rows, 1)]


def keep_row(folder, row: dict) -> list[dict]:
    """Adds a row, or replaces the one with its id; writes all three files; returns all rows."""
    folder = as_path(folder)
    rows = [*({old['id']: old for old in read_rows(folder)} | {row['id']: row}).values()]
    written = [sealed(row) for row in rows]
    write_text_atomic(folder / ROWS, json.dumps(written, indent=1, allow_nan=False) + '\n')
    write_text_atomic(folder / TABLE, markdown(rows))
    if figure := plots(rows):
        write_bytes_atomic(folder / PLOTS, figure)
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """The table, and below it the settings that all rows share, and notes."""
    metrics = [name for name in COLUMNS if any(name in row['scores'] for row in rows)]
    about = [describe(row) for row in rows]
    shown = [key for key in about[0] if key in ('samples', 'N') or len({one[key] for one in about}) > 1]
    lines = format_table([*shown, *(COLUMNS[name][0] for name in metrics)],
                         [[*(one[key] for key in shown), *(_number(row, name) for name in metrics)]
                          for one, row in zip(about, rows, strict=True)])
    lines.append('')
    lines += [f'{key}: {about[0][key]}' for key in about[0] if key not in shown and about[0][key] != '']
    said = dict.fromkeys(f'{one["samples"]}: {text}' for one, row in zip(about, rows, strict=True)
                         for text in (*row.get('notes', ()), *(
                             f'{name} is not possible: {why}'
                             for name, why in (row.get('impossible') or {}).items())))
    return '\n'.join([*lines, *([''] if said else []), *said]) + '\n'


def describe(row: Mapping) -> dict[str, str]:
    """The settings of a row as short texts."""
    card, images = row['card'], row['card']['samples']
    recipe = images.get('card') or {}
    sampler, model, vae, drawn = (recipe.get(name) or {} for name in ('sampler', 'model', 'vae', 'pictures'))
    interval = sampler.get('cfg_interval') or [0, 1]
    # Cards of prompts name a checkpoint in 'weights', those of classes in 'provenance'.
    provenance = model.get('provenance') or {}
    step = provenance.get('step', (model.get('weights') or {}).get('step'))
    return {
        'samples': _text(images['name']), 'step': _text(step), 'N': _text(images['count']),
        'method': _text(sampler.get('method')), 'steps': _text(sampler.get('steps')),
        'cfg': _text(sampler.get('cfg_scale')), 'cfg channels': _text(sampler.get('cfg_channels')),
        'cfg interval': '' if interval == [0, 1] else '..'.join(f'{end:g}' for end in interval),
        'labels': _text(drawn.get('labels')), 'seed': _text(drawn.get('seed')),
        'weights': _text(provenance.get('weights')), 'VAE': _text(vae.get('id')),
        'reference': _text(card['reference']['id']),
        'reference sha256': _text(card['reference']['sha256'][:16]),
        'statistics': _text(card['reference']['statistics']),
        'features': _text(f'{card["features"]["flavour"]}, weights sha256 {card["features"]["sha256"][:16]}, '
                          f'precision {card["features"]["precision"]}'),
        'precision and recall': _text(f'{card["settings"]["pr_mode"]}, {card["settings"]["neighbours"]} '
                                      f'neighbours'),
        'inception score': _text(card['settings']['inception_score']),
    }


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table whose first `left` columns are aligned left, the others right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ['-' * width if i < left else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    return ['| ' + ' | '.join(cell.ljust(width) if i < left else cell.rjust(width)
                              for i, (cell, width) in enumerate(zip(row, widths, strict=True))) + ' |'
            for row in (head, rule, *rows)]


def _number(row: Mapping, name: str) -> str:
    value = row['scores'].get(name)
    return '-' if value is None else f'{value:.{COLUMNS[name][1]}f}'


def _text(value) -> str:
    """On one line: values may come from cards that others wrote."""
    text = '' if value is None else f'{value:g}' if isinstance(value, float) else str(value)
    return text if text.isprintable() else repr(text)[1:-1]


_AXES = {'cfg': 'guidance scale', 'steps': 'sampling steps', 'step': 'training step'}


def plots(rows: Sequence[dict]) -> bytes | None:
    """PNG of FID over guidance scale, sampling steps and training steps, each if it has two values or more.

    The points of a line differ in nothing else. None if there is nothing to plot."""
    panels = {key: lines for key in _AXES if (lines := _lines(rows, key))}
    if not panels:
        return None
    figure = Figure(figsize=(5.6 * len(panels), 4.0), layout='constrained')
    for axes, (key, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                  strict=True):
        for (name, points), colour in zip(lines.items(), itertools.cycle(CURVE_COLOURS), strict=False):
            axes.plot(*zip(*points, strict=True), 'o-', label=name, color=colour, linewidth=1.4, markersize=4)
        axes.set(xlabel=_AXES[key], ylabel=_distance(rows))
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=130, metadata={'Software': None})
    return buffer.getvalue()


def _distance(rows: Sequence[dict]) -> str:
    flavours = sorted({row['card']['features']['flavour'] for row in rows})
    inception = all('Inception' in flavour for flavour in flavours)      # only theirs is called FID
    return 'FID' if inception else f'Fréchet distance ({", ".join(flavours)})'


def _lines(rows: Sequence[dict], key: str) -> dict[str, list[tuple[float, float]]]:
    """{the other settings: (value of `key`, FID) in ascending order}, for lines of at least two points."""
    about = [describe(row) for row in rows]
    others = [name for name in about[0] if name != key and len({one[name] for one in about}) > 1]
    found: dict[str, list[tuple[float, float]]] = {}
    for one, row in zip(about, rows, strict=True):
        if one[key] and row['scores'].get('fid') is not None:
            name = ', '.join(one[other] if other == 'samples' else f'{other} {one[other]}'
                             for other in others if one[other])
            found.setdefault(name, []).append((float(one[key]), row['scores']['fid']))
    return {name: sorted(points) for name, points in found.items() if len({x for x, _ in points}) > 1}
