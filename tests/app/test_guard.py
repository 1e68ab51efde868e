"""What the server of the page lets in, without a server; and who counts as gone."""
import asyncio
import time

import pytest

from lit_jax.app.guard import LATE, LEFT, LIMIT, Guard, Visitors, knows_host

HOME = '127.0.0.1:7860'
RIGHT = b'{"fn_index": 1, "data": [1, 2]}'
TAKES = {1: 2, 'draw': 2}.get


def ask(method='GET', path='/', headers=(), body=(RIGHT,), served='127.0.0.1', visitors=None, within=None):
    """(status, what the page behind the guard received) of a request; within: called by the page."""
    received, sent = [], []
    parts = [{'type': 'http.request', 'body': part, 'more_body': i < len(body) - 1}
             for i, part in enumerate(body)]

    async def page(scope, receive, send):
        received.append((await receive())['body'])
        if within:
            within()
        await send({'type': 'http.response.start', 'status': 200, 'headers': []})

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    heads = [(name.lower().encode(), value.encode())
             for name, value in ({'Host': HOME} | dict(headers)).items() if value is not None]
    path, _, query = path.partition('?')
    scope = {'type': 'http', 'method': method, 'path': path, 'query_string': query.encode(), 'headers': heads}
    asyncio.run(Guard(page, served, visitors or Visitors(), TAKES)(scope, receive, send))
    return sent[0]['status'], received


@pytest.mark.parametrize('host, known', [
    (HOME, True), ('localhost:7860', True), ('[::1]:7860', True), ('LOCALHOST:9000', True),
    ('127.0.0.1', True), ('evil.example', False), ('evil.example:7860', False),
    ('127.0.0.1.evil.example', False), ('', False),
    ('127.0.0.1@evil.example', False), ('192.168.0.7:7860', False), ('[::1', False), ('\x00', False)])
def test_hosts(host, known):
    assert knows_host(host, '127.0.0.1') == known
    status, received = ask(headers={'Host': host})
    assert (status, len(received)) == ((200, 1) if known else (421, 0))


def test_a_page_for_the_network_is_known_by_addresses_and_no_other_name():
    assert knows_host('192.168.0.7:7860', '0.0.0.0') and knows_host('[fe80::1]:7860', '::')
    assert not knows_host('evil.example:7860', '0.0.0.0')
    assert knows_host('box.lan:7860', 'box.lan') and ask(headers={'Host': None})[0] == 421


@pytest.mark.parametrize('origin, status', [
    ('http://' + HOME, 200), ('https://' + HOME, 200), (None, 200), ('null', 403),
    ('http://evil.example', 403), ('http://localhost:7860', 403), ('http://127.0.0.1:1', 403),
    ('file://', 403), ('http://[', 403)])
def test_origins(origin, status):
    assert ask('POST', '/gradio_api/queue/join', {'Origin': origin})[0] == status


@pytest.mark.parametrize('method, path, status', [
    ('POST', '/gradio_api/queue/join', 200), ('POST', '/gradio_api/call/draw', 200),
    ('GET', '/gradio_api/info', 200), ('POST', '/gradio_api/upload', 403), ('POST', '/upload', 403),
    ('GET', '/gradio_api/upload_progress', 403), ('PUT', '/', 403), ('POST', '/gradio_api/stream/event', 403),
    ('POST', '/gradio_api/component_server', 403), ('OPTIONS', '/gradio_api/queue/join', 403)])
def test_what_may_be_sent(method, path, status):
    assert ask(method, path)[0] == status


def test_bodies_are_limited_whatever_they_say_of_themselves():
    join = 'POST', '/gradio_api/queue/join'
    whole = [RIGHT, b' ' * (LIMIT - len(RIGHT))]
    assert ask(*join, body=whole) == (200, [b''.join(whole)])
    assert ask(*join, body=[*whole, b'a']) == (413, [])
    for length in (LIMIT + 1, -1, 'many', '9' * 5000):
        assert ask(*join, {'Content-Length': str(length)}) == (413, [])


@pytest.mark.parametrize('body', [
    b'', b'[', b'[' * 100_000, b'null', b'{}', b'{"data": 1, "fn_index": 1}', b'\xff', b'1' * 6000,
    b'{"data": [1], "fn_index": 1}', b'{"data": [1, 2], "fn_index": 9}', b'{"data": [1, 2], "fn_index": []}'])
def test_bodies_of_other_shapes(body):
    assert ask('POST', '/gradio_api/queue/join', body=[body]) == (400, [])


@pytest.mark.parametrize('field', ['path', 'url', 'meta', '\\u0070ath'])
@pytest.mark.parametrize('where', ['[FILE, 2]', '[1, [FILE]]', '[1, {"a": [{"b": FILE}]}]'])
@pytest.mark.parametrize('path', ['queue/join', 'call/draw', 'cancel', 'reset'])
def test_no_request_names_a_file(field, where, path):
    body = '{"fn_index": 1, "data": WHERE}'.replace('WHERE', where)
    for file, status in (f'{{"{field}": "/etc/passwd"}}', 400), ('{"text": "path"}', 200):
        answer = ask('POST', f'/gradio_api/{path}', body=[body.replace('FILE', file).encode()])
        assert answer[0] == status and bool(answer[1]) == (status == 200)
    outside = body.replace('FILE', '0')[:-1] + f', "event_data": {{"{field}": 1}}}}'
    assert ask('POST', f'/gradio_api/{path}', body=[outside.encode()]) == (400, [])


@pytest.mark.parametrize('path', ['/gradio_api/queue/data?session_hash=me', '/gradio_api/call/draw/me'])
def test_who_listens_is_there_and_who_stopped_is_gone(path, monkeypatch):
    visitors, now = Visitors(), [100.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    assert not visitors.gone('me', 100.0) and not visitors.gone(None, 0.0)
    ask(path=path, visitors=visitors, within=lambda: (now.__setitem__(0, 200.0),
                                                       seen.append(visitors.gone('me', 100.0))))
    assert seen == [False] and not visitors.gone('me', 100.0)
    now[0] += LEFT + 0.01
    assert visitors.gone('me', 100.0)
    assert not visitors.gone('me', now[0])           # a later request of the same page
    now[0] += LATE + 0.01
    assert visitors.gone('nobody', 100.0)


seen: list = []


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()
