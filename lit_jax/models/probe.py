"""Values inside a network for those who ask: `show` in a layer, `watching` around the call.

    with watching('balance') as seen:
        y = model(x, t, label)
    seen['balance']      # a list with one array [layers, ...] for each stack of blocks

Unless a name is watched, nothing is kept and nothing is computed for it. Losses beside the main one,
statistics of routing and the values of `analyze.py` take this way, so that a mixer stays `(x_BND, grid) ->
x_BND`. Names are unique within a block: 'balance', 'routing/query', 'map/numerator'."""
import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping

import jax

Array = jax.Array

_seen: contextvars.ContextVar[dict[str, list] | None] = contextvars.ContextVar('seen', default=None)


@contextlib.contextmanager
def watching(*names: str) -> Iterator[dict[str, list]]:
    """Collects what is shown under these names inside the block; the innermost watcher gets it."""
    seen: dict[str, list] = {name: [] for name in names}
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def watched() -> tuple[str, ...]:
    """The names that are watched here."""
    return tuple(_seen.get() or ())


def show(name: str, value: Array | Callable[[], Array]) -> None:
    """Shows an array, or the result of a function, if `name` is watched. Not inside `shard_map`."""
    seen = _seen.get()
    if seen is not None and name in seen:
        seen[name].append(value() if callable(value) else value)


def show_all(values: Mapping[str, Array]) -> None:
    """`show` for each of them; used by loops that collected the values of their layers."""
    for name, value in values.items():
        show(name, value)
