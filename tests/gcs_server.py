"""As much of Google Cloud Storage's JSON interface as gcsfs, TensorStore and array_record use, on loopback,
in memory.

    with gcs_server() as env:        # environment variables that send all three here; the bucket is
    gs://bucket
        subprocess.run(..., env={**os.environ, **env})

One lock around every request gives what the real one gives: an object is there whole or not at all, listings
are up to date, and `ifGenerationMatch` is decided in one place."""
import contextlib
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

from local_server import LocalServer, QuietHandler, serving

BUCKET = 'bucket'
_PATH = re.compile(
    r'^/(?P<kind>upload/|download/)?storage/v1/b/(?P<bucket>[^/]+)(?P<objects>/o(/(?P<key>.+))?)?$')


@contextlib.contextmanager
def gcs_server():
    """Runs the server in a thread; yields the environment of its clients."""
    server = LocalServer(('127.0.0.1', 0), _Handler)
    server.lock, server.objects, server.generation, server.uploads = threading.RLock(), {}, 1000, {}
    url = server.url
    with serving(server):
        yield {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url,
               'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
               'CLOUD_STORAGE_EMULATOR_ENDPOINT': url, 'FSSPEC_GCS_TOKEN': 'anon',
               'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'GOOGLE_CLOUD_PROJECT': 'none'}


class _Handler(QuietHandler):
    disable_nagle_algorithm = True   # a request takes 40 ms otherwise
    wbufsize = 1 << 16

    def do_GET(self):
        self._handle(self._get)

    def do_DELETE(self):
        self._handle(self._delete)

    def do_POST(self):
        self._handle(self._post)

    do_PUT = do_POST

    def _handle(self, act):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        url = urlsplit(self.path)
        found = _PATH.match(url.path)
        self.query = {name: values[-1]
                      for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self.server.lock:
            if not found or found['bucket'] != BUCKET:
                return self._answer(404)
            self.kind, self.key = found['kind'], unquote(found['key'] or '')
            return self._answer(200, {'name': BUCKET}) if not found['objects'] else act(body)

    def _answer(self, status, content=b'', **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def _describe(self, key):
        data, generation = self.server.objects[key]
        return {'kind': 'storage#object', 'name': key, 'bucket': BUCKET, 'size': str(len(data)),
                'metageneration': '1', 'generation': str(generation), 'timeCreated': '2026-01-01T00:00:00Z',
                'updated': '2026-01-01T00:00:00Z'}

    def _get(self, _):
        if not self.key:
            return self._list()
        if self.key not in self.server.objects:
            return self._answer(404)
        data, generation = self.server.objects[self.key]
        if self.query.get('alt') != 'media' and not self.kind:
            return self._answer(200, self._describe(self.key))
        if self.query.get('ifGenerationNotMatch') == str(generation):
            return self._answer(304)
        headers = {'x_goog_generation': generation, 'x_goog_stored_content_length': len(data)}
        wanted = re.match(r'bytes=(\d+)-(\d*)$', self.headers.get('Range', ''))
        if not wanted:
            return self._answer(200, data, **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._answer(416)
        return self._answer(206, data[first:last + 1], Content_Range=f'bytes {first}-{last}/{len(data)}',
                            **headers)

    def _list(self):
        prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter', '')
        first, end = self.query.get('startOffset', ''), self.query.get('endOffset', '')
        items, folders = [], set()
        for key in sorted(self.server.objects):
            if not key.startswith(prefix) or key < first or end and key >= end:
                continue
            head, mark, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else ('', '', '')
            if mark:
                folders.add(prefix + head + mark)
            else:
                items.append(self._describe(key))
        limit = int(self.query.get('maxResults', 1000))
        return self._answer(200, {'kind': 'storage#objects', 'items': items[:limit],
                                  'prefixes': sorted(folders)[:limit]})

    def _delete(self, _):
        if self.key not in self.server.objects:
            return self._answer(404)
        if not self._generation_matches(self.key):
            return self._answer(412)
        del self.server.objects[self.key]
        return self._answer(204)

    def _post(self, body):
        kind = self.query['uploadType']
        if kind == 'multipart':
            boundary = re.search(r'boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
            _, about, content, _ = body.split(b'--' + boundary)
            key = json.loads(re.split(b'\r?\n\r?\n', about, maxsplit=1)[1])['name']
            return self._store(key, re.split(b'\r?\n\r?\n', content,
                                             maxsplit=1)[1].removesuffix(b'\n').removesuffix(b'\r'))
        if kind == 'media':
            return self._store(self.query['name'], body)
        if 'upload_id' not in self.query:
            self.server.uploads[str(len(self.server.uploads))] = b''
            number = len(self.server.uploads) - 1
            name = self.query.get('name') or json.loads(body)['name']
            place = f'http://{self.headers["Host"]}/upload/storage/v1/b/{BUCKET}/o'
            return self._answer(200, b'', Location=f'{place}?uploadType=resumable&name={name}'
                                                   f'&upload_id={number}')
        number = self.query['upload_id']
        self.server.uploads[number] += body
        if self.headers.get('Content-Range', '*').endswith('*'):
            return self._answer(308, b'', Range=f'bytes=0-{len(self.server.uploads[number]) - 1}')
        return self._store(self.query['name'], self.server.uploads[number])

    def _store(self, key, data):
        if not self._generation_matches(key):
            return self._answer(412)
        self.server.generation += 1
        self.server.objects[key] = data, self.server.generation
        return self._answer(200, self._describe(key))

    def _generation_matches(self, key):
        wanted = self.query.get('ifGenerationMatch')
        return wanted is None or int(wanted) == (self.server.objects[key][1] if key in self.server.objects
                                                 else 0)
