"""Lays out the page and updates it when the button is pressed; `lit_jax.app.drawing` draws."""
import html
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr

from lit_jax.app.drawing import EACH, MOST, DrawRequest, State, Studio, enlarge
from lit_jax.app.guard import Visitors
from lit_jax.diffusion.kinds import read_diffusion
from lit_jax.diffusion.settings import CLASSES, PROMPTS
from lit_jax.report.grids import save_png
from lit_jax.runtime.errors import UserError, reason_of, shown
from lit_jax.sampling.model_pipeline import what_is_drawn

LOG = logging.getLogger('lit_jax')
STYLE = Path(__file__).with_name('style.css')
READY = 'ready: the first drawing with new settings compiles a program for them'


def make_theme() -> gr.themes.Base:
    """System fonts only: nothing is downloaded."""
    fonts = {'font': ('system-ui', 'sans-serif'), 'font_mono': ('ui-monospace', 'monospace')}
    return gr.themes.Base(primary_hue='indigo', neutral_hue='slate', radius_size='md', **fonts).set(
        block_title_text_weight='600', block_border_width='1px', button_primary_text_color='white',
        button_primary_background_fill='*primary_600', button_primary_background_fill_hover='*primary_700')


def build_page(studio: Studio, visitors: Visitors | None = None) -> gr.Blocks:
    """The page of a studio, not yet served. visitors: a drawing stops when its visitor has left."""
    visitors = visitors or Visitors()
    options = {'analytics_enabled': False, 'fill_width': True, 'delete_cache': (600, 3600)}      # seconds
    with gr.Blocks(title=f'lit_jax: {studio.pipeline.name}', **options) as page:
        _bare(_head(studio))
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                asked, button = _controls(studio)
            with gr.Column(scale=7, min_width=340):
                status = _bare(status_html(State(READY)), elem_id='status')
                galleries = _panels(studio)
                save = gr.DownloadButton('Save a sheet', size='sm', interactive=False, elem_id='save')
                with gr.Accordion('The same images from the command line', open=False):
                    command = gr.Textbox(show_label=False, interactive=False, lines=2, buttons=['copy'],
                                         elem_id='command')
        outputs = [button, status, command, save, *galleries]

        def draw(request: gr.Request, *values):
            session, since = request.session_hash, time.monotonic()
            yield from show(studio, values, lambda: visitors.gone(session, since))

        wake = [button.click, *(box.submit for box in asked if isinstance(box, gr.Textbox))]
        gr.on(wake, draw, asked, outputs, show_progress='hidden', concurrency_limit=None, trigger_mode='once',
              api_name='draw', preprocess=False)       # `read_request` checks what came
    return page


def _controls(studio: Studio) -> tuple[list, gr.Button]:
    """(the inputs in the order of `read_request`, the button)."""
    default = studio.default
    if studio.takes == 'text':
        what = [gr.Textbox(label='Prompt', elem_id='prompt', placeholder='what the image shows', lines=2,
                           max_lines=6),
                gr.Textbox(label='Negative prompt', elem_id='negative', placeholder='what to avoid')]
    else:
        classes = [('each class in turn', EACH),
                   *((_class_name(i, name), i) for i, name in enumerate(studio.classes))]
        what = [gr.Dropdown(classes, value=EACH, label='Class', elem_id='class',
                            filterable=len(classes) > 20)]
    button = gr.Button('Draw', variant='primary', size='lg', elem_id='draw')
    with gr.Row():
        seed = gr.Number(default.seed, label='Seed', precision=None, scale=3, min_width=120, elem_id='seed')
        new_seed = gr.Button('New seed', size='md', scale=2, min_width=90, elem_id='new_seed')
    new_seed.click(lambda: random.randrange(1 << 32), None, seed, show_progress='hidden', api_name=False)
    count = gr.Slider(1, MOST, default.count, step=1, label='Images', elem_id='count')
    with gr.Row():
        steps = gr.Number(default.settings.steps, label='Steps', min_width=90, elem_id='steps')
        methods = read_diffusion(studio.pipelines[0].config['diffusion']).methods
        method = gr.Dropdown(list(methods), value=default.settings.method, label='Sampler', filterable=False,
                             min_width=130, elem_id='method')
    scale = gr.Slider(0, 12, default.settings.cfg_scale, step=0.1, label='Guidance scale', info='1: none',
                      elem_id='cfg_scale')
    size = []
    if studio.takes == 'text':
        height, width = default.size
        with gr.Row():
            size = [gr.Number(value, label=name.capitalize(), min_width=90, elem_id=name)
                    for name, value in (('width', width), ('height', height))]
    return [*what, seed, count, steps, method, scale, *size], button


def _class_name(number: int, name: str) -> str:
    return name if name == f'class {number}' or name == str(number) else f'{number}: {name}'


def read_request(takes: str, values) -> DrawRequest:
    """The request in the controls, as it came. Raises UserError for values of other types."""
    if takes == 'text':
        prompt, negative, seed, count, steps, method, scale, width, height = values
        what = {'prompt': _text('prompt', prompt), 'negative': _text('negative prompt', negative),
                'size': (_whole('height', height), _whole('width', width))}
    else:
        label, seed, count, steps, method, scale = values
        what = {'label': _whole('class', label)}
    if not _is_number(scale):
        raise UserError(f'the guidance scale must be a number, got {shown(scale)}')
    method = _text('sampler', method)
    settings = replace(PROMPTS if takes == 'text' else CLASSES, method=method,
                       steps=_whole('number of steps', steps), cfg_scale=float(scale))
    return DrawRequest(**what, seed=_whole('seed', seed), count=_whole('number of images', count),
                       settings=settings)


