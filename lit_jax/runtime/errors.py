"""The one exception for mistakes a person can make: its text is written for that person.

Scripts print it without a traceback and exit with status 1 (`lit_jax.runtime.cli`)."""


class UserError(ValueError):
    """Wrong input, wrong file or wrong recipe. Says what was given, what was expected, and what to do."""
