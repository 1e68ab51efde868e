"""Shared decisions and errors: process 0 decides and writes, and an error in one process is raised in all.

Otherwise a process that fails alone (a damaged file, a full disk) would leave the others waiting. All
processes call these functions, in the same order, from the thread that starts the train steps."""
import json
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.json_file import parse_json

# Errors of checks and writes, sent to the other processes; anything else is a bug and ends the process.
_SHARED = (UserError, OSError, ValueError, RuntimeError)


def is_lead() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def from_lead(decide: Callable):
    """Runs `decide` on process 0 only and returns its result (JSON-able) on every process.

    An error is raised everywhere: as it is on process 0, as a UserError with its text elsewhere."""
    if jax.process_count() == 1:
        return decide()
    message, error = {}, None
    if is_lead():
        try:
            message = {'value': decide()}
        except _SHARED as caught:
            message, error = {'error': _text(caught)}, caught
    received = _broadcast(json.dumps(message).encode())
    if error is not None:
        raise error
    message = parse_json(received, 'the message of process 0')
    if 'error' in message:
        raise UserError(f'process 0 of this run: {message["error"]}')
    return message['value']


def together(act: Callable):
    """Runs `act` on every process and returns its own result when all have finished.

    An error is raised everywhere: as it is where it happened, elsewhere as a UserError that quotes it."""
    if jax.process_count() == 1:
        return act()
    result, error = None, None
    try:
        result = act()
    except _SHARED as caught:
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
    """The texts of all processes, in order, on every process."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    rows = multihost_utils.process_allgather(_padded(data, int(lengths.max())))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def only_lead(act: Callable) -> None:
    """Runs `act` on process 0; the others return when it is done, or raise as `from_lead`."""
    def run():
        act()

    from_lead(run)


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else reason_of(error)


def _broadcast(data: bytes) -> bytes:
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return multihost_utils.broadcast_one_to_all(_padded(data, length))[:length].tobytes()


def _padded(data: bytes, length: int) -> np.ndarray:
    """`data` as uint8, padded or cut to a power of two that holds `length`, so that few programs compile."""
    size = max(1024, 1 << (length - 1).bit_length())
    return np.frombuffer(data[:size].ljust(size, b'\0'), np.uint8)
