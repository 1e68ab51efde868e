"""The one exception for mistakes a person can make: its text is written for that person.

Scripts print it without a traceback and exit with status 1 (`lit_jax.runtime.cli`)."""


def listed(problems: list[str], most: int = 40) -> str:
    """A line for each problem, of which `most` are shown, to stand behind a line that ends with a colon."""
    more = [f'... and {len(problems) - most} more'] if len(problems) > most else []
    return '\n  ' + '\n  '.join(problems[:most] + more)


class UserError(ValueError):
    """Wrong input, wrong file or wrong recipe. Says what was given, what was expected, and what to do."""
