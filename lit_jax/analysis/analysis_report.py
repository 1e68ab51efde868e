"""Writes the figures and the report of an analysis."""
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lit_jax.analysis import figures
from lit_jax.analysis.examples import Images
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.models.arch import mixers_of
from lit_jax.report.html import Report
from lit_jax.sampling.labels import class_names


class Page:
    """A report whose images are also written as files."""

    def __init__(self, out, title: str):
        self.out, self.report, self.names = out, Report(title), []

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        self.names.append(f'{name}.png')
        self.report.image(figures.save(figure, self.out / f'{name}.png'), caption)


def write_page(out, found: Mapping, images: Images) -> list[str]:
    """Writes the figures and report.html of what `analyze` found; returns the names of the figures."""
    page = Page(out, ' and '.join(str(model['source']) for model in found['models'].values()))
    page.report.table(('', 'from', 'step', 'mixer', 'blocks', 'width'), [
        (name, one['source'], one['step'] or '', _mixer(one['model']), one['model']['depth'],
         one['model']['width']) for name, one in found['models'].items()])
    data = found['data']
    page.report.paragraph(f'{data["pictures"]} evenly spaced images of {data["name"]}, split '
                          f'{data["split"]}. Each has its own label, and the same noise (seed '
                          f'{data["seed"]}) for all {_unit(found)}s and models.')
    sections = {'loss': _loss, 'alignment': _alignment, 'similarity': _similarity, 'rank': _rank,
                'tokens': _tokens, 'routing': _routing}
    for part, section in sections.items():
        if part in found:
            section(page, found, images)
    page.report.write(out / 'report.html')
    return page.names


def _mixer(arch: Mapping) -> str:
    return '; '.join(dict.fromkeys(
        ', '.join(f'{name} {value}' if name != 'name' else str(value)
                  for name, value in sorted(mixer.items(), key=lambda item: item[0] != 'name'))
        for mixer in mixers_of(arch)))


def _unit(found: Mapping) -> str:
    return read_diffusion(found['diffusion']).unit


def _shown(times) -> list[str]:
    return [f'{t:g}' for t in times]


def _of_models(found: Mapping, part: str) -> dict:
    return {name: found[part][name] for name in found['models'] if name in found[part]}


def _loss(page: Page, found: Mapping, _) -> None:
    loss = dict(found['loss'])
    times, unit = loss.pop('timesteps'), _unit(found)
    noise_at = found['diffusion'].get('noise_at')
    end = '0: the least noise' if noise_at is None else f'{noise_at}: pure noise'
    page.report.heading(f'Loss by {unit}')
    page.report.paragraph(f'The terms of the training loss at fixed {unit}s ({end}). The bands are two '
                          f'standard errors over the images.')
    terms = {term for terms in loss.values() for term in terms}
    said = {'mse': f'mse of the {found["diffusion"].get("prediction", "noise")}',
            'vb': 'vb, the bound that trains the variance',
            'cosine': 'cosine, 1 - cosine of predicted and true over the channels, times its weight'}
    below = '; below, student over teacher, and the mean squared difference of their outputs'
    page.figure('loss', figures.losses(loss, times, unit),
                '; '.join(text for term, text in said.items() if term in terms) + below * ('ratio' in loss))
    columns = {term if name == 'difference' else f'{name} {term}': values['mean']
               for name, terms in loss.items() for term, values in terms.items()}
    page.report.table((unit, *columns), [
        *((f'{t:g}', *(f'{means[i]:.4g}' for means in columns.values())) for i, t in enumerate(times)),
        ('mean', *(f'{np.mean(means):.4g}' for means in columns.values()))], scroll=True)


def _alignment(page: Page, found: Mapping, _) -> None:
    times, errors = found['alignment']['timesteps'], np.array(found['alignment']['error'])
    page.report.heading('Relative error by layer')
    page.report.paragraph("What each mixer of the student returns for the tokens that enter the teacher's "
                          'attention: squared error over the variance of what that attention returns (1: no '
                          f'better than the best constant), by {_unit(found)}.')
    rows = [*enumerate(errors.T), ('mean', errors.mean(1))]
    page.report.table(('layer', *_shown(times), 'mean'), [
        (layer, *(f'{value:.4f}' for value in values), f'{values.mean():.4f}') for layer, values in rows])


