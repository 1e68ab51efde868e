"""The page as a person meets it: in headless Chromium, through demo.py where nothing else is needed."""
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from sampling_models import save_model
from text_models import save_system, save_text_model

from lit_jax.app import serve
from lit_jax.app.drawing import open_studio

ROOT = Path(__file__).parents[2]
serve.stay_offline('127.0.0.1')
sync_api = pytest.importorskip('playwright.sync_api', reason='Playwright comes with the extra test')
pytest.importorskip('gradio', reason='Gradio comes with the extra demo')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))),
                None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='no chromium on the PATH')]
# The browser asks for nothing of its own.
QUIET = [f'--disable-{what}' for what in ('background-networking', 'component-update', 'sync', 'quic', 'gpu')]
# Keeps every text that the status has shown.
WATCH = """() => { window.said = []; const box = document.querySelector('#status');
    new MutationObserver(() => window.said.push(box.innerText)).observe(box,
        {subtree: true, childList: true, characterData: true}); }"""
# The bytes of the images of a gallery.
BYTES = """async (box) => Promise.all(
    [...document.querySelectorAll(box + ' .thumbnail-item img')].map(async (image) =>
    [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())].join()))"""


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', *QUIET])
        yield browser
        browser.close()


class Visit:
    """A page in the browser, and everything about it that must not happen."""

    def __init__(self, chromium, port, **options):
        self.home, self.outside, self.complaints = f'http://127.0.0.1:{port}', [], []
        self.tab = chromium.new_page(**{'viewport': {'width': 1280, 'height': 800}, **options})
        self.tab.set_default_timeout(90_000)
        self.tab.on('request', lambda request: self._look(request.url))
        self.tab.on('console', lambda message: self.complaints.append(message.text) if message.type == 'error'
                    else None)
        self.tab.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.tab.on('response', lambda answer: self.complaints.append(answer.url) if answer.status >= 400
                    else None)
        self.tab.goto(self.home)
        self.tab.wait_for_selector('#draw')
        self.tab.evaluate(WATCH)

    def _look(self, url):
        if not url.startswith((self.home, 'data:', 'blob:')):
            self.outside.append(url)

    def choose(self, box, name):
        self.tab.click(f'#{box} input')
        self.tab.get_by_role('option', name=name, exact=True).click()

    def fill(self, **values):
        for box, value in values.items():
            self.tab.fill(f'#{box} textarea, #{box} input[type=number]', str(value))

    def draw(self):
        """Presses the button; returns everything that the status said until the end, which comes last."""
        self.tab.evaluate("window.said = []; document.querySelector('.lit-status').dataset.old = true")
        self.tab.click('#draw')
        self.tab.wait_for_function(
            """() => { const now = document.querySelector('.lit-status:not([data-old])');
            return now && (now.role === 'alert' || now.innerText.startsWith('done in')); }""")
        self.tab.wait_for_function("!document.querySelector('#draw').disabled")
        return [*self.tab.evaluate('window.said'), self.tab.inner_text('.lit-status')]

    def images(self, gallery=0, count=None):
        box = f'#gallery{gallery}'
        if count is not None:
            self.tab.wait_for_function(f"document.querySelectorAll('{box} .thumbnail-item img').length === "
                                       f"{count}")
        return self.tab.evaluate(BYTES, box)

    def end(self):
        assert self.outside == [] and self.complaints == []
        self.tab.close()


@pytest.fixture
def page_of():
    """Serves studios; page_of(studio) -> port."""
    pages = []

    def serve_one(studio):
        port = free_port()
        pages.append(serve.launch(studio, '127.0.0.1', port))
        return port

    yield serve_one
    for page in pages:
        page.close(verbose=False)


