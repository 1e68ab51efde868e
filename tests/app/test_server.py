"""The page as a server: who may ask, what the API makes of wrong requests, and how a drawing ends early."""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sampling_models import save_model

from lit_jax.app import serve
from lit_jax.app.drawing import open_studio

serve.stay_offline('127.0.0.1')
pytest.importorskip('gradio', reason='Gradio comes with the extra demo')
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RIGHT = [3, 0, 2, 4, 'ddim', 2.0]
FILE = {'_type': 'gradio.FileData'}
LONG = [3, 0, 16, 1000, 'ddim', 2.0]


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Client:
    """One who talks to the page's API."""

    def __init__(self, port):
        self.port = port

    def ask(self, method, path, body=None, **headers):
        line = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        line.request(method, path, body, {'Content-Type': 'application/json', **headers})
        return line.getresponse()

    def begin(self, data):
        """The stream of a drawing."""
        answer = self.ask('POST', '/gradio_api/call/draw', json.dumps({'data': data}))
        assert answer.status == 200, answer.read()
        return self.ask('GET', f'/gradio_api/call/draw/{json.loads(answer.read())["event_id"]}')

    def draw(self, data):
        """(the last status, everything that came) of a drawing."""
        said = self.begin(data).read().decode()
        lines = [line.removeprefix('data: ') for line in said.splitlines() if line.startswith('data: ')]
        last = json.loads(lines[-1])
        return (last[1] if isinstance(last, list) else str(last)), said


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    """(the studio, a client)"""
    studio = open_studio(save_model(tmp_path_factory.mktemp('models') / 'tiny'))
    port = free_port()
    page = serve.launch(studio, '127.0.0.1', port)
    yield studio, Client(port)
    page.close(verbose=False)


def test_other_pages_neither_draw_nor_read(served):
    _, client = served
    draw = json.dumps({'data': RIGHT})
    for headers in ({'Host': 'evil.example'}, {'Origin': 'http://evil.example'}, {'Origin': 'null'}):
        assert client.ask('POST', '/gradio_api/call/draw', draw, **headers).status in (403, 421)
        assert client.ask('GET', '/config', **headers).status in (403, 421)
    assert client.ask('GET', '/config').status == 200
    assert client.ask('POST', '/gradio_api/upload', b'x').status == 403
    assert client.ask('POST', '/gradio_api/call/draw', b'x' * 300_000).status == 413


def test_wrong_requests_get_one_message_and_the_terminal_no_traceback(served, capfd):
    _, client = served
    for place in range(len(RIGHT)):
        for wrong in (None, [], {}, 'x', [1], True, 1e300, 10 ** 30):
            data = [*RIGHT]
            data[place] = wrong
            status, said = client.draw(data)
            assert 'role="alert"' in status and 'Error' not in status, (place, wrong, said)
            assert len(status) < 400
    for number, file in enumerate(({'path': '/etc/passwd', 'meta': FILE}, [{'url': 'http://127.0.0.1:9/x'}],
                                   {'path': '\0', 'meta': FILE}, {'path': 'x' * 5000, 'meta': FILE})):
        body = json.dumps({'data': [*RIGHT[:number], file, *RIGHT[number + 1:]]})
        answer = client.ask('POST', '/gradio_api/call/draw', body)
        assert answer.status == 400 and answer.read().count(b'\n') == 1
    for unknown in ('call/draw/nope', 'queue/data?session_hash=x', 'call/nope/nope'):
        answer = client.ask('GET', f'/gradio_api/{unknown}')
        assert answer.status == 404 and answer.read().count(b'\n') == 1, unknown
    wrong = [], RIGHT[:-1], 1, [10 ** 400, *RIGHT[1:]], [*RIGHT[:4], '\ud800', 1]
    for body in ('', '[' * 100_000, 'null', *(json.dumps({'data': data}) for data in wrong)):
        answer = client.ask('POST', '/gradio_api/call/draw', body)
        assert answer.status == 400 and answer.read().count(b'\n') == 1, body[:20]
    assert 'done in' in client.draw(RIGHT)[0]
    out, err = capfd.readouterr()
    assert 'Traceback' not in out + err and 'ERROR' not in out + err


def wait_until(what, seconds):
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


def test_who_leaves_stops_the_drawing_and_the_next_one_is_whole(served):
    studio, client = served
    first = client.draw(RIGHT)[0]
    client.draw(LONG)                  # compiled
    streams = [client.begin(LONG) for _ in range(3)]
    wait_until(lambda: studio.drawing, 5)
    for stream in streams:
        stream.readline()
        stream.close()
    wait_until(lambda: not studio.drawing, 1)
    time.sleep(0.3)                    # and the others do not begin
    assert not studio.drawing
    assert 'done in' in first and 'done in' in client.draw(RIGHT)[0]


@pytest.mark.parametrize('proxy', [None, 'socks5://127.0.0.1:9'])
def test_ctrl_c_ends_within_two_seconds_while_it_draws(tmp_path, proxy):
    """Also where a proxy is set that Gradio's client cannot use."""
    port = free_port()
    proxies = {} if proxy is None else dict.fromkeys(('ALL_PROXY', 'all_proxy', 'HTTPS_PROXY'), proxy)
    process = subprocess.Popen([sys.executable, 'app.py', f'--port={port}',
                                f'--from={save_model(tmp_path / "model")}'], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, 'XLA_FLAGS': '', **proxies},
                               # A test started in the background would hand down that it is ignored.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        while f'http://127.0.0.1:{port}' not in (said := process.stdout.readline()):
            assert said      # a slow machine is told first that it starts
        stream = Client(port).begin(LONG)
        while 'step ' not in stream.readline().decode():
            pass
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert time.monotonic() - began < 2
        assert 'Traceback' not in process.stdout.read()
    finally:
        process.kill()
