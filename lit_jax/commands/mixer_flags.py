"""`--config.model.mixer.name=NAME`: the mixer starts from its own defaults, not from the recipe's options."""
import ast
from collections.abc import Sequence

from ml_collections import ConfigDict

from lit_jax.runtime.errors import UserError

_PREFIX = 'model.mixer.'


def split_mixer(changes: Sequence[tuple[str, str | bool]]
                ) -> tuple[list[tuple[str, str | bool]], dict[str, str | bool]]:
    """(other changes, {option: text} of the mixer's), if they name a mixer; else all, and {}."""
    mixer = {field.removeprefix(_PREFIX): text for field, text in changes if field.startswith(_PREFIX)}
    if 'name' not in mixer:
        return list(changes), {}
    return [change for change in changes if not change[0].startswith(_PREFIX)], mixer


def set_mixer(config: ConfigDict, flags: dict[str, str | bool]) -> None:
    """Sets config.model.mixer to the named mixer: the flags, else its defaults; what has none (heads) stays
    as the recipe has it. The same name as the recipe's keeps the recipe's options."""
    from lit_jax.models.mixers import import_mixer
    if 'mixer' not in config.get('model', {}):
        raise UserError('this recipe has no model.mixer: leave --config.model.mixer.name out')
    if not isinstance(flags['name'], str):
        raise UserError('--config.model.mixer.name needs a value: a mixer, such as linear')
    old, kind = config.model.mixer.to_dict(), import_mixer(flags['name'])
    defaults = kind.defaults()
    same = old.get('name') == flags['name']
    new = {name: value for name, value in old.items()
           if same or name in kind.options() and name not in defaults}
    read = {name: text if name == 'name' else _value(text) for name, text in flags.items()}
    with config.unlocked():
        config.model.mixer = ConfigDict(({} if same else defaults) | new | read)


def _value(text: str | bool):
    try:
        return text if isinstance(text, bool) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
