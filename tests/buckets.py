"""A make-believe object store behind gs:// paths, as flat as a real one: keys and bytes, no folders, no
renaming.

    def test_x(bucket):                      # with: from buckets import bucket  # noqa: F401
        (as_path(bucket) / 'a' / 'b.txt').write_text('x')

etils reaches it through fsspec, as it reaches Google's. TensorStore, and so the arrays of Orbax, does not
come by here; claims, which are written through it, have a memory of their own."""
import io

import fsspec
import pytest
import tensorstore
from fsspec.spec import AbstractFileSystem

from lit_jax.runtime import claim


class Store(AbstractFileSystem):
    """Takes the place of gcsfs."""
    protocol = ('gs', 'gcs')
    cachable = False
    objects: dict[str, bytes] = {}
    broken: OSError | None = None     # what every request raises, while set

    def _check(self, path: str) -> str:
        if Store.broken is not None:
            raise Store.broken
        path = self._strip_protocol(path)
        if path.split('/')[0] != 'bucket':
            raise FileNotFoundError(f'b/{path.split("/")[0]}')
        return path

    def ls(self, path, detail=True, **_):
        path = self._check(path)
        names = {path} if path in self.objects else {
            path + '/' + name.removeprefix(path + '/').split('/')[0] for name in self.objects
            if name.startswith(path + '/')}
        entries = [self.info(name) for name in sorted(names)]
        return entries if detail else [entry['name'] for entry in entries]

    def info(self, path, **_):
        path = self._check(path)
        if path in self.objects:
            return {'name': path, 'size': len(self.objects[path]), 'type': 'file'}
        if path == 'bucket' or any(name.startswith(path + '/') for name in self.objects):
            return {'name': path, 'size': 0, 'type': 'directory'}
        raise FileNotFoundError(path)

    def exists(self, path, **_):
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **_):
        path = self._check(path)
        found = {name: self.info(name) for name in sorted(self.objects) if name == path
                 or name.startswith(path + '/')}
        return found if detail else list(found)

    def _open(self, path, mode='rb', **_):
        path = self._check(path)
        if mode == 'wb':
            return Upload(path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return io.BytesIO(self.objects[path])

    def rm(self, path, recursive=False, **_):
        found = self.find(path)
        if not found:
            raise FileNotFoundError(path)
        if not recursive and found != [self._strip_protocol(path)]:
            raise IsADirectoryError(path)
        for name in found:
            del self.objects[name]

    def mkdir(self, path, **_):
        self._check(path)

    def makedirs(self, path, exist_ok=False):
        self._check(path)

    def mv(self, *_, **__):
        raise AssertionError('an object store cannot rename')

    rename = move = mv


class Upload(io.BytesIO):
    """An object exists when its upload is closed, not before."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def close(self):
        if not self.closed:
            Store.objects[self.path] = self.getvalue()
        super().close()


@pytest.fixture
def bucket(monkeypatch):
    """'gs://bucket', empty. Other buckets do not exist."""
    for name in Store.protocol:
        fsspec.register_implementation(name, Store, clobber=True)
    context = tensorstore.Context()
    monkeypatch.setattr(claim, 'open_bucket', lambda scheme, name, folder: tensorstore.KvStore.open(
        {'driver': 'memory', 'path': f'{name}/{folder}'}, context=context).result())
    Store.objects.clear()
    Store.broken = None
    yield 'gs://bucket'
    Store.objects.clear()
    Store.broken = None
