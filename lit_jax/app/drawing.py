"""From a wish to images, without a browser: one model, or a teacher and its student from the same noise.

    studio = open_studio('runs/digits_lit', teacher='models/digits_dit')
    for state in studio.draw(Wish(label=3, count=4)):
        print(state.text, state.fraction)
    state.panels[0].images                                     # uint8 [4, 8, 8, 1], the teacher's
"""
import logging
import queue
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from lit_jax.app.painters import ClassPainter, TextPainter, Wish, describe_network
from lit_jax.checkpoint.load import read_weights_config
from lit_jax.models.arch import conditioning
from lit_jax.report.grids import viewable
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.decoder import check_comparable

HEARTBEAT, PAUSE = 0.5, 0.08       # seconds: between two states at most and at least
SHOWN = 256                        # pixels of a side that small images are enlarged to, about
Painter = ClassPainter | TextPainter


@dataclass(frozen=True)
class Timing:
    """Seconds. compiling: of the program, before its first step; None where an earlier wish had left it."""
    compiling: float | None
    drawing: float
    decoding: float
    steps: int

    @property
    def per_step(self) -> float:
        return self.drawing / self.steps

    def describe(self) -> str:
        parts = [f'{say_seconds(self.per_step)} a step',
                 f'{say_seconds(self.drawing)} for {self.steps} steps']
        if self.decoding >= 0.001:
            parts.append(f'decoded in {say_seconds(self.decoding)}')
        if self.compiling is not None:
            parts.append(f'compiled once, before that, in {say_seconds(self.compiling)}')
        return ' · '.join(parts)


@dataclass(frozen=True)
class Panel:
    """What one model drew: images uint8 [N, H, W, 1 or 3], a caption for each, and how long it took."""
    title: str
    images: np.ndarray
    captions: tuple[str, ...]
    timing: Timing


@dataclass(frozen=True)
class State:
    """How far a wish is. Each state holds all that the earlier ones told, so that some may be left out.

    fraction: of the steps of all models, None while nobody knows. panels: of the models that are done.
    """
    text: str
    fraction: float | None = None
    panels: tuple[Panel, ...] = ()
    notices: tuple[str, ...] = ()
    finished: bool = False
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def say_seconds(seconds: float) -> str:
    return f'{1000 * seconds:.3g} ms' if seconds < 1 else f'{seconds:.3g} s' if seconds < 100 \
        else f'{seconds:.0f} s'


