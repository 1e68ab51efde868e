"""As much of the Hugging Face hub's HTTP interface as huggingface_hub uses for models, on loopback, in
memory.

    with hub_server() as hub:        # hub.env: environment variables that send a client here
        subprocess.run(..., env={**os.environ, **hub.env})

Files over 1 kB are large: they go up by their sha256 and are not asked for twice."""
import base64
import contextlib
import hashlib
import json
import re
import threading
from urllib.parse import unquote, urlsplit

from local_server import LocalServer, QuietHandler, serving

TOKEN = 'hf_of_the_tests'
LARGE = 1000


@contextlib.contextmanager
def hub_server():
    """Runs the server in a thread. repos: {name: {path: bytes}}; blobs: {sha256: bytes}; puts: their sha256,
    as they came; refuse, cut, spoil: how many uploads are still to fail, downloads to stop halfway, and to be
    damaged; ranges: where downloads went on."""
    server = _Server(('127.0.0.1', 0), _Handler)
    server.repos, server.blobs, server.puts, server.ranges = {}, {}, [], []
    server.refuse = server.cut = server.spoil = 0
    server.lock = threading.RLock()
    server.env = {'HF_ENDPOINT': server.url, 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
                  'HF_TOKEN': TOKEN, 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
    with serving(server):
        yield server


class _Server(LocalServer):
    def sha(self, name):
        """The version of a repository: a digest of what it holds."""
        return hashlib.sha1(repr(sorted(self.repos[name].items())).encode()).hexdigest()


class _Handler(QuietHandler):
    def do_GET(self):
        self._handle('GET')

    def do_HEAD(self):
        self._handle('HEAD')

    def do_POST(self):
        self._handle('POST')

    def do_PUT(self):
        self._handle('PUT')

    def _handle(self, method):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            for pattern, act in ROUTES:
                if found := re.fullmatch(pattern, f'{method} {path}'):
                    return act(self, body, *found.groups())
            return self._answer(404, {'error': 'not here'})

    def _answer(self, status, content=b'', **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def _knows(self):
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def whoami(self, body):
        return self._answer(200, {'name': 'me'}) if self._knows() else self._answer(401, {'error': 'no'})

    def create(self, body):
        if not self._knows():
            return self._answer(401, {'error': 'no token'})
        asked = json.loads(body)
        name = f'{asked["organization"]}/{asked["name"]}'
        if name.startswith('them/'):
            return self._answer(403, {'error': 'not yours'})
        self.server.repos.setdefault(name, {})
        return self._answer(200, {'url': f'{self.server.url}/{name}'})

    def yaml(self, body):
        return self._answer(200, {'errors': [], 'warnings': []})

    def preupload(self, body, name, _):
        kinds = [{'path': file['path'], 'shouldIgnore': False,
                  'uploadMode': 'lfs' if file['size'] > LARGE else 'regular'}
                 for file in json.loads(body)['files']]
        return self._answer(200, {'files': kinds})

    def batch(self, body, name):
        objects = json.loads(body)['objects']
        for item in objects:
            if item['oid'] not in self.server.blobs:
                item['actions'] = {'upload': {'href': f'{self.server.url}/blobs/{item["oid"]}'}}
        return self._answer(200, {'transfer': 'basic', 'objects': objects})

    def put(self, body, sha256):
        if self.server.refuse:
            self.server.refuse -= 1
            return self._answer(400, {'error': 'the line broke'})
        assert hashlib.sha256(body).hexdigest() == sha256
        self.server.puts.append(sha256)
        self.server.blobs[sha256] = body
        return self._answer(200)

    def commit(self, body, name, _):
        files = self.server.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'deletedFile':
                files.pop(value['path'], None)
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.server.blobs[value['oid']]
        sha = self.server.sha(name)
        return self._answer(200, {'success': True, 'commitOid': sha,
                                  'commitUrl': f'{self.server.url}/{name}/commit/{sha}', 'hookOutput': ''})

    def info(self, body, name, *_):
        if name not in self.server.repos:
            return self._answer(404, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
        siblings = [{'rfilename': path} for path in self.server.repos[name]]
        return self._answer(200, {'id': name, 'sha': self.server.sha(name), 'siblings': siblings,
                                  'private': False})

    def tree(self, body, name, *_):
        if name not in self.server.repos:
            return self._answer(404, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
        return self._answer(200, [{'type': 'file', 'path': path, 'size': len(data), 'oid': _digest(data)[:40],
                                   **({'lfs': {'oid': _digest(data), 'size': len(data), 'pointerSize': 100}}
                                      if len(data) > LARGE else {})}
                                  for path, data in self.server.repos[name].items()])

    def _stop_halfway(self, data, headers):
        self.send_response(200)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2])
        self.wfile.flush()
        self.close_connection = True

    def resolve(self, body, name, _, path):
        data = self.server.repos.get(name, {}).get(path)
        if data is None:
            return self._answer(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound')
        headers = {'ETag': f'"{_digest(data)}"', 'X_Repo_Commit': self.server.sha(name),
                   'Accept_Ranges': 'bytes'}
        if self.command == 'GET' and len(data) > LARGE:
            if self.server.cut:
                self.server.cut -= 1
                return self._stop_halfway(data, headers)
            if self.server.spoil:
                self.server.spoil -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
        start = re.match(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if start:
            self.server.ranges.append(int(start[1]))
            part = data[int(start[1]):]
            there = f'bytes {start[1]}-{len(data) - 1}/{len(data)}'
            return self._answer(206, part, Content_Range=there, **headers)
        return self._answer(200, data, **headers)


def _digest(data):
    return hashlib.sha256(data).hexdigest()


_REPO = r'([^/]+/[^/]+)'
ROUTES = [(r'GET /api/whoami-v2', _Handler.whoami),
          (r'POST /api/repos/create', _Handler.create),
          (r'POST /api/validate-yaml', _Handler.yaml),
          (rf'POST /api/models/{_REPO}/preupload/(.+)', _Handler.preupload),
          (rf'POST /{_REPO}\.git/info/lfs/objects/batch', _Handler.batch),
          (r'PUT /blobs/(\w+)', _Handler.put),
          (rf'POST /api/models/{_REPO}/commit/(.+)', _Handler.commit),
          (rf'GET /api/models/{_REPO}/tree/(.+)', _Handler.tree),
          (rf'GET /api/models/{_REPO}(?:/revision/(.+))?', _Handler.info),
          (rf'(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)', _Handler.resolve)]
