"""Common frame of the commands: logging, error messages and exit statuses.

Exit statuses: 0 done, 1 error, 2 wrong usage, 75 stopped on request (Ctrl-C, SIGTERM): what is whole is kept,
start it again to go on; 76 another process of the run is gone (start all of them again)."""
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from lit_jax.runtime import alive, chips, progress, signals, virtual_devices
from lit_jax.runtime.errors import UserError, as_typed, printable
from lit_jax.runtime.options import Processes


class _Handler(logging.StreamHandler):
    """Notes that something was said, for `alive`; lines may hold names and values from files."""

    def format(self, record: logging.LogRecord) -> str:
        return as_typed(printable(super().format(record)))

    def emit(self, record: logging.LogRecord) -> None:
        progress.heard()
        super().emit(record)


def setup_logging(stream: TextIO | None = None) -> None:
    """Logs lit_jax from INFO with the time of day, other packages from WARNING; default stream: stderr.
    Tracebacks that Orbax logs (through absl) are left out: the same error is raised and becomes a message."""
    handler = _Handler(stream)
    handler.addFilter(lambda record: not (record.name == 'absl' and record.exc_info))
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S'))
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger('lit_jax').setLevel(logging.INFO)


def name_process(index: int, count: int) -> None:
    """Of several processes only process 0 logs below WARNING; lines of the others carry their number."""
    if count > 1:
        clock = '%(asctime)s' if index == 0 else f'%(asctime)s [process {index}]'
        logging.getLogger().handlers[0].setFormatter(
            logging.Formatter(f'{clock} %(message)s', datefmt='%H:%M:%S'))
        logging.getLogger('lit_jax').setLevel(logging.INFO if index == 0 else logging.WARNING)


def join(options: Processes, *, saves: bool = False) -> bool:
    """Joins this process to its run, if there are several processes; returns whether it is process 0.
    saves: whether SIGTERM is left to jax, which makes all processes agree on the step to save."""
    # Imports jax, so only after the flags have been checked.
    from lit_jax.runtime import cluster
    cluster.join(options.coordinator, options.num_processes, options.process_id, options.heartbeat_seconds)
    if not saves:
        signals.listen()
    index, count = cluster.process()
    name_process(index, count)
    return index == 0


def run(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a UserError prints its message and gives status 1."""
    signals.catch()
    setup_logging()
    signals.say_with(lambda text: logging.getLogger('lit_jax').warning('%s', text))
    signals.before_leaving(logging.shutdown)
    for stream in (sys.stdout, sys.stderr):      # names of files may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit('error: the folder that this was started in has been deleted; change into another one')
    virtual_devices.give_threads()
    chips.choose_cpu()
    alive.stop_with_parent()
    watching = alive.Alive()
    watching.start('starting: importing jax and what belongs to it takes some seconds')
    try:
        status = main()
    except UserError as error:
        watching.stop()
        sys.exit(as_typed(printable(f'error: {error}')))
    except BrokenPipeError:      # `... --dry_run | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status or 0)