def enlarge(image_HWC: np.ndarray) -> np.ndarray:
    """RGB uint8 for the screen: small images with every pixel as a square."""
    scale = max(1, SHOWN // max(image_HWC.shape[:2]))
    return np.broadcast_to(image_HWC, (*image_HWC.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)


class _Notices(logging.Handler):
    """Collects the warnings that lit_jax logs from one thread, inside `with`."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts, self._thread = [], threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.texts.append(record.getMessage())

    def __enter__(self) -> '_Notices':
        logging.getLogger('lit_jax').addHandler(self)
        return self

    def __exit__(self, *error) -> None:
        logging.getLogger('lit_jax').removeHandler(self)


class Studio:
    """The models of a page; one wish at a time is drawn, others wait. painters: [teacher,] model."""

    def __init__(self, painter: Painter, teacher: Painter | None = None, options: tuple[str, ...] = ()):
        if teacher is not None:
            check_comparable([teacher.config, painter.config], [teacher.source, painter.source])
            painter.check_teacher(teacher)
        self.painter, self.painters = painter, [painter] if teacher is None else [teacher, painter]
        self.options, self._turn = options, threading.Lock()

    @property
    def takes(self) -> str:
        """'label' or 'text'."""
        return self.painter.takes

    @property
    def titles(self) -> list[str]:
        names = [painter.name for painter in self.painters]
        return names if len(names) == 1 else [f'{role}: {name}'
                                              for role, name in zip(('teacher', 'student'), names,
                                                                    strict=True)]

    @property
    def facts(self) -> list[str]:
        """A line about each model."""
        return [describe_network(painter.network) for painter in self.painters]

    @property
    def false_colours(self) -> bool:
        return self.painter.vae is None and self.painter.config['latent']['space'] != 'pixels'

    def check(self, wish: Wish) -> None:
        """Raises UserError for a wish that cannot be drawn."""
        for painter in self.painters:
            painter.check(wish)

    def draw(self, wish: Wish) -> Iterator[State]:
        """States until the last, which is `finished`; the drawing goes on in a thread, whoever waits or not.

        Raises UserError for a wish that cannot be drawn."""
        self.check(wish)
        told: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(wish, told.put), name='drawing', daemon=True)
        state = State('waiting for the images of another page' if self._turn.locked() else 'beginning')
        thread.start()
        while not state.finished:
            yield state
            time.sleep(PAUSE)
            state = _newest(told, state)
        yield state

    def command(self, wish: Wish) -> str:
        """The command line that draws the images of the last model."""
        flags = ['--from=' + self.painter.source, *self.options, *self.painter.arguments(wish),
                 f'--method={wish.method}', f'--steps={wish.steps}', f'--cfg_scale={wish.cfg_scale:g}',
                 '--out=grid.png']
        return shlex.join(['python', 'sample.py', *flags])

    # ------------------------------------------------------------------------------------------------------
    # In the thread

    def _work(self, wish: Wish, tell) -> None:
        """Tells states, and as the last thing the finished one or what went wrong."""
        try:
            with self._turn, _Notices() as notices:
                tell(self._draw_all(wish, tell, notices.texts))
        except Exception as error:      # `draw` raises it again, in the thread that waits for it
            tell(error)

    def _draw_all(self, wish: Wish, tell, notices: list[str]) -> State:
        state = State('reading the prompt' if self.takes == 'text' else 'beginning')
        if self.takes == 'text' and not wish.prompt.strip():
            notices.append('the prompt is empty: it draws without text')
        if self.false_colours:
            notices.append('latents in false colours: start the page with --vae DIR to decode them')
        tell(state)
        features, read = _timed(lambda: self.painter.encode(wish))
        for number, painter in enumerate(self.painters):
            state = replace(state, notices=tuple(notices))
            panel = self._draw_one(number, painter, wish, features,
                                   lambda text, part, state=state, number=number: tell(replace(
state, text=text, fraction=None if part is None else (number + part) / len(self.painters))))
            state = replace(state, panels=(*state.panels, panel))
        return replace(state, text=_summary(state, read if self.takes == 'text' else None), fraction=1.0,
                       notices=tuple(notices), finished=True)

    def _draw_one(self, number: int, painter: Painter, wish: Wish, features, tell) -> Panel:
        """tell: called with (text, fraction of this model's steps or None)."""
        title, compiled = self.titles[number], painter.is_compiled(wish)
        tell(f'{title}: reading the weights', None)
        painter.load()
        tell(f'{title}: {"beginning" if compiled else "compiling for these settings, the first time only"}',
             None)
        first: list[float] = []

        def on_step(done: int, total: int) -> None:
            if not first:
                first.append(time.perf_counter())
            tell(f'{title}: step {done} of {total}', (done - 1) / total)

        began = time.perf_counter()
        latents = painter.draw(wish, features, on_step)
        ended = time.perf_counter()
        started = first[0] if first and not compiled else began
        tell(f'{title}: decoding', 1.0)
        images, decoding = _timed(lambda: viewable(self.painter.decode(latents)))
        timing = Timing(None if compiled else started - began, ended - started, decoding, wish.steps)
        return Panel(title, images, tuple(painter.captions(wish)), timing)


def _timed(work):
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _newest(told: queue.SimpleQueue, state: State) -> State:
    """The last thing that was told, or the old state again after HEARTBEAT; an error is raised."""
    try:
        state = told.get(timeout=HEARTBEAT)
        while not told.empty():
            state = told.get_nowait()
    except queue.Empty:
        pass
    if isinstance(state, Exception):
        raise state
    return state


def _summary(state: State, read: float | None) -> str:
    text = f'done in {say_seconds(state.seconds)}'
    if read is not None:
        text += f', the prompt read in {say_seconds(read)}'
    if len(state.panels) == 2 and any(panel.timing.compiling is not None for panel in state.panels):
        text += '; draw again to compare the times: the first run of a program is slower'
    elif len(state.panels) == 2:
        teacher, student = (panel.timing.per_step for panel in state.panels)
        text += f'; a step of the student takes {student / teacher:.2f} times as long as the teacher\'s'
    return text


# ------------------------------------------------------------------------------------------------------
# Opening


def open_studio(source, *, teacher=None, vae: str | None = None, text_encoder: str | None = None,
                dtype: str = 'float32', text_dtype: str | None = None, low_memory: bool = False) -> Studio:
    """The models of a page from their folders: see `demo.py`. Raises UserError for what does not belong
    together."""
    sources = [source] if teacher is None else [source, teacher]
    kinds = [conditioning(read_weights_config(path)['model']) for path in sources]
    if len(set(kinds)) > 1:
        raise UserError(f'{source} draws {_drawn(kinds[0])}, {teacher} draws {_drawn(kinds[1])}: they cannot '
                        f'stand side by side')
    used = ('vae', vae), ('text_encoder', text_encoder), ('text_dtype', text_dtype)
    flags = (*(f'--{name}={value}' for name, value in used if value),
             *(['--low_memory'] if low_memory else []), *([f'--dtype={dtype}'] if dtype != 'float32' else []))
    if kinds[0] == 'label':
        if foreign := [flag for flag in flags if flag.startswith(('--text', '--low'))]:
            raise UserError(f'{", ".join(foreign)}: not for {source}, which draws classes: leave it out')
        painters = [ClassPainter(path, vae if i == 0 else None, dtype=dtype)
                    for i, path in enumerate(sources)]
    else:
        options = {'dtype': dtype, 'text_dtype': text_dtype, 'low_memory': low_memory}
        painters = [TextPainter(path, vae, text_encoder, **options) for path in sources]
    return Studio(*painters, options=flags)


def _drawn(kind: str) -> str:
    return 'what a prompt says' if kind == 'text' else 'classes'
