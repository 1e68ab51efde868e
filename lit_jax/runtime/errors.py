"""UserError, for mistakes that a user can correct; commands print it without a traceback and exit with 1."""
import difflib
import os
import re
import reprlib
import sys
from collections.abc import Iterable

SHOWN = 80
_REASON = 300
_SCRIPT = re.compile(r'\bpython (convert|prepare_latents|train|train_vae|sample|evaluate|analyze|export|push'
                     r'|bundle|app)(?:_torch_ckpt)?\.py\b')
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = SHOWN
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


class UserError(ValueError):
    """Wrong input, file or recipe. Its text says what was given, what was expected, and what to do."""


def check_known(what: str, value, known: Iterable[str]) -> None:
    """Raises UserError unless `value` is in `known`; `what`: its kind, for the message."""
    if value not in list(known):      # a value from a file may be unhashable
        raise UserError(f'unknown {what} {shown(value)}{did_you_mean(value, known)}; known: '
                        f'{", ".join(known)}')


def did_you_mean(value, known: Iterable[str], before: str = '') -> str:
    """' (did you mean NAME?)' for the known name nearest to `value`, else ''. before: put before the name."""
    names = {str(name).lower(): name for name in known}
    asked = str(value)[:SHOWN].lower().replace('-', '_')
    near = difflib.get_close_matches(asked, names, n=1) or [
        name for name in names if len(asked) > 3 and name.startswith(asked)][:1]
    return f' (did you mean {before}{names[near[0]]}?)' if near else ''


def listed(problems: list[str], most: int = 30) -> str:
    """An indented line for each problem, at most `most`, to follow a line that ends with a colon."""
    more = [f'... and {len(problems) - most} more'] if len(problems) > most else []
    return '\n  ' + '\n  '.join(problems[:most] + more)


def shown(value) -> str:
    """A value from a file or a user as a message shows it: on one line, escaped, at most 80 characters."""
    try:
        text = _SHORT.repr(value)
    except ValueError:      # an integer of more digits than Python prints
        text = f'a number of {value.bit_length()} bits'
    return _cut(text if text.isprintable() else repr(text)[1:-1])


def shown_name(name) -> str:
    """A name from a file (a tensor, an entry, a member) as `shown` shows it, without quotes."""
    return _cut(repr(str(name)[:SHOWN + 1])[1:-1])


def printable(text: str) -> str:
    """A text for a terminal: characters that would steer it are escaped, line breaks and tabs stay."""
    return text if text.isprintable() else ''.join(
        one if one in '\n\t' or one.isprintable() else repr(one)[1:-1] for one in text)


def as_typed(text: str) -> str:
    """A text with the commands in it as they are typed here: `lit-jax sample` for `python sample.py`, if this
    program was started as lit-jax, where the scripts of a checkout may not be."""
    if not os.path.basename(sys.argv[0]).startswith('lit-jax'):
        return text
    return _SCRIPT.sub(lambda found: f'lit-jax {found[1].replace("_", "-")}', text)


def reason_of(error: BaseException) -> str:
    """What an error of another library says, for a message of ours: its first line, escaped, at most 300
    characters, without the name of its class."""
    said = getattr(error, 'strerror', None) or str(error).strip() or 'no reason is given'
    if isinstance(error, KeyError):
        said = f'there is no {said}'
    elif isinstance(error, SystemExit):
        said = 'it ends the program'
    elif isinstance(error, AttributeError) and said[:1] + said[-1:] in ('""', "''"):
        said = said[1:-1].replace("\\'", "'")        # ml_collections quotes its own message
    return _cut(repr(said.split('\n')[0][:_REASON + 1])[1:-1], _REASON)


def human_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (powers of 1000)."""
    for unit in ('bytes', 'kB', 'MB', 'GB'):
        if count < 1000:
            return f'{count:.0f} bytes' if unit == 'bytes' else f'{count:.1f} {unit}'
        count /= 1000
    return f'{count:.1f} TB'


def _cut(text: str, most: int = SHOWN) -> str:
    return text if len(text) <= most else f'{text[:most - 3]}...'
