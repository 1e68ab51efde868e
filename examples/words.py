"""What the demos print: stages, the command that does the same, what to try next."""
import shlex
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'grain', 'scikit-learn')      # in a teacher's card
ROOT = Path(__file__).parents[1]


def print_stage(number: int, title: str, stages: int = 4) -> None:
    print(f'\n=== {number}/{stages} {title}', flush=True)


def print_command(text: str) -> None:
    print(f'$ {text}', flush=True)


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def print_next(commands: Sequence[str]) -> None:
    """Commands to try after a demo."""
    print('\nTry next:\n  ' + '\n  '.join(commands), flush=True)


def short(path: Path) -> Path:
    """A path in the checkout as it is typed there."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def format_columns(rows: list[tuple]) -> list[str]:
    """Lines of aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ['  '.join(cell.ljust(w) if i == 0 else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
