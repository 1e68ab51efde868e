"""Writes a student as a folder that needs nothing but PyTorch: weights, config and one modelling file.

The file is joined from the pieces in `lit_jax/convert/twins/` that the family and the mixers need."""
import re
from collections.abc import Mapping
from pathlib import Path

from lit_jax.models.arch import mixers_of
from lit_jax.runtime.errors import UserError, shown_name
from lit_jax.runtime.json_file import split_lines

MODELING = 'modeling_lit.py'
WEIGHTS = 'model.safetensors'
PIECES = Path(__file__).parent / 'twins'
_PACKAGE = 'lit_jax.convert.twins.'
_IMPORT = re.compile(rf'^from {re.escape(_PACKAGE)}(\w+)_twin import (?:\([^)]*\)|.*)\n', re.MULTILINE)
# Name in an architecture -> (piece, class).
MIXERS = {'softmax': ('softmax', 'SoftmaxAttention'), 'linear': ('linear', 'LinearAttention'),
          'sana': ('sana', 'SanaAttention'), 'edit': ('edit', 'EditAttention'),
          'moh': ('moh', 'MohAttention'), 'dydila': ('dydila', 'DyDiLA'),
          'gla': ('gla', 'GatedLinearAttention')}
FAMILIES = {'dit': ('dit', 'DiT'), 'dig': ('dig', 'DiG'), 'udig': ('udig', 'UDiG'),
            'pixart': ('pixart', 'PixArt')}
_ALSO = """: the model, its samplers, and a command line.

    python {file} --classes 3,7 --out samples.png"""
_HEAD = '''"""{title} in PyTorch{also}

Written by lit_jax {version}. The code of this file is licensed under the Apache License 2.0; the weights
beside it have the licence of those they were made from."""
'''


def check_student(arch: Mapping) -> None:
    """UserError for an architecture that has no PyTorch code here: a mixer from outside the library."""
    unknown = sorted({str(mixer['name']) for mixer in mixers_of(arch)} - set(MIXERS))
    if unknown or arch['family'] not in FAMILIES:
        what = ', '.join(map(shown_name, unknown)) or shown_name(arch['family'])
        raise UserError(f'there is no PyTorch code of {what}, which --layout lit would need; known are the '
                        f'mixers {", ".join(MIXERS)}. Give --layout original to write the weights alone')


def modeling_source(arch: Mapping, wrapped: bool = False, flow: bool = False) -> str:
    """The text of the modelling file of an architecture. wrapped: as a component of diffusers' pipelines.
    flow: with the samplers of flows in the place of those of noise."""
    check_student(arch)
    mixers = dict.fromkeys(str(mixer['name']) for mixer in mixers_of(arch))
    piece, model = FAMILIES[arch['family']]
    last = 'transformer' if wrapped else 'draw'
    imports, text = _joined(['parts', *(MIXERS[name][0] for name in mixers), piece, last], flow)
    for table, found in (('MIXERS', {name: MIXERS[name][1] for name in mixers}),
                         ('MODELS', {arch['family']: model})):
        entries = ', '.join(f'{key!r}: {value}' for key, value in found.items())
        text = text.replace(f'{table} = {{}}', f'{table} = {{{entries}}}')
    also = ', as a component of a diffusers pipeline.' if wrapped else _ALSO.format(file=MODELING)
    return _whole(model, also, imports, text)


def scheduler_source() -> str:
    """The text of the scheduler of flows for diffusers' pipelines."""
    return _whole('Samplers of flows', ', as a scheduler of diffusers.', *_joined(['scheduler']))


def _whole(title: str, also: str, imports: set[str], text: str) -> str:
    from lit_jax import __version__
    return f'{_HEAD.format(title=title, also=also, version=__version__)}{_render(imports)}\n\n{text}'


def _joined(names: list[str], flow: bool = False) -> tuple[set[str], str]:
    """(imports, code) of pieces and of those that they need."""
    imports, bodies = set(), []
    for name in _with_needed(names, flow):
        found, body = _split((PIECES / f'{name}_twin.py').read_text())
        imports |= found
        bodies.append(body)
    return imports, '\n\n\n'.join(bodies) + '\n'


def _with_needed(names: list[str], flow: bool) -> list[str]:
    """Pieces, each behind those that it imports."""
    order: list[str] = []

    def add(name):
        name = 'flow' if flow and name == 'noise' else name
        if name not in order:
            for needed in _IMPORT.findall((PIECES / f'{name}_twin.py').read_text()):
                add(needed)
            order.append(name)

    for name in names:
        add(name)
    return order


def _split(source: str) -> tuple[set[str], str]:
    """(imports of other packages, the code behind them), without the docstring, which becomes a comment."""
    title, rest = re.match(r'"""(.*?)"""\n(.*)', source, re.DOTALL).groups()
    rest = _IMPORT.sub('', rest)
    imports = set(re.findall(r'^(?:import|from) .*$', rest, re.MULTILINE))
    body = re.sub(r'^(?:import|from) .*\n', '', rest, flags=re.MULTILINE).strip()
    comment = '\n'.join(f'# {line}'.rstrip() for line in split_lines(title))
    return imports, f'{comment}\n\n{body}'


def _render(imports: set[str]) -> str:
    """Sorted as usual: the standard library, then packages."""
    ours = [line for line in imports if re.match(r'(import|from) (torch|numpy|diffusers)', line)]

    def key(line):
        return line.startswith('from'), line

    return '\n'.join([*sorted(imports - set(ours), key=key), '', *sorted(ours, key=key)])
