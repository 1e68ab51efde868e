"""An HTTP server of the tests: it runs in a thread, and clients that hang up are no news."""
import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """What is wrong here shows in the client."""

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'


class QuietHandler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(server):
    """Answers inside the block."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
