"""UserError, for mistakes that a user can correct; commands print it without a traceback and exit with 1."""
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input, file or recipe. Its text says what was given, what was expected, and what to do."""


def check_known(what: str, value, known: Iterable[str]) -> None:
    """Raises UserError unless `value` is in `known`; `what`: its kind, for the message."""
    if value not in known:
        raise UserError(f'unknown {what} {value!r}; known: {", ".join(known)}')


def listed(problems: list[str], most: int = 40) -> str:
    """An indented line for each problem, at most `most`, to follow a line that ends with a colon."""
    more = [f'... and {len(problems) - most} more'] if len(problems) > most else []
    return '\n  ' + '\n  '.join(problems[:most] + more)
