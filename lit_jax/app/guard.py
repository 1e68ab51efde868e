"""What the server of the page lets in: requests of its own page, small ones, and no uploads.

A page of another site whose owner points its name at this machine (DNS rebinding) carries that name in Host;
one that simply sends requests carries its own in Origin. Neither may draw, nor read what was drawn. Gradio
takes some mappings for files, which it would read or fetch before this page sees them: none is let in."""
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.json_file import parse_json

LIMIT = 1 << 18                        # bytes of a request's body
BEGIN = ('/queue/join', '/call/draw')  # ends of the paths that begin an action
POSTS = (*BEGIN, '/reset', '/cancel')
EVERYWHERE = ('', '0.0.0.0', '::')
FILES = {'path', 'url', 'meta'}        # fields of what Gradio takes for a file
UNKNOWN = b'404: Not Found'            # in what it streams to an unknown session, before it breaks off
LEFT, LATE = 0.3, 5.0                  # seconds: without a stream that was open, or that never came
REMEMBERED = 1000                      # visitors who left


class Visitors:
    """Which sessions listen to the results of their requests."""

    def __init__(self):
        self._lock, self._open, self._left = threading.Lock(), {}, {}

    def enter(self, session: str) -> None:
        with self._lock:
            self._open[session] = self._open.get(session, 0) + 1

    def leave(self, session: str) -> None:
        with self._lock:
            self._open[session] -= 1
            if not self._open[session]:
                del self._open[session]
            self._left.pop(session, None)
            self._left[session] = time.monotonic()
            while len(self._left) > REMEMBERED:
                del self._left[next(iter(self._left))]

    def gone(self, session: str | None, since: float) -> bool:
        """Whether nobody listens any more to a request that came at `since` (time.monotonic())."""
        if session is None:
            return False
        with self._lock:
            if session in self._open:
                return False
            left, now = self._left.get(session, 0.0), time.monotonic()
        return now - left > LEFT if left > since else now - since > LATE


class Guard:
    """ASGI middleware around the page.

    host: the address that is served, see `knows_host`.
    takes: how many values an action of the page takes, by its number or name; None for unknown ones."""

    def __init__(self, app, host: str, visitors: Visitors, takes: Callable[[object], int | None]):
        self.app, self.host, self.visitors, self.takes = app, host, visitors, takes

    async def __call__(self, scope, receive, send) -> None:
        if scope['type'] == 'lifespan':
            await self.app(scope, receive, send)
        elif scope['type'] != 'http':
            await send({'type': 'websocket.close', 'code': 1008})
        elif (problem := self.problem(scope)) is not None:
            await _refuse(send, *problem)
        elif (body := await _read(receive)) is None:
            await _refuse(send, 413, f'a request may have {LIMIT:,} bytes')
        elif scope['method'] == 'POST' and (wrong := self.problem_of(scope['path'], body)) is not None:
            await _refuse(send, 400, wrong)
        elif (session := listening(scope)) is None:
            await self.app(scope, _replay(body, receive), send)
        else:
            self.visitors.enter(session)
            try:
                await _stream(self.app, scope, _replay(body, receive), send)
            finally:
                self.visitors.leave(session)

    def problem(self, scope) -> tuple[int, str] | None:
        """(HTTP status, why) of a request that is refused for its head."""
        headers = {name.decode('latin-1').lower(): value.decode('latin-1')
                   for name, value in scope['headers']}
        hosts = [value for name, value in scope['headers'] if name.lower() == b'host']
        host, origin = headers.get('host', ''), headers.get('origin')
        if len(hosts) != 1 or not knows_host(host, self.host):
            return 421, 'this page is served under the address that app.py printed, and no other name'
        if origin is not None and not _same(origin, host):
            return 403, 'requests of other pages are refused'
        method, path = scope['method'], scope['path']
        if method not in ('GET', 'HEAD', 'POST') or 'upload' in path.lower() \
                or method == 'POST' and not path.endswith(POSTS):
            return 403, 'this page draws, and takes no uploads'
        length = headers.get('content-length', '0')
        if not re.fullmatch(r'[0-9]{1,18}', length) or int(length) > LIMIT:
            return 413, f'a request may have {LIMIT:,} bytes'
        return None

    def problem_of(self, path: str, body: bytes) -> str | None:
        """Why a request with a body is refused for it."""
        try:
            asked = parse_json(body, 'the request', {})
        except UserError as error:
            return str(error)
        if _names_file(asked):
            return 'the request names a file or an address: this page takes texts and numbers'
        if not path.endswith(BEGIN):
            return None
        action = asked.get('fn_index') if path.endswith('/queue/join') else 'draw'
        data = asked.get('data')
        takes = self.takes(action) if isinstance(action, int | str) else None
        if takes is None:
            return f'the request names no action of this page: fn_index is {shown(action)}'
        if not isinstance(data, list) or len(data) != takes:
            given = f'{len(data)} values' if isinstance(data, list) else shown(data)
            return f'the request must have "data", a list of {takes} values; got {given}'
        return None


def _names_file(value) -> bool:
    """Whether any mapping in it has a field of a file."""
    if isinstance(value, dict):
        return not FILES.isdisjoint(value) or any(map(_names_file, value.values()))
    return isinstance(value, list) and any(map(_names_file, value))


def knows_host(header: str, served: str) -> bool:
    """Whether a Host header names this server. The port may be another one, of a tunnel. A page that is
    served everywhere is also known by any address in digits: those cannot be rebound."""
    try:
        name = urlsplit(f'//{header}').hostname or ''
    except ValueError:
        return False
    if name in ('localhost', '127.0.0.1', '::1', served.lower()):
        return bool(name)
    if served not in EVERYWHERE:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in (socket.gethostname().lower(), f'{socket.gethostname().lower()}.local')
    return True


def _same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ('http', 'https') and parts.netloc.lower() == host.lower()


def listening(scope) -> str | None:
    """The session whose results a request streams: of the page, or of the API."""
    if scope['method'] != 'GET':
        return None
    if scope['path'].endswith('/queue/data'):
        return parse_qs(scope['query_string'].decode('latin-1')).get('session_hash', [None])[0]
    found = re.search(r'/call/[^/]+/([^/]+)$', scope['path'])
    return found and found[1]


async def _read(receive) -> bytes | None:
    """The body; None where it is longer than LIMIT."""
    body, more = b'', True
    while more:
        message = await receive()
        body += message.get('body', b'')
        if len(body) > LIMIT:
            return None
        more = message['type'] == 'http.request' and message.get('more_body', False)
    return body


def _replay(body: bytes, receive):
    """`receive` that gives the body again, then what follows it."""
    first = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def again():
        return first.pop() if first else await receive()

    return again


async def _stream(app, scope, receive, send) -> None:
    """A stream of results; 404 for an unknown session, of which Gradio would begin one and break it off."""
    held = []

    async def hold(message):
        held.append(message)
        if message['type'] != 'http.response.start' and UNKNOWN not in message.get('body', b''):
            while held:
                await send(held.pop(0))

    try:
        await app(scope, receive, hold)
    except RuntimeError:      # "response already started"; but it is held
        if not any(UNKNOWN in message.get('body', b'') for message in held):
            raise
        await _refuse(send, 404, 'there is no such drawing, or it has ended')
        return
    for message in held:
        await send(message)


async def _refuse(send, status: int, why: str) -> None:
    await send({'type': 'http.response.start', 'status': status, 'headers': [
        (b'content-type', b'text/plain; charset=utf-8'), (b'connection', b'close')]})
    await send({'type': 'http.response.body', 'body': f'{why}\n'.encode()})