def test_classes_of_a_teacher_and_its_student(chromium, page_of, tmp_path):
    student = save_model(tmp_path / 'student', mixer='linear', seed=1)
    visit = Visit(chromium, page_of(open_studio(student, teacher=save_model(tmp_path / 'teacher'))))
    visit.choose('class', '3: name 3')
    visit.fill(steps=60, count=4)
    said = visit.draw()
    assert any('teacher: teacher: compiling' in text for text in said), "\n".join(said)
    assert any('step ' in text and ' of 60' in text for text in said) and 'draw again' in said[-1]
    first = [visit.images(gallery, 4) for gallery in (0, 1)]
    assert first[0] != first[1] and len(set(first[0])) == 4
    for gallery in (0, 1):
        assert 'a step' in visit.tab.inner_text(f'#timing{gallery}') and 'compiled' in visit.tab.inner_text(
            f'#timing{gallery}')
    assert visit.tab.locator('#gallery0 .caption-label').all_inner_texts() == 4 * ['name 3']

    with visit.tab.expect_download() as saved:
        visit.tab.click('#save')
    with Image.open(saved.value.path()) as sheet:
        assert saved.value.suggested_filename == 'grid.png' and sheet.width > 4 * 32 * 2

    visit.fill(seed=1)
    assert 'times as long as' in visit.draw()[-1]
    assert visit.images(0, 4) != first[0] and 'compiled' not in visit.tab.inner_text('#timing0')
    visit.fill(seed=0)
    visit.draw()
    assert [visit.images(gallery, 4) for gallery in (0, 1)] == first
    visit.end()


def test_mistakes_are_messages(chromium, page_of, tmp_path):
    visit = Visit(chromium, page_of(open_studio(save_model(tmp_path / 'model'))))
    for values, message in (({'steps': 0}, 'at least 1 step'), ({'steps': 2000}, '2000'),
                            ({'steps': 2, 'seed': -1}, 'seed')):
        visit.fill(**values)
        said = visit.draw()[-1]
        assert message in said and 'Traceback' not in said
        assert visit.tab.locator('[role=alert]').count() == 1 and visit.images() == []
    visit.fill(seed=0)
    assert visit.draw()[-1].startswith('done in')           # and the page goes on
    visit.tab.click('#new_seed')
    visit.tab.wait_for_function("document.querySelector('#seed input').value !== '0'")
    visit.end()


def test_prompts(chromium, page_of, tmp_path):
    system = save_system(tmp_path / 't2i')
    teacher = save_text_model(tmp_path / 'teacher', mixer='softmax')
    visit = Visit(chromium, page_of(open_studio(**system, teacher=teacher)))
    visit.fill(prompt='a red circle', steps=3, count=2, width=24)
    assert 'the prompt read in' in visit.draw()[-1]
    drawn = [visit.images(gallery, 2) for gallery in (0, 1)]
    assert drawn[0] != drawn[1]
    shapes = visit.tab.eval_on_selector_all('#gallery0 .thumbnail-item img',
                                            'all => all.map(i => i.naturalWidth / i.naturalHeight)')
    assert shapes == [1.5, 1.5]
    visit.fill(prompt='')
    assert 'the prompt is empty' in visit.draw()[-1]
    visit.fill(width=23)
    assert 'multiples of 4' in visit.draw()[-1]
    visit.end()


def test_demo_py_draws_the_shipped_digits(chromium, tmp_path):
    """Out of the box: without arguments, in a cache that is empty; and on a telephone, in the dark."""
    port = free_port()
    process = subprocess.Popen([sys.executable, 'demo.py', f'--port={port}'], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, 'XLA_FLAGS': '', 'LIT_JAX_CACHE': str(tmp_path)})
    try:
        said = next(line for line in process.stdout if 'starting: ' not in line)
        assert f'http://127.0.0.1:{port}' in said
        visit = Visit(chromium, port, viewport={'width': 400, 'height': 800}, color_scheme='dark')
        visit.fill(steps=10)
        visit.draw()
        assert len(set(visit.images(0, 10))) == 10
        assert visit.tab.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
        visit.end()
    finally:
        process.terminate()
        began = time.monotonic()
        process.wait(30)
    assert time.monotonic() - began < 20
