"""Token mixers, one a file, and the table of their short names.

To add one: a file with a subclass of `Mixer`, a recipe that names it, a test. The file may be anywhere: a
recipe also accepts the name 'package.module:Class', and the short name under which an installed package
declares its class as an entry point of the group `lit_jax_mixers`."""
import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from flax import nnx

from lit_jax.models.mixers.dydila import DyDiLA
from lit_jax.models.mixers.edit import EditAttention
from lit_jax.models.mixers.gla import GatedLinearAttention
from lit_jax.models.mixers.linear import LinearAttention
from lit_jax.models.mixers.mixer import Mixer
from lit_jax.models.mixers.moh import MohAttention
from lit_jax.models.mixers.sana import SanaAttention
from lit_jax.models.mixers.softmax import SoftmaxAttention
from lit_jax.runtime.errors import UserError, did_you_mean, reason_of, shown
from lit_jax.runtime.own_modules import import_module_of

MIXERS: dict[str, Any] = {
    'softmax': SoftmaxAttention, 'linear': LinearAttention, 'edit': EditAttention, 'moh': MohAttention,
    'dydila': DyDiLA, 'sana': SanaAttention, 'gla': GatedLinearAttention}


ENTRY_POINTS = 'lit_jax_mixers'
FORM = 'package.module:Class'


def import_mixer(name: str | None) -> Any:
    """`find_mixer` for a name in a recipe, which may import the module of 'package.module:Class'."""
    module, colon, _ = str(name).partition(':')
    if name not in MIXERS and module and colon:
        import_module_of('the mixer', str(name), FORM)
    return find_mixer(name)


def find_mixer(name: str | None) -> Any:
    """The class of a mixer: one of MIXERS, the name of an entry point of an installed package, or
    'package.module:Class' of a module that is imported. Names also come from model folders and checkpoints,
    which are data and must not import modules. Modules in the environment variable LIT_JAX_MIXERS, separated
    by commas, are imported. UserError if none."""
    if isinstance(name, str):
        if name in MIXERS:
            return MIXERS[name]
        module, colon, attribute = name.partition(':')
        if colon and module and attribute:
            return _check_class(name, _imported(name, module, attribute))
        if name in _installed():
            return _check_class(name, _load_installed(name))
    known = [*MIXERS, *_installed()]
    raise UserError(f'unknown mixer {shown(name)}{did_you_mean(name, known)} (model.mixer.name); known: '
                    f'{", ".join(known)}, or one of your own as package.module:Class')


def whole_mixer(mixer: Mapping) -> dict:
    """A mixer of an architecture with all its options: those that it leaves out have their defaults."""
    return {**find_mixer(mixer['name']).defaults(), **mixer}


def _imported(name: str, module: str, attribute: str) -> Any:
    if module not in sys.modules and module in os.environ.get('LIT_JAX_MIXERS', '').split(','):
        import_module_of('the mixer', name, FORM)
    if module not in sys.modules:
        raise UserError(f'the mixer {shown(name)} is of a module that is not imported, and a model folder or '
                        f'checkpoint does not get to import one: `import {module}` first, or set '
                        f'LIT_JAX_MIXERS={module}, with its folder in PYTHONPATH')
    return getattr(sys.modules[module], attribute, None)


@functools.cache
def _installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Mixers of installed packages by their short names; those of lit_jax come first."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)
            if point.name not in MIXERS}


def _load_installed(name: str) -> Any:
    point = _installed()[name]
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(f'the mixer {shown(name)} is installed as {point.value}, which cannot be imported: '
                        f'{reason_of(error)}; install that package again') from error


def _check_class(name: str, found: Any) -> Any:
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise UserError(f'{shown(name)} is no mixer: it must be a class derived from '
                        f'lit_jax.models.mixers.mixer.Mixer')
    return found


def check_mixer(mixer: Mapping, width: int) -> Any:
    """The class of {'name': see `find_mixer`, further options of the class}. UserError for an unknown name,
    unknown or missing options, and heads that do not divide the width."""
    name, kind = mixer.get('name'), find_mixer(mixer.get('name'))
    known, given = kind.options(), [option for option in mixer if option != 'name']
    if unknown := [option for option in given if option not in known]:
        raise UserError(f'mixer {shown(name)} has no option {", ".join(map(repr, unknown))}; its options: '
                        f'{", ".join(known)}')
    if missing := [option for option, argument in known.items()
                   if option not in given and argument.default is inspect.Parameter.empty]:
        raise UserError(f'mixer {shown(name)} needs {", ".join(missing)}; add it to model.mixer, or to the '
                        f'mixer '
                        f'of its stage')
    heads = mixer.get('heads', 1)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or (
            width % heads and not mixer.get('head_dim')):
        divisors = ', '.join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise UserError(f'{shown(heads)} heads do not divide the width {width}; possible: {divisors}')
    return kind


def build_mixer(mixer: Mapping, width: int, *, dtype, rngs: nnx.Rngs) -> Mixer:
    """The mixer that a recipe describes; UserError as `check_mixer`, and for invalid values."""
    kind = check_mixer(mixer, width)
    return kind(width, **{option: value for option, value in mixer.items() if option != 'name'}, dtype=dtype,
                rngs=rngs)
