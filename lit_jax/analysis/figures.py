"""Draws the figures of an analysis with matplotlib; `save` writes one as a PNG and returns its pixels."""
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from lit_jax.report.html import CURVE_COLOURS
from lit_jax.runtime.paths import write_bytes_atomic

DPI = 110
WIDTH = 8.8                    # inches; with DPI, the width of a page of the report
SMALLEST = 1e-8                # singular value that is drawn
MOST_NUMBERS = 80              # cells of a heat map that get numbers
MOST_COLUMNS = 32
BLUE, ORANGE, GREEN, PURPLE = CURVE_COLOURS[:4]
COLOURS = {'teacher': BLUE, 'student': ORANGE, 'model': ORANGE}


def save(figure: Figure, path) -> np.ndarray:
    """Writes a PNG; returns uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=DPI)
    write_bytes_atomic(path, buffer.getvalue())
    return np.asarray(Image.open(buffer).convert('RGB'))


def similarity(found: Mapping[str, Mapping], times: Sequence[str], unit: str) -> Figure:
    """Heat maps over layers and times, one row per model: cosine, and cosine without the uniform part."""
    depth = max(len(one['cosine'][0]) for one in found.values())
    height = len(found) * (0.9 + min(3.2, 0.28 * max(depth, 6)))
    figure = Figure(figsize=(WIDTH, height), layout='constrained')
    grid = figure.subplots(len(found), 2, squeeze=False)
    kinds = (('cosine', 'cosine', 0, 'viridis'),
             ('centred', 'weights minus the mean of their row', -1, 'RdBu_r'))
    for axes, (name, one) in zip(grid, found.items(), strict=True):
        for ax, (key, title, low, colours) in zip(axes, kinds, strict=True):
            values = np.array(one[key]).T
            image = ax.imshow(values, vmin=low, vmax=1, cmap=colours, aspect='auto')
            ax.set_title(f'{name} ({one["heads"]} heads): {title}', fontsize=9)
            _label(ax, times, len(values), unit, 'layer')
            _write_numbers(ax, values, image)
            figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _label(ax, columns, rows: int, x_label: str, y_label: str) -> None:
    ax.set_xticks(range(len(columns)), columns, fontsize=7, rotation=0 if len(columns) <= 10 else 90)
    every = -(-rows // 16)
    ax.set_yticks(range(0, rows, every), range(0, rows, every), fontsize=7)
    ax.set_xlabel(x_label, fontsize=8)
    ax.set_ylabel(y_label, fontsize=8)


def _write_numbers(ax, values, image) -> None:
    if values.size > MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            luminance = np.dot(image.cmap(image.norm(value))[:3], (0.299, 0.587, 0.114))
            ax.text(column, row, f'{value:.2f}', ha='center', va='center', fontsize=6.5,
                    color='black' if luminance > 0.5 else 'white')


def token_maps(found: Mapping[str, Mapping], clean, noised, token: tuple[int, int], grid: tuple[int, int],
               at: str) -> Figure:
    """One row per model: the image, clean and noised, and the map of each chosen layer, mean over heads."""
    figure, rows = _tiles(len(found), 2 + max(len(one['layers']) for one in found.values()))
    for axes, (name, one) in zip(rows, found.items(), strict=True):
        _image(axes[0], clean, f'{name}: image', token, grid)
        _image(axes[1], noised, f'at {at}', token, grid)
        for ax, layer, weights in zip(axes[2:], one['layers'], one['maps'], strict=False):
            _weights(ax, weights.mean(0), f'layer {layer}', token, grid)
    _colour_key(figure, rows)
    return figure


def token_heads(found: Mapping[str, Mapping], clean, token: tuple[int, int], grid: tuple[int, int],
                most: int = 8) -> Figure:
    """One row per model: the image, then each head of the middle one of the chosen layers."""
    middle = {name: len(one['layers']) // 2 for name, one in found.items()}
    columns = 1 + max(min(most, len(one['maps'][middle[name]])) for name, one in found.items())
    figure, rows = _tiles(len(found), columns)
    for axes, (name, one) in zip(rows, found.items(), strict=True):
        _image(axes[0], clean, f'{name}: layer {one["layers"][middle[name]]}', token, grid)
        for head, (ax, weights) in enumerate(zip(axes[1:], one['maps'][middle[name]], strict=False)):
            _weights(ax, weights, f'head {head}', token, grid)
    _colour_key(figure, rows)
    return figure


def _tiles(rows: int, columns: int):
    side = min(1.9, WIDTH / columns)
    figure = Figure(figsize=(WIDTH, rows * (0.94 * side + 0.32)), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis('off')
    return figure, axes


def _image(ax, pixels, title: str, token, grid) -> None:
    ax.imshow(pixels.squeeze(), cmap='gray', vmin=0, vmax=255, extent=(0, grid[1], grid[0], 0))
    _box(ax, token)
    ax.set_title(title, fontsize=8)


def _weights(ax, weights, title: str, token, grid) -> None:
    """Coloured from 0 (or a negative minimum) to the largest weight, whose ratio to 1/M is in the title."""
    ax.imshow(weights, cmap='turbo', vmin=min(0, weights.min()), vmax=weights.max(),
              extent=(0, grid[1], grid[0], 0))
    _box(ax, token)
    ax.set_title(f'{title}\nlargest {weights.max() * weights.size:.1f}/M', fontsize=7.5)


def _box(ax, token) -> None:
    for colour, width in (('white', 2.8), ('red', 1.4)):
        ax.add_patch(Rectangle((token[1], token[0]), 1, 1, fill=False, edgecolor=colour, linewidth=width))


def _colour_key(figure: Figure, axes) -> None:
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), cmap='turbo')
    bar = figure.colorbar(scale, ax=axes, ticks=(0, 1), shrink=0.6, aspect=30, pad=0.01)
    bar.ax.set_yticklabels(('0', 'largest'), fontsize=7)


RANK_COLOURS = {
    ('student', 'map'): ORANGE, ('student', 'with_convolution'): GREEN, ('teacher', 'map'): BLUE,
    ('teacher', 'with_convolution'): PURPLE, ('model', 'map'): ORANGE, ('model', 'with_convolution'): GREEN}


def rank(found: Mapping[str, Mapping], unit: str) -> Figure:
    """Left: effective rank by layer, mean and range over times. Right: singular values in the middle."""
    figure = Figure(figsize=(WIDTH, 3.4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for (name, key), colour in RANK_COLOURS.items():
        if key not in found.get(name, {}):
            continue
        one = found[name][key]
        values, spectrum = np.array(one['effective']), np.array(one['spectrum'])
        left.plot(values.mean(0), color=colour, linewidth=1.6, marker='o', markersize=3)
        left.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=colour, alpha=0.15,
                          linewidth=0)
        right.plot(range(1, len(spectrum) + 1), spectrum.clip(SMALLEST), color=colour, linewidth=1.6,
                   label=f'{name}: map' + ' + convolution' * (key != 'map'))
    _limits(left, found)
    left.set(xlabel='layer', ylabel='effective rank')
    right.set(xlabel='index of the singular value', ylabel='ratio to the largest', yscale='log')
    right.set_title(f'singular values of the middle layer, at the middle {unit}', fontsize=8)
    for ax in (left, right):
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
    right.legend(frameon=False, fontsize=7.5, loc='lower left')
    return figure


def _limits(ax, found: Mapping[str, Mapping]) -> None:
    """Lines at the number of tokens, and at the width of a head if that limits the rank of a map."""
    tokens = max(one['tokens'] for one in found.values())
    limits = {tokens: f'N = {tokens} tokens'} | {
        one['bound']: f'maximum for a map of the {name}: {one["bound"]}'
        for name, one in found.items() if one['bound'] < one['tokens']}
    for height, text in limits.items():
        ax.axhline(height, color='black', linewidth=0.8, linestyle=':')
        ax.text(0.99, height, text, transform=ax.get_yaxis_transform(), ha='right', va='bottom', fontsize=7)
    ax.set_ylim(0, tokens * 1.1)


TERMS = {'mse': 'mse', 'vb': 'vb (bits per dimension)', 'cosine': '1 - cosine'}
_OF_VARIANCE = {'vb': 'vb', 'distill_variance': 'raw variance', 'cosine': 'cosine'}      # drawn dashed


def losses(found: Mapping[str, Mapping], times: Sequence[float], unit: str) -> Figure:
    """Each term of each model; for two also their ratio and the squared difference of their outputs."""
    pair = 'ratio' in found
    models = [name for name in ('model', 'student', 'teacher') if name in found]
    terms = [term for term in TERMS if any(term in found[name] for name in models)]
    wide = max(len(terms), 2 if pair else 1)
    figure = Figure(figsize=(WIDTH, 5.6 if pair else 3.0), layout='constrained')
    axes = figure.subplots(2 if pair else 1, wide, squeeze=False)
    for ax in axes[0, len(terms):]:
        ax.axis('off')
    drawn = list(axes[0, :len(terms)])
    for ax, term in zip(drawn, terms, strict=True):
        for name in models:
            if term in found[name]:
                _curve(ax, times, found[name][term], name, COLOURS[name], '--' if name == 'teacher' else '-')
        ax.set_title(TERMS[term], fontsize=9)
        ax.set_yscale('log')
    if pair:
        for ax, part, title in ((axes[1, 0], 'ratio', 'student / teacher'),
                                (axes[1, 1], 'difference', 'mean of (student - teacher)²')):
            for term, values in found[part].items():
                name = _OF_VARIANCE.get(term, term.removeprefix('distill_'))
                _curve(ax, times, values, name, *((PURPLE, '--') if term in _OF_VARIANCE else (GREEN, '-')))
            ax.set_title(title, fontsize=9)
            drawn.append(ax)
        axes[1, 0].axhline(1, color='black', linewidth=0.8, linestyle=':')
        axes[1, 1].set_yscale('log')
    for ax in drawn:
        ax.set_xlabel(unit, fontsize=8)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=7.5)
        ax.tick_params(labelsize=7)
    return figure


def _curve(ax, times, values: Mapping, label: str, colour: str, style: str) -> None:
    """A line with a band of two standard errors; the band stays above 0 for the logarithmic axis."""
    mean, error = np.array(values['mean']), np.nan_to_num(np.array(values['error'], float))
    ax.plot(times, mean, label=label, color=colour, linestyle=style, linewidth=1.4)
    ax.fill_between(times, np.maximum(mean - 2 * error, mean / 10), mean + 2 * error, color=colour,
                    alpha=0.18, linewidth=0)


def routing(found: Mapping[str, Mapping], class_names: Sequence[str]) -> Figure:
    """One panel per routed part: the most frequent choice of each class; stronger colour: a larger share."""
    rows = -(-len(found) // 2)
    figure = Figure(figsize=(WIDTH, rows * (0.9 + 0.2 * max(len(class_names), 4))), layout='constrained')
    axes = figure.subplots(rows, min(2, len(found)), squeeze=False).flatten()
    for ax in axes[len(found):]:
        ax.axis('off')
    for ax, (name, one) in zip(axes, found.items(), strict=False):
        choice, share = np.array(one['choice']), np.array(one['share'])
        ax.imshow(choice % len(matplotlib.colormaps['tab10'].colors), cmap='tab10', vmin=0, vmax=9,
                  aspect='auto', alpha=share, interpolation='nearest')
        for (row, column), value in np.ndenumerate(choice):
            if choice.shape[1] <= MOST_COLUMNS:
                ax.text(column, row, value, ha='center', va='center', fontsize=7)
        ax.set_title(name, fontsize=9)
        _label(ax, range(choice.shape[1]), len(choice), 'layer', '')
        ax.set_yticks(range(len(choice)), class_names, fontsize=7)
    return figure


def linearize(found: Mapping) -> Figure:
    """Left: the error of each block, by whether it keeps its attention. Right: mean error that is left, and
    the cost, by the number of blocks that keep theirs; the choice is marked."""
    figure = Figure(figsize=(WIDTH, 3.4), layout='constrained')
    left, right = figure.subplots(1, 2)
    name = found['mixer']['name']
    for keeps, colour, label in ((False, ORANGE, f'becomes {name}'), (True, BLUE, 'keeps its attention')):
        blocks = [one for one in found['blocks'] if one['keeps'] == keeps]
        left.bar([one['block'] for one in blocks], [one['error'] for one in blocks], color=colour,
                 label=label)
    left.set(xlabel='block', ylabel='error over variance, after alignment')
    left.set_title(f'error of a {name} mixer in each block', fontsize=9)
    kept = [one['kept'] for one in found['hybrids']]
    choice = len(found['kept'])
    right.plot(kept, [one['error'] for one in found['hybrids']], color=ORANGE, linewidth=1.6, marker='o',
               markersize=3, label='error, mean over all blocks')
    right.axvline(choice, color='black', linewidth=0.8, linestyle=':')
    right.text(choice, 0.98, f' {found["budget"]}', transform=right.get_xaxis_transform(), fontsize=7.5,
               va='top')
    right.set_title('error that is left, and cost', fontsize=9)
    right.set(xlabel='blocks that keep their attention', ylabel='error, mean over all blocks')
    right.set_ylim(bottom=0)
    cost = right.twinx()
    cost.plot(kept, [one['gmacs'] for one in found['hybrids']], color=GREEN, linewidth=1.6, linestyle='--',
              label='GMACs of an image')
    cost.set_ylabel('GMACs of an image')
    right.legend(handles=[*right.get_lines()[:1], *cost.get_lines()], frameon=False, fontsize=7.5,
                 loc='lower left')
    left.legend(frameon=False, fontsize=7.5)
    for ax in (left, right):
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
    return figure
