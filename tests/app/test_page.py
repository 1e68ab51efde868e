"""The page without a browser: what stands on it, what it makes of its controls, and how it is begun."""
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_models import save_model

from lit_jax.app import serve
from lit_jax.app.drawing import EACH, open_studio
from lit_jax.runtime.errors import UserError

serve.stay_offline('127.0.0.1')
pytest.importorskip('gradio', reason='Gradio comes with the extra demo')
from lit_jax.app import layout as page  # noqa: E402

VALUES = {'label': 3, 'seed': 0, 'count': 2, 'steps': 2, 'method': 'ddim', 'scale': 2.0}


@pytest.fixture(scope='module')
def studio(tmp_path_factory):
    return open_studio(save_model(tmp_path_factory.mktemp('models') / 'tiny'))


def values(**changes):
    return list({**VALUES, **changes}.values())


def test_what_stands_on_the_page(studio):
    built = page.build_page(studio)
    parts = {part['props'].get('elem_id'): part['props'] for part in built.config['components']}
    assert [label for label, _ in parts['class']['choices']] == ['each class in turn',
                                                                 *(f'{i}: name {i}' for i in range(10))]
    assert parts['method']['value'] == 'ddpm' and parts['steps']['value'] == 50 and parts['gallery0'][
        'format'] == 'png'
    assert 'gallery1' not in parts and 'prompt' not in parts


def test_nothing_is_fetched_from_elsewhere():
    style = page.make_theme()._get_theme_css() + page.STYLE.read_text()
    elsewhere = [url for url in re.findall(r'https?://[^\s\'"]+', style)
                 if url != 'http://www.w3.org/2000/svg']
    assert 'system-ui' in style and elsewhere == [] and '@import' not in style


def test_a_press_of_the_button(studio):
    button, status, command, save, gallery, timing = list(page.show(studio, values()))[-1]
    assert button.interactive and 'done in' in status and '--classes=3' in command and 'a step' in timing
    assert len(gallery.value) == 2 and save.interactive


@pytest.mark.parametrize('changes, message', [
    ({'steps': 0}, 'at least 1 step'), ({'steps': 2.5}, 'whole number'),
    ({'steps': None}, 'steps is missing'), ({'seed': None}, 'seed is missing'),
    ({'seed': float('inf')}, 'whole number'), ({'scale': None}, 'guidance'), ({'label': None}, 'class')])
def test_bad_input_is_a_message_and_the_button_comes_back(studio, changes, message):
    (button, status, *rest), = page.show(studio, values(**changes))
    assert button.interactive and message in status and 'role="alert"' in status and 'Traceback' not in status
    assert len(rest) == 4


def test_what_nobody_thought_of_is_a_message_too(studio, monkeypatch, caplog):
    monkeypatch.setattr(type(studio), 'draw', lambda self, request, gone: iter([1 / 0]))
    (button, status, *_), = page.show(studio, values())
    assert button.interactive and 'division by zero' in status and 'could not draw' in caplog.text


def test_what_a_person_wrote_is_no_html():
    assert '&lt;b&gt;' in page.error_html('<b>') and '&lt;b&gt;' in page.status_html(
        page.State('', notices=('<b>',)))


def test_requests_for_prompts():
    request = page.read_request('text', ['a fox', None, 1, 4, 20, 'dpm++', 4.5, 64, 32.0])
    assert (request.prompt, request.negative, request.size, request.count) == ('a fox', '', (32, 64), 4)
    assert page.read_request('label', values(label=EACH)).label == EACH


def test_a_port_in_use_names_another():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf'port {port} of 127.0.0.1 .* --port=\d+'):
            serve.check_port('127.0.0.1', port)
    serve.check_port('127.0.0.1', port)
    with pytest.raises(UserError, match='between 1 and 65535'):
        serve.check_port('127.0.0.1', 70000)
    with pytest.raises(UserError, match='--host 192.0.2.1'):
        serve.check_port('192.0.2.1', 7860)


def test_without_gradio_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'pip install "lit_jax\[demo\]"'):
        serve.serve(host='127.0.0.1', port=7860)


@pytest.mark.parametrize('arguments, message', [
    (['--from=/no/such/model'], 'does not exist'), (['--share'], 'unknown flag --share')])
def test_a_wrong_command_gets_one_message(arguments, message):
    done = subprocess.run([sys.executable, 'demo.py', *arguments], cwd=Path(__file__).parents[2],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})
    assert done.returncode in (1, 2) and message in done.stderr and 'Traceback' not in done.stderr