def _whole(name: str, value) -> int:
    if value is None:
        raise UserError(f'the {name} is missing: give a whole number')
    if not _is_number(value) or value != int(value):
        raise UserError(f'the {name} must be a whole number, got {shown(value)}')
    return int(value)


def _is_number(value) -> bool:
    """Finite, and of a size that any setting could have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63


def _text(name: str, value) -> str:
    if not isinstance(value, str | None):
        raise UserError(f'the {name} must be a text, got {shown(value)}')
    return value or ''


def show(studio: Studio, values, gone: Callable[[], bool] = lambda: False) -> Iterator[list]:
    """[button, status, command, button that saves, (gallery, timing) of each model] again and again, while
    `values` is drawn. gone: see `Studio.draw`."""
    keep = [gr.skip()] * (2 * len(studio.pipelines))
    ready, busy = gr.Button('Draw', interactive=True), gr.Button('Drawing …', interactive=False)
    try:
        request = read_request(studio.takes, values)
        seen = 0
        for state in studio.draw(request, gone):
            new = list(keep)
            for number, panel in enumerate(state.panels[seen:], seen):
                images = [(enlarge(image), caption)
                          for image, caption in zip(panel.images, panel.captions, strict=True)]
                alone = len(studio.pipelines) == 1
                columns = max(1, min(len(images), 4 + alone, math.ceil(math.sqrt(len(images))) + alone))
                new[2 * number:2 * number + 2] = (gr.Gallery(images, columns=columns),
                                                  timing_html(panel.timing.describe()))
            seen = len(state.panels)
            if not state.finished:
                yield [busy, status_html(state), gr.skip(), gr.DownloadButton(interactive=False), *new]
                continue
            with tempfile.TemporaryDirectory(prefix='lit_jax_page_') as folder:
                sheet = Path(folder) / 'grid.png'
                save_png(sheet, studio.sheet(request, state.panels))
                yield [ready, status_html(state), studio.command(request),      # the server keeps a copy
                       gr.DownloadButton(value=str(sheet), interactive=True), *new]
    except UserError as error:
        yield [ready, error_html(str(error)), gr.skip(), gr.skip(), *keep]
    except Exception as error:
        LOG.exception('the page could not draw %s', shown(values))
        yield [ready, error_html(f'{reason_of(error)}\nThe terminal shows where.'),
               gr.skip(), gr.skip(), *keep]


def _head(studio: Studio) -> str:
    what = 'a teacher and its student, from the same noise' if len(studio.pipelines) == 2 \
        else 'a diffusion transformer'
    return (f'<div class="lit-head"><h1>lit_jax</h1><p>{html.escape(what)}, drawing '
            f'{what_is_drawn(studio.takes)}, on this machine</p></div>')


def _panels(studio: Studio) -> list:
    """A gallery and a line of timing for each model, side by side."""
    parts = []
    with gr.Row(equal_height=False):
        for number, (title, facts) in enumerate(zip(studio.titles, studio.facts, strict=True)):
            with gr.Column(min_width=260):
                _bare(f'<p class="lit-title">{html.escape(title)}</p>'
                      f'<p class="lit-facts">{html.escape(facts)}</p>')
                gallery = gr.Gallery(format='png', show_label=False, interactive=False, height='auto',
                                     object_fit='contain', buttons=['download', 'fullscreen'],
                                     elem_id=f'gallery{number}', elem_classes='lit-gallery')
                parts += [gallery, _bare(timing_html(''), elem_id=f'timing{number}')]
    return parts


def _bare(value: str, **options) -> gr.HTML:
    """HTML without a box around it."""
    return gr.HTML(value, padding=False, elem_classes='lit-bare', **options)


def timing_html(text: str) -> str:
    first, _, rest = html.escape(text).partition(' · ')
    return f'<p class="lit-timing"><b>{first}</b>{f" · {rest}" if rest else ""}</p>'


def status_html(state: State) -> str:
    """What is going on, a progress bar, and notices."""
    clock = '' if state.text == READY or state.finished else f'{state.seconds:.1f} s'
    said = f'<div class="said"><span>{html.escape(state.text)}</span><span class="clock">{clock}</span></div>'
    if state.finished or state.text == READY:
        bar = ''
    elif state.fraction is None:
        bar = '<div class="bar unknown"><div></div></div>'
    else:
        bar = f'<div class="bar"><div style="width: {100 * state.fraction:.1f}%"></div></div>'
    notices = ''.join(f'<li>{html.escape(notice)}</li>' for notice in state.notices)
    notices = notices and f'<ul>{notices}</ul>'
    return f'<div class="lit-status" role="status">{said}{bar}{notices}</div>'


def error_html(text: str) -> str:
    """A message about a request that cannot be met, without the dashes of a flag that it begins with."""
    return f'<div class="lit-status error" role="alert">{html.escape(text.removeprefix("--"))}</div>'
