"""Draws a page's requests, without a browser: one model, or a teacher and its student from the same noise.

    studio = open_studio('runs/digits_lit', teacher='models/digits_dit')
    for state in studio.draw(DrawRequest(label=3, count=4)):
        print(state.text, state.fraction)
    state.panels[0].images                                     # uint8 [4, 8, 8, 1], the teacher's
"""
import logging
import queue
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from lit_jax.checkpoint.load import read_weights_config
from lit_jax.diffusion.settings import CLASSES, SamplerSettings
from lit_jax.models.arch import conditioning
from lit_jax.report.grids import viewable
from lit_jax.runtime.errors import UserError, shown
from lit_jax.sampling.decoder import check_comparable
from lit_jax.sampling.draw import lay_out
from lit_jax.sampling.groups import GROUP
from lit_jax.sampling.labels import shared_names
from lit_jax.sampling.model_pipeline import Pipeline, Stopped, what_is_drawn
from lit_jax.sampling.noise import check_seed
from lit_jax.sampling.pipelines import open_pipeline

HEARTBEAT, PAUSE = 0.5, 0.08       # seconds between two states, at most and at least
SHOWN = 256                        # pixels: about the side that small images are enlarged to
EACH = -1                          # as a label: one class after the other
MOST = GROUP                       # images at once: one group
LETTERS = 10_000                   # of a prompt; models read a few hundred


@dataclass(frozen=True)
class DrawRequest:
    """label: for classes. prompt, negative, size (height, width): for prompts; image i has seed + i."""
    label: int = EACH
    prompt: str = ''
    negative: str = ''
    seed: int = 0
    count: int = 4
    settings: SamplerSettings = CLASSES
    size: tuple[int, int] | None = None

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + i) % (1 << 32) for i in range(self.count)]


