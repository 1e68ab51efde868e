"""The page of a model on the hub: what it is, what it was made from, what it scores, how it is used."""
import json
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from lit_jax.evaluation.table import describe, markdown
from lit_jax.models.arch import conditioning
from lit_jax.models.network import Network
from lit_jax.runtime.hub import HUB

# A path of some machine, alone or in a text: home folders and buckets are nobody's business.
_ALONE = re.compile(r'(?:~|[a-zA-Z]:\\|(?!hf:)[a-z0-9]+:/)?/.*')
_INSIDE = re.compile(r'(?:^|(?<=[\s=:,"\']))(?:~|(?!hf:)[a-z0-9]+:/)?/(?:[^\s/,"\']+/)*([^\s/,"\']+)')


def model_card(name: str, config: Mapping, licence: str, figures: Sequence[dict],
               images: Sequence[str], code: bool) -> str:
    """Markdown with the fields that the hub reads.

    config: of the model, with the 'recipe' that it was trained by, if known. licence: of the weights, as the
    hub writes it. figures: rows of `evaluate.py`. images: names of files. code: whether the PyTorch code is
    beside it."""
    text, teacher = conditioning(config['model']) == 'text', _teacher(config)
    head = {'license': licence or 'other', 'library_name': 'lit_jax',
            'pipeline_tag': 'text-to-image' if text else 'unconditional-image-generation',
            'tags': ['diffusion', 'linear-attention', 'jax']}
    if teacher.startswith(HUB):
        head['base_model'] = teacher.removeprefix(HUB)
    parts = [_use(name, config, text, code), _figures(figures)]
    if recipe := config.get('recipe'):
        parts.append(['## Recipe', '', *_json(recipe)])
    return '\n'.join(['---', *(f'{key}: {json.dumps(value)}' for key, value in head.items()), '---', '',
                      f'# {name}', '', *_about(config, teacher, licence), '',
                      *(f'![Samples]({quote(image)})\n' for image in images),
                      *(line for part in parts for line in part)])


def _teacher(config: Mapping) -> str:
    """'' where it is not known."""
    recipe = config.get('recipe') or {}
    paths = ((recipe.get(name) or {}).get('path') for name in ('teacher', 'inherit'))
    return shown_source(next(filter(None, paths), ''))


def _about(config: Mapping, teacher: str, licence: str) -> list[str]:
    made = config.get('provenance') or {}
    step = f', step {made["step"]}' if made.get('step') else ''
    rows = {'Model': Network(config['model']).describe(),
            'Made from': f'`{shown_source(made["source"])}`{step}' if made.get('source') else '',
            'sha256 of its source': f'`{made["sha256"]}`' if isinstance(made.get('sha256'), str) else '',
            'Teacher': teacher and f'`{teacher}`',
            'Licence of the weights': licence or (
                f'that of the weights of {"its teacher" if teacher else "the model that it was made from"}'),
            'Written by': made.get('tool', '')}
    return ['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items() if value)]


def _use(name: str, config: Mapping, text: bool, code: bool) -> list[str]:
    latent = config['latent']
    draw = "prompts=['a red circle'], text_encoder='TEXT_ENCODER'" if text else 'classes=[0, 1]'
    vae = '' if latent['space'] == 'pixels' else ", vae='VAE'"
    needs = [*([f'VAE: the folder of {latent["vae"]}.'] if vae and latent.get('vae') else []),
             *([f'TEXT_ENCODER: the folder of {(config.get("text") or {}).get("encoder") or "T5"}.']
               if text else [])]
    alone = ['', 'With PyTorch alone: `python modeling_lit.py --help` says what it draws.'] if code else []
    return ['## Use', '', '```python', 'import lit_jax      # pip install "lit_jax[hub]"', '',
            f"model = lit_jax.load('{HUB}{name}')", f'images = model.sample({draw}{vae})', '```',
            *([''] if needs else []), *needs, *alone, '']


def _figures(rows: Sequence[dict]) -> list[str]:
    """The table, and for each row the recipe card that it was computed by."""
    if not rows:
        return []
    lines = ['## Figures', '', _without_places(markdown(rows)), '']
    for row in rows:
        name = _without_places(describe(row)['samples'])
        lines += ['<details>', f'<summary>Recipe card of {name}</summary>', '', *_json(row['card']),
                  '</details>', '']
    return lines


def _json(value) -> list[str]:
    return ['```json', json.dumps(_without_places(value), indent=1, sort_keys=True), '```', '']


def _without_places(value):
    """A value from a file, with the last names of paths of a machine in the place of the paths."""
    if isinstance(value, Mapping):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(entry) for entry in value]
    if not isinstance(value, str):
        return value
    return shown_source(value) if _ALONE.fullmatch(value) else _INSIDE.sub(r'\1', value)


def shown_source(path: str) -> str:
    """The last name of a path, as much as others need; models on the hub keep theirs."""
    return path if path.startswith(HUB) else path.rstrip('/\\').replace('\\', '/').rpartition('/')[2]
