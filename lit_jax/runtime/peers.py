"""Several processes that do one thing: process 0 decides and writes, and a failure of one is a failure of
all.

Without this a process that meets an error alone (a damaged file, a full disk) leaves the others waiting for
it. Every function here is collective: all processes of the run call it, in the same order, from the thread
that also starts the train steps. With one process each is a plain call."""
import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from lit_jax.runtime.errors import UserError

# What a check or a write may raise and is told to the others; anything else is a bug, and ends the process.
_TOLD = (UserError, OSError, ValueError, RuntimeError)


def is_lead() -> bool:
    """Whether this is process 0: the one that writes what is written once."""
    return jax.process_index() == 0


def from_lead(decide: Callable):
    """What `decide()` returns on process 0 (anything JSON can hold), on every process; it runs there only.

    Raises on every process when it raises there: the error itself on process 0, a UserError with its text
    elsewhere."""
    if jax.process_count() == 1:
        return decide()
    message, error = {}, None
    if is_lead():
        try:
            message = {'value': decide()}
        except _TOLD as caught:
            message, error = {'error': _text(caught)}, caught
    told = _broadcast(json.dumps(message).encode())
    if error is not None:
        raise error
    message = json.loads(told)
    if 'error' in message:
        raise UserError(f'process 0 of this run: {message["error"]}')
    return message['value']


def together(act: Callable):
    """`act()`, on every process, and its own result; a barrier, too: it returns when all have finished.

    Raises on every process when it raises on one: there the error itself, elsewhere a UserError that names
    the process and quotes it."""
    if jax.process_count() == 1:
        return act()
    result, error = None, None
    try:
        result = act()
    except _TOLD as caught:
        error = caught
    text = b'' if error is None else _text(error).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    if lengths.any():
        texts = multihost_utils.process_allgather(_padded(text, int(lengths.max())))
        if error is not None:
            raise error
        first = int(np.flatnonzero(lengths)[0])
        raise UserError(f'process {first} of this run: {texts[first, :lengths[first]].tobytes().decode()}')
    return result


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order, on every one of them."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    rows = multihost_utils.process_allgather(_padded(data, int(lengths.max())))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def only_lead(act: Callable) -> None:
    """`act()` on process 0; the others return when it is done, or raise when it failed (as `from_lead`)."""
    def run():
        act()

    from_lead(run)


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'


def _broadcast(data: bytes) -> bytes:
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return multihost_utils.broadcast_one_to_all(_padded(data, length))[:length].tobytes()


def _padded(data: bytes, length: int) -> np.ndarray:
    """`data` as uint8, cut or filled to the power of two from 1024 that holds `length`: few programs."""
    size = max(1024, 1 << (length - 1).bit_length())
    return np.frombuffer(data[:size].ljust(size, b'\0'), np.uint8)