@dataclass(frozen=True)
class Timing:
    """Seconds. compiling: before the first step; None where an earlier request compiled the program."""
    compiling: float | None
    drawing: float
    decoding: float
    steps: int

    @property
    def per_step(self) -> float:
        return self.drawing / self.steps

    def describe(self) -> str:
        total = f'{say_seconds(self.drawing)} for {self.steps} steps'
        parts = [f'{say_seconds(self.per_step)} a step', total]
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
    """Progress of a request. Each state includes the earlier ones, so that some may be skipped.
    fraction: of the steps of all models, None if unknown. panels: of the models that are done."""
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
    """RGB uint8 for the screen; small images get a square per pixel."""
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
    """The models of a page; draws one request at a time, others wait. pipelines: [teacher,] model."""

    def __init__(self, pipelines: list[Pipeline], options: tuple[str, ...] = ()):
        check_comparable(pipelines)
        self.pipelines, self.pipeline = pipelines, pipelines[-1]
        self.takes, self.options, self._turn = self.pipeline.takes, options, threading.Lock()
        self._closed = threading.Event()
        self.facts = [pipeline.network.describe() for pipeline in pipelines]
        names = [pipeline.name for pipeline in pipelines]
        self.titles = names if len(names) == 1 else [f'teacher: {names[0]}', f'student: {names[1]}']

    @property
    def classes(self) -> list[str]:
        """Names of the classes, from whichever model knows them."""
        return shared_names(self.pipelines, range(self.pipeline.network.null_label))

    @property
    def drawing(self) -> bool:
        return self._turn.locked()

    def close(self) -> None:
        """Stops what is drawn, at its next step, and refuses what comes."""
        self._closed.set()

    @property
    def default(self) -> DrawRequest:
        """The request on the page when it opens."""
        size = self.pipeline.nominal_size
        if self.takes == 'label':
            return DrawRequest(settings=self.pipeline.defaults, count=10)
        return DrawRequest(settings=self.pipeline.defaults, count=1 if max(size) > 256 else 4, size=size)

    def check(self, request: DrawRequest) -> None:
        """Raises UserError for a request that cannot be met."""
        check_seed(request.seed)
        if not 1 <= request.count <= MOST:
            raise UserError(f'the number of images must lie between 1 and {MOST}, got {request.count}')
        for name, text in (('prompt', request.prompt), ('negative prompt', request.negative)):
            _check_text(name, text)
        for pipeline in self.pipelines:
            pipeline.check(request.settings, request.size)
            if self.takes == 'label':
                pipeline.encode(self.shown(request), request.seed)

    def shown(self, request: DrawRequest) -> list:
        """The class or the prompt of each image."""
        if self.takes == 'text':
            return [request.prompt] * request.count
        known = self.pipeline.network.null_label
        return [i % known if request.label == EACH else request.label for i in range(request.count)]

    def draw(self, request: DrawRequest, gone: Callable[[], bool] = lambda: False) -> Iterator[State]:
        """States, the last `finished`. A thread draws; it stops at its next step when `gone()` is true, or
        the iterator or the studio is closed. Raises UserError."""
        self.check(request)
        left = threading.Event()

        def stopped() -> bool:
            return left.is_set() or self._closed.is_set() or gone()

        told: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(request, told.put, stopped), name='drawing',
                                  daemon=True)
        state = State('waiting for the images of another page' if self._turn.locked() else 'beginning')
        thread.start()
        try:
            while not state.finished:
                yield state
                time.sleep(PAUSE)
                state = _newest(told, state)
            yield state
        finally:
            left.set()

    def sheet(self, request: DrawRequest, panels: tuple[Panel, ...]) -> np.ndarray:
        """One uint8 image of all that was drawn, as sample.py lays it out."""
        text, shown = self.takes == 'text', self.shown(request)
        each = not text and request.label == EACH
        rows = shared_names(self.pipelines, shown if each else shown[:1]) if not text else \
            [request.prompt or '(no text)']
        return lay_out([panel.images for panel in panels], self.titles, 1 if each else request.count, rows,
                       text=text)

    def command(self, request: DrawRequest) -> str:
        """The command line that draws the last model's images."""
        if self.takes == 'text':
            height, width = request.size or self.pipeline.nominal_size
            negative = [f'--negative_prompt={request.negative}'] if request.negative else []
            what = [f'--prompt={request.prompt}', *negative, '--seeds=' + ','.join(map(str, request.seeds)),
                    f'--size={width}x{height}']
        else:
            each = request.label == EACH
            classes = self.shown(request) if each else [request.label]
            what = ['--classes=' + ','.join(map(str, classes)),
                    f'--per_class={1 if each else request.count}', f'--seed={request.seed}']
        settings = request.settings
        return shlex.join(['python', 'sample.py', '--from=' + self.pipeline.source, *self.options, *what,
                           f'--method={settings.method}', f'--steps={settings.steps}',
                           f'--cfg_scale={settings.cfg_scale:g}', '--out=grid.png'])

    def _work(self, request: DrawRequest, told: Callable, stopped: Callable[[], bool]) -> None:
        """Tells states, last the finished one or the error."""
        def tell(state: State) -> None:
            if stopped():
                raise Stopped
            told(state)

        try:
            while not self._turn.acquire(timeout=0.1):
                if stopped():
                    raise Stopped
            try:
                with _Notices() as notices:
                    tell(self._draw_all(request, tell, notices.texts))
            finally:
                self._turn.release()
        except Stopped:
            told(UserError('the drawing was stopped'))
        except Exception as error:      # `draw` raises it again, in the thread that waits for it
            told(error)

    def _draw_all(self, request: DrawRequest, tell, notices: list[str]) -> State:
        state = State('reading the prompt' if self.takes == 'text' else 'beginning')
        if self.takes == 'text' and not request.prompt.strip():
            notices.append('the prompt is empty: it draws without text')
        if self.pipeline.false_colours:
            notices.append('latents in false colours: start the page with --vae DIR to decode them')
        tell(state)
        seeds = request.seeds if self.takes == 'text' else request.seed
        images, read = _timed(lambda: self.pipeline.encode(self.shown(request), seeds, request.negative))
        for number in range(len(self.pipelines)):
            state = replace(state, notices=tuple(notices))

            def tell_part(text, part, state=state, number=number):
                tell(replace(state, text=text,
                             fraction=None if part is None else (number + part) / len(self.pipelines)))

            state = replace(state, panels=(*state.panels, self._draw_one(number, request, images, tell_part)))
        return replace(state, text=_summary(state, read if self.takes == 'text' else None), fraction=1.0,
                       notices=tuple(notices), finished=True)

    def _draw_one(self, number: int, request: DrawRequest, images, tell) -> Panel:
        """tell: called with (text, fraction of this model's steps or None)."""
        title, pipeline, settings = self.titles[number], self.pipelines[number], request.settings
        compiled = pipeline.is_compiled(request.count, settings, request.size)
        tell(f'{title}: reading the weights', None)
        pipeline.load('model')
        doing = 'beginning' if compiled else 'compiling for these settings, the first time only'
        tell(f'{title}: {doing}', None)
        first: list[float] = []

        def on_step(done: int, total: int) -> None:
            if not first:
                first.append(time.perf_counter())
            tell(f'{title}: step {done} of {total}', (done - 1) / total)

        began = time.perf_counter()
        latents = pipeline.draw(images, settings, size=request.size, on_step=on_step)
        ended = time.perf_counter()
        started = first[0] if first and not compiled else began
        tell(f'{title}: decoding', 1.0)
        drawn, decoding = _timed(lambda: viewable(self.pipeline.decode(
            latents, on_image=lambda: tell(f'{title}: decoding', 1.0))))
        timing = Timing(None if compiled else started - began, ended - started, decoding, settings.steps)
        shown = self.shown(request)
        captions = shared_names(self.pipelines, shown) if self.takes == 'label' \
            else pipeline.captions(shown, request.seeds)
        return Panel(title, drawn, tuple(captions), timing)


def _check_text(name: str, text: str) -> None:
    if len(text) > LETTERS:
        raise UserError(f'the {name} has {len(text):,} characters; give at most {LETTERS:,}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f'the {name} holds half a character at place {error.start + 1} '
                        f'({shown(text[error.start])}): type it again') from None


def _timed(work):
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _newest(told: queue.SimpleQueue, state: State) -> State:
    """The last state told, or the old one again after HEARTBEAT; raises an error that was told."""
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


def open_studio(source, *, teacher=None, vae: str | None = None, text_encoder: str | None = None,
                dtype: str = 'float32', text_dtype: str | None = None, low_memory: bool = False) -> Studio:
    """The models of a page from their folders (`app.py`). UserError for what does not belong together."""
    sources = [source] if teacher is None else [teacher, source]
    kinds = [conditioning(read_weights_config(path)['model']) for path in sources]
    if len(set(kinds)) > 1:
        raise UserError(f'{source} draws {what_is_drawn(kinds[1])}, {teacher} draws '
                        f'{what_is_drawn(kinds[0])}: they cannot stand side by side')
    pipelines = [open_pipeline(path, vae, text_encoder, dtype=dtype, text_dtype=text_dtype,
                               low_memory=low_memory) for path in sources]
    if kinds[0] == 'label':      # so that an unreadable model is reported before the page opens
        for pipeline in pipelines:
            pipeline.load('model')
    used = {'vae': vae, 'text_encoder': text_encoder, 'text_dtype': text_dtype}
    flags = [f'--{name}={value}' for name, value in used.items() if value] + ['--low_memory'] * low_memory
    return Studio(pipelines, (*flags, *([f'--dtype={dtype}'] if dtype != 'float32' else ())))
