"""Opens the models, builds the page, and serves it to this machine until stopped (`app.py`)."""
import contextlib
import importlib.util
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from lit_jax.app.drawing import Studio, open_studio
from lit_jax.app.guard import LIMIT, Guard, Visitors
from lit_jax.checkpoint.model_folder import is_model_folder
from lit_jax.convert.torch_import import convert
from lit_jax.runtime import signals
from lit_jax.runtime.claim import claimed
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import cache_folder, file_sha256
from lit_jax.runtime.progress import unwatched
from lit_jax.runtime.shipped import find_asset

SHIPPED = find_asset('digits_dit.safetensors')
OFFLINE = {'GRADIO_ANALYTICS_ENABLED': 'False', 'GRADIO_SHARE': 'False', 'HF_HUB_OFFLINE': '1',
           'HF_HUB_DISABLE_TELEMETRY': '1'}
TRIED = 100        # ports searched for a free one
PATIENCE = 1.0     # seconds that the end waits for the server


def serve(*, host: str, port: int, source: str | None = None, **options) -> None:
    """Serves the page of a model (None: the shipped teacher) until stopped. options: of `open_studio`."""
    check_gradio()
    check_port(host, port)
    studio = open_studio(source or shipped_teacher(), **options)
    page = launch(studio, host, port)
    print(f'{", ".join(studio.titles)}: open http://{host}:{port} in a browser. Ctrl-C stops it.', flush=True)
    stop = threading.Event()
    with (contextlib.suppress(KeyboardInterrupt), unwatched(),      # it waits for its visitors
          signals.save_first(stop.set, alone=True, answer='the page is closed')):
        while page.is_running and not stop.wait(0.1):
            pass
    end(studio, page)


def end(studio: Studio, page) -> None:
    """Stops drawing and serving. A step or a compilation that cannot be interrupted ends with the process:
    nothing of the page is worth waiting for."""
    studio.close()
    closing = threading.Thread(target=page.close, kwargs={'verbose': False}, daemon=True)
    closing.start()
    with contextlib.suppress(KeyboardInterrupt):
        closing.join(PATIENCE)
    if studio.drawing or closing.is_alive():
        signals.leave(0)


def launch(studio: Studio, host: str, port: int):
    """The page of a studio, served by threads of this process until its `close` is called."""
    stay_offline(host)
    visitors = Visitors()
    with without_proxies():
        from starlette.middleware import Middleware

        from lit_jax.app.layout import STYLE, build_page, make_theme
        page = build_page(studio, visitors)

        def takes(action) -> int | None:
            return next((len(one.inputs) for number, one in page.fns.items()
                         if action in (number, one.api_name)), None)

        page.launch(server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                    ssr_mode=False, pwa=False, footer_links=[], theme=make_theme(), css_paths=STYLE,
                    show_error=False, max_file_size=LIMIT,
                    app_kwargs={'middleware': [Middleware(Guard, host=host, visitors=visitors, takes=takes)]})
    return page


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Gradio asks its own page once whether it is there. Its HTTP client prepares every proxy of the
    environment, needed or not, and fails for SOCKS without a package of its own."""
    kept = {name: os.environ.pop(name) for name in list(os.environ)
            if name.lower() in ('all_proxy', 'http_proxy', 'https_proxy')}
    try:
        yield
    finally:
        os.environ.update(kept)


def check_gradio() -> None:
    if importlib.util.find_spec('gradio') is None:
        raise UserError('the page needs Gradio, which is not installed: pip install "lit_jax[demo]"')


def stay_offline(host: str) -> None:
    """No analytics, no update check, no proxy for a local page. Call it before Gradio is imported."""
    os.environ.update(OFFLINE)
    for name in ('no_proxy', 'NO_PROXY'):
        known = [entry for entry in os.environ.get(name, '').split(',') if entry]
        os.environ[name] = ','.join(dict.fromkeys([*known, 'localhost', '127.0.0.1', host]))


def check_port(host: str, port: int) -> None:
    """Raises UserError for a port that cannot be used, and names a free one."""
    if not 1 <= port <= 65535:
        raise UserError(f'--port must lie between 1 and 65535, got {port}')
    if (problem := _bind(host, port)) is None:
        return
    if not isinstance(problem, socket.gaierror):
        first = max(port + 1, 1024)
        others = (other for other in range(first, min(first + TRIED, 65536)) if _bind(host, other) is None)
        if (free := next(others, None)) is not None:
            raise UserError(f'port {port} of {host} cannot be used ({problem.strerror}): give another, for '
                            f'example --port={free}')
    raise UserError(f'--host {host}: no port of it can be used here ({problem.strerror}); --host=127.0.0.1 '
                    f'is this machine alone, --host=0.0.0.0 every network it is in')


def _bind(host: str, port: int) -> OSError | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def shipped_teacher(root: Path | None = None) -> Path:
    """The model folder of the digits teacher in assets/, converted into the cache at first use."""
    if not SHIPPED.is_file():
        raise UserError(f'{SHIPPED} is not there; name a model with --from=DIR')
    folder = (root or cache_folder()) / 'models' / file_sha256(SHIPPED)[:12] / SHIPPED.stem
    if not is_model_folder(folder):
        with claimed(folder, wait=True):      # of several pages that start, one converts
            if not is_model_folder(folder):
                convert(SHIPPED, folder, overwrite=folder.exists())
    return folder