def _similarity(page: Page, found: Mapping, _) -> None:
    part, models = found['similarity'], _of_models(found, 'similarity')
    page.report.heading('Similarity of the heads')
    page.report.paragraph(f'Left: cosine of the attention maps of two heads, mean over all pairs of heads '
                          f'and {part["pictures"]} images (LiT, figure 10). Weights are positive, so even '
                          f'unrelated maps have a high cosine. Right: the same after subtracting 1/M, the '
                          f'weight of plain averaging, from each weight; unrelated maps then have cosine 0.')
    page.figure('similarity', figures.similarity(models, _shown(part['timesteps']), _unit(found)),
                f'similarity of heads by layer and {_unit(found)}')
    for name, one in models.items():
        if one['heads'] == 1:
            page.report.paragraph(f'{name}: one head, there are no pairs.')
            continue
        values = np.array(one['cosine'])
        page.report.table((f'{name}, cosine: layer', *_shown(part['timesteps']), 'mean'), [
            (layer, *(f'{v:.3f}' for v in values[:, layer]), f'{values[:, layer].mean():.3f}')
            for layer in range(values.shape[1])], scroll=True)


def _rank(page: Page, found: Mapping, _) -> None:
    models = _of_models(found, 'rank')
    times = _shown(next(iter(models.values()))['timesteps'])
    page.report.heading('Rank of the mixer')
    page.report.paragraph('A head multiplies its values by a matrix with one row and one column per token. '
                          'Effective rank: exp of the entropy of its singular values divided by their sum '
                          '(Roy & Vetterli 2007). Numerical rank: the number of singular values above max(N, '
                          'M)·2⁻²³ times the largest. With the depth-wise convolution each channel of a head '
                          'has its own matrix, map + convolution; the mean is over some of the channels.')
    page.figure('rank', figures.rank(models, _unit(found)),
                f'left: mean and range over the {_unit(found)}s {", ".join(times)}')
    kinds = [(name, key, label) for name, one in models.items()
             for key, label in (('map', ''), ('with_convolution', ' + convolution')) if key in one]
    header = [f'{name}{label}: {what}' for name, _, label in kinds for what in ('effective', 'numerical')]
    depth = max(len(one['map']['effective'][0]) for one in models.values())
    columns = [np.mean(models[name][key][what], axis=0) for name, key, _ in kinds
               for what in ('effective', 'numerical')]
    page.report.table(('layer', *header), [
        (layer, *(f'{column[layer]:.2f}' if layer < len(column) else '' for column in columns))
        for layer in range(depth)])
    for name, one in models.items():
        page.report.paragraph(f'{name}: {one["tokens"]} tokens; without a convolution the rank is at most '
                              f'{one["bound"]}.')


def _tokens(page: Page, found: Mapping, images: Images) -> None:
    part, models = found['tokens'], _of_models(found, 'tokens')
    first = next(iter(models.values()))
    one = images[part['picture']:part['picture'] + 1]
    clean, noised = one.visible()[0], one.visible(part['timestep'])[0]
    page.report.heading('Where one token looks')
    page.report.paragraph(f'Attention weights of the token in row {first["token"][0]}, column '
                          f'{first["token"][1]} (red box) on all tokens (DyDi-LiT, figure 6); each map is '
                          f'coloured from 0 to its largest weight. The M weights sum to 1, so 1/M is plain '
                          f'averaging. The maps do not include the convolution.')
    place = first['token'], first['grid']
    at = f'{_unit(found)} {part["timestep"]:g}'
    page.figure('token_maps', figures.token_maps(models, clean, noised, *place, at),
                'mean over the heads')
    page.figure('token_heads', figures.token_heads(models, clean, *place), 'single heads of one layer')


def _routing(page: Page, found: Mapping, images: Images) -> None:
    part = found['routing']
    page.report.heading('Routing')
    page.report.paragraph('The most frequent choice of the tokens of each class, layer by layer (DyDi-LiT, '
                          f'figure 5), at {_unit(found)} {part["timestep"]:g}. Stronger colour: a larger '
                          'share of the tokens.')
    for name, one in _of_models(found, 'routing').items():
        names = class_names({'classes': found['classes']}, next(iter(one.values()))['classes'])
        page.figure(f'routing_{name}', figures.routing(one, names), name)
        for route, values in one.items():
            page.report.table((f'{name} {route}: layer', *range(len(values['used']))),
                              [('choices in use', *values['used'])])
