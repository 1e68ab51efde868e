"""The one exception for mistakes a person can make, whose text is written for that person, and its phrases.

Scripts print it without a traceback and exit with status 1 (`lit_jax.runtime.cli`)."""
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input, wrong file or wrong recipe. Says what was given, what was expected, and what to do."""


def check_known(what: str, value, known: Iterable[str]) -> None:
    """Raises UserError unless a value of this kind is one of the known ones."""
    if value not in known:
        raise UserError(f'unknown {what} {value!r}; known: {", ".join(known)}')


def listed(problems: list[str], most: int = 40) -> str:
    """A line for each problem, of which `most` are shown, to stand behind a line that ends with a colon."""
    more = [f'... and {len(problems) - most} more'] if len(problems) > most else []
    return '\n  ' + '\n  '.join(problems[:most] + more)
