"""Ctrl-C and SIGTERM: a command of training ends with what there is saved, a second signal ends it at once.

`catch` comes first, before slow imports: from then on a thread hears the signals, also while the main thread
compiles. Until `save_first` there is nothing to save, and the process ends at once."""
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

LOG = logging.getLogger('lit_jax')
PREEMPTED = 75      # exit status "saved, start me again" (EX_TEMPFAIL of sysexits.h)
_HOOK_SECONDS = 5.0  # for what is done before an end at once
_NAMES = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
_acts: list[Callable[[], object]] = []


class _State:
    caught = False                                  # whether this process listens as a command
    ask: Callable[[], object] | None = None         # asks the loop to save and stop
    asked = False


def catch() -> None:
    """Listens from now on. For commands, in the main thread; a signal that is ignored (nohup) stays so."""
    if _State.caught:
        return
    _State.caught = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _NAMES:
        _listen(number)
    threading.Thread(target=_hear, args=(read,), daemon=True, name='signals').start()


def _listen(number: int) -> None:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)       # the number goes to the thread


def _hear(read: int) -> None:
    while data := os.read(read, 1):
        if data[0] in _NAMES:
            _receive(data[0])


def _receive(number: int) -> None:
    ask, again, _State.asked = _State.ask, _State.asked, True
    name = _NAMES[signal.Signals(number)]
    if ask is None:
        return _end(PREEMPTED, f'{name}: stopped before there was anything new to save; run the same command '
                               'again')
    if again:
        _end(128 + number, f'{name} again: stopped at once, without saving')
    LOG.warning('%s: saving after the step in hand; once more stops at once, without saving', name)
    ask()


def _end(status: int, text: str) -> None:
    LOG.warning('%s', text)
    leave(status)


def before_leaving(act: Callable[[], object]) -> None:
    """Has `leave` call `act` first."""
    _acts.append(act)


def leave(status: int) -> None:
    """Ends the process at once, whatever the main thread does: no block is left in order."""
    def act():
        for one in _acts:
            one()

    acting = threading.Thread(target=act, daemon=True)      # a network that does not answer keeps nobody
    acting.start()
    acting.join(_HOOK_SECONDS)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def save_first(ask: Callable[[], object], alone: bool) -> Iterator[None]:
    """From here on the first signal calls `ask`, from another thread or a handler, and the second one ends
    the process at once. A command that called `catch` stays so to its end.

    alone: whether this is the only process of the run. Several leave SIGTERM to jax, which makes all of them
    agree on the step to stop at; Ctrl-C then counts as SIGTERM. Without `catch`, in a program of others,
    only SIGTERM is listened to, until the block ends."""
    if _State.caught:
        _State.ask = ask if alone else lambda: os.kill(os.getpid(), signal.SIGTERM)
        if alone and threading.current_thread() is threading.main_thread():
            _listen(signal.SIGTERM)      # of a run of one process jax may have taken it
        yield
    elif not alone or threading.current_thread() is not threading.main_thread():
        yield
    else:
        def handle(number, frame):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)       # the second one
            ask()

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
