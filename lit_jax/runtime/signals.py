"""Ctrl-C and SIGTERM end a command in order: one line, status 75, no traceback, no claim left.

`catch` comes first, before slow imports: from then on a thread hears the signals, also while the main thread
compiles or imports. (An exception in the main thread, as Python has it, would come out of the middle of other
people's imports.) What is whole stays; what is half-written is deleted. In `save_first`, of a training, the
first signal saves, and a second one ends the process at once.

Imports little, for scripts that block the signals only until `catch`."""
import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

PREEMPTED = 75      # exit status "saved, start me again" (EX_TEMPFAIL of sysexits.h)
_HOOK_SECONDS = 5.0  # for what is done before an end at once
_PATIENCE = 0.5      # the same, when a second signal comes meanwhile
_NAMES = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
_SAVING = 'saving after the step in hand; once more stops at once, without saving'
_acts: list[Callable[[], object]] = []


def _write(text: str) -> None:
    os.write(2, f'{text}\n'.encode())


class _State:
    caught = False                                  # whether this process listens as a command
    say: Callable[[str], object] = staticmethod(_write)
    begun = False                                   # whether anything is claimed, or being written
    ask: Callable[[], object] | None = None         # asks the main thread to save and stop
    answer = ''                                     # said when it is asked
    asked = False


def catch() -> None:
    """Listens from now on. For commands, in the main thread; a signal that is ignored (nohup) stays so."""
    if _State.caught:
        return
    _State.caught = True
    atexit.register(_set, signal.SIG_IGN)      # it comes last: all is done, and the status stays what it is
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    listen()
    threading.Thread(target=_hear, args=(read,), daemon=True, name='signals').start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NAMES)      # scripts block them on their first line


def listen() -> None:
    """Takes the signals back from libraries that have taken them, if this process listens."""
    if _State.caught:
        _set(lambda number, frame: None)      # the number goes to the thread


def _set(handler) -> None:
    for number in _NAMES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def say_with(say: Callable[[str], object]) -> None:
    """Has lines said by `say`; before, they are written to stderr as they are."""
    _State.say = say


def begun() -> None:
    """To be called when something is claimed or written: it is told when the process is stopped."""
    _State.begun = True


def _hear(read: int) -> None:
    while data := os.read(read, 1):
        if data[0] in _NAMES:
            _receive(data[0])


def _receive(number: int) -> None:
    again, _State.asked = _State.asked, True
    name = _NAMES[signal.Signals(number)]
    if (ask := _State.ask) is None:
        if again:      # it is ending
            threading.Event().wait(_PATIENCE)
            os._exit(PREEMPTED)
        what = 'stopped; what is whole is kept: run the same command again to go on' if _State.begun else \
            'stopped before anything was written'
        # In a thread of its own, so that a second signal is heard meanwhile.
        threading.Thread(target=_end, args=(PREEMPTED, f'{name}: {what}'), daemon=True).start()
    elif again:
        _end(128 + number, f'{name} again: stopped at once')
    else:
        _State.say(f'{name}: {_State.answer}')
        ask()


def _end(status: int, text: str) -> None:
    _act_in_time([lambda: _State.say(text)])      # a terminal that is held up keeps nobody
    leave(status)


def before_leaving(act: Callable[[], object]) -> None:
    """Has `leave` call `act` first; what was registered last comes first."""
    _acts.append(act)


def leave(status: int) -> None:
    """Ends the process at once, whatever the main thread does: no block is left in order."""
    _act_in_time([*(stream.flush for stream in (sys.stdout, sys.stderr)), *reversed(_acts)])
    os._exit(status)


def _act_in_time(acts: list[Callable[[], object]]) -> None:
    """Calls each, and waits for all together some seconds: a network that does not answer keeps nobody."""
    def call():
        for one in acts:
            with contextlib.suppress(OSError, ValueError):
                one()

    acting = threading.Thread(target=call, daemon=True)
    acting.start()
    acting.join(_HOOK_SECONDS)


@contextlib.contextmanager
def save_first(ask: Callable[[], object], alone: bool, answer: str = _SAVING) -> Iterator[None]:
    """In this block the first signal calls `ask`, from another thread or a handler, and the second one ends
    the process at once. A command that called `catch` stays so to its end.

    alone: whether this is the only process of the run. Several leave SIGTERM to jax, which makes all of them
    agree on the step to stop at; Ctrl-C then counts as SIGTERM. Without `catch`, in a program of others,
    only SIGTERM is listened to, until the block ends. answer: what is said to the first signal."""
    if _State.caught:
        _State.answer = answer
        _State.ask = ask if alone else lambda: os.kill(os.getpid(), signal.SIGTERM)
        if alone and threading.current_thread() is threading.main_thread():
            listen()      # of a run of one process jax may have taken SIGTERM
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
