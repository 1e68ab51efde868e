"""Says every 20 seconds what a command is doing, and which program it compiles; stops it with its parent.

One thread watches from outside, so that no long work has to report by itself; `progress.working` gives it
words. Lines go to the log; while a bar is shown on a terminal only long compilations are said."""
import logging
import os
import signal
import sys
import threading
import time

from lit_jax.runtime import progress, signals

LOG = logging.getLogger('lit_jax')
QUIET_SECONDS = 20.0       # without a line, before one is said
GREETING_SECONDS = 1.0     # from the start of a command, before it says that it starts
COMPILE_SECONDS = 10.0     # of one compilation, before it is announced
PARENT = 'LIT_JAX_PARENT'  # environment: the process id with which this command ends
_GRACE = 15.0              # seconds to save a checkpoint in
_LOWERED, _COMPILED = 'jaxpr_to_mlir_module_duration', 'backend_compile_duration'


class Alive:
    """The watching thread of a command; `start` once, `stop` before a last message, which its lines would
    part."""

    def __init__(self, *, quiet: float = QUIET_SECONDS, compile_seconds: float = COMPILE_SECONDS):
        self._quiet, self._limit = quiet, compile_seconds
        self._began = time.monotonic()
        self._compiling: dict[int, tuple[str, float]] = {}      # by thread: (program, since)
        self._announced: set[int] = set()
        self._listening, self._ended = False, threading.Event()

    def stop(self) -> None:
        self._ended.set()

    def start(self, greeting: str = '') -> 'Alive':
        """greeting: said after a second in which nothing else was."""
        threading.Thread(target=self._watch, args=(greeting,), daemon=True, name='alive').start()
        return self

    def _watch(self, greeting: str) -> None:
        if self._ended.wait(GREETING_SECONDS if greeting else 0):
            return
        if greeting and progress.seconds_quiet() >= GREETING_SECONDS:
            LOG.info('%s', greeting)
        while not self._ended.wait(min(1.0, self._limit / 4, self._quiet / 4)):
            self.look()

    def look(self) -> None:
        """One look: says what is due."""
        # Never imported here: the main thread may be on its way through jax, and the two would wait for each
        # other.
        register = getattr(sys.modules.get('jax.monitoring'), 'register_event_duration_secs_listener', None)
        if not self._listening and register is not None:
            register(self.on_event)
            self._listening = True
        now = time.monotonic()
        for thread, (name, since) in list(self._compiling.items()):
            if now - since >= self._limit and thread not in self._announced:
                self._announced.add(thread)
                LOG.info('compiling %s, %s so far', name, progress.format_seconds(now - since))
        if progress.seconds_quiet() >= self._quiet and (text := self._describe(now)):
            progress.heard()
            LOG.info('%s', text)

    def _describe(self, now: float) -> str:
        """What is being done; '' if nothing is to be said."""
        if progress.silent():
            return ''
        said = [f'compiling {name}, {progress.format_seconds(now - since)} so far'
                for thread, (name, since) in list(self._compiling.items()) if thread in self._announced]
        said += [text] if (text := progress.current()) else []
        return '; '.join(said) or f'still working, {progress.format_seconds(now - self._began)} so far'

    def on_event(self, event: str, duration_secs: float, **more: str | int) -> None:
        """Listens to jax: a program is compiled from when it is lowered to the end of the compilation."""
        thread = threading.get_ident()
        if event.endswith(_LOWERED):
            name = str(more.get('fun_name', '')).removeprefix('jit(').removesuffix(')')
            self._compiling[thread] = name if name.isidentifier() else 'a program', time.monotonic()
            self._announced.discard(thread)
        elif event.endswith(_COMPILED) and (found := self._compiling.pop(thread, None)):
            if duration_secs >= self._limit:
                LOG.info('compiled %s in %s', found[0], progress.format_seconds(duration_secs))


def stop_with_parent(parent: int | None = None) -> None:
    """From now on this process ends when its parent does: it may save first, as after SIGTERM.

    parent: its process id; default: of the environment variable PARENT, without which nothing happens."""
    parent = parent or int(os.environ.get(PARENT, 0))
    if parent:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True, name='parent').start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    signals.leave(1)
