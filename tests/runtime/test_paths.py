"""Local and remote paths: the same calls, the same results, one clear message where a bucket is not to be
had."""
import errno
import os
from pathlib import Path

import pytest
from buckets import Store, bucket  # noqa: F401
from etils import epath

from lit_jax.runtime import paths
from lit_jax.runtime.errors import UserError


@pytest.fixture(params=['local', 'remote'])
def root(request, tmp_path):
    """An empty folder on disk, then one in a bucket."""
    return epath.Path(tmp_path) if request.param == 'local' else paths.as_path(
        request.getfixturevalue('bucket')) / 'run'


def test_kinds_of_paths(tmp_path, bucket):  # noqa: F811
    assert str(paths.as_path('runs/a')) == 'runs/a' and isinstance(paths.as_path(Path('runs/a')), epath.Path)
    assert str(paths.as_path(epath.Path(bucket) / 'a') / 'b') == 'gs://bucket/a/b'
    assert str(paths.absolute('runs/a')) == str(Path.cwd() / 'runs' / 'a')
    assert paths.absolute('gs://bucket/a') == epath.Path('gs://bucket/a')
    assert not paths.is_remote(tmp_path) and paths.is_remote('gs://bucket') and paths.is_remote(
        epath.Path('s3://b/x'))


@pytest.mark.parametrize('path, message', [
    ('gs:/bucket/run', 'neither a local path nor a bucket; write a bucket as gs://BUCKET/PATH'),
    (Path('gs://bucket/run'), 'neither a local path nor a bucket; write a bucket as gs://BUCKET/PATH'),
    ('ftp://host/run', 'ftp:// is not supported; known: gs://, s3://, az://, hf:// and local'),
])
def test_paths_that_cannot_be_used(path, message):
    with pytest.raises(UserError, match=message):
        paths.as_path(path)


@pytest.mark.parametrize('path, message', [
    ('gs://bucket/run', 'needs the package gcsfs .*on every host of the run: pip install '
                        r'"lit_jax\[gcs\]"'),
    ('s3://bucket/run', 'needs the package s3fs .*on every host of the run: pip install s3fs'),
])
def test_the_package_that_is_missing_is_named(monkeypatch, path, message):
    def nothing_installed(name):
        raise ImportError(f'Install {name}')

    monkeypatch.setattr(paths.fsspec, 'get_filesystem_class', nothing_installed)
    with pytest.raises(UserError, match=message):
        paths.as_path(path)
    assert str(paths.as_path('local/run')) == 'local/run'


def test_pytorch_files_are_local(bucket):  # noqa: F811
    assert paths.local_path('a.pt') == Path('a.pt')
    with pytest.raises(UserError, match='gs://bucket/a.pt: PyTorch files .* locally only'):
        paths.local_path('gs://bucket/a.pt')


def test_files_are_written_whole_and_listed_with_their_sizes(root):
    assert paths.files_under(root) == {} and paths.files_under(root / 'absent') == {}
    (root / 'deep' / 'er').mkdir(parents=True, exist_ok=True)
    paths.write_bytes_atomic(root / 'deep' / 'er' / 'a', b'12345')
    paths.write_text_atomic(root / 'b.txt', 'first')
    paths.write_text_atomic(root / 'b.txt', 'zwölf')
    assert (root / 'b.txt').read_text() == 'zwölf'
    assert paths.files_under(root) == {'b.txt': 6, 'deep/er/a': 5}
    paths.remove_tree(root / 'deep')
    paths.remove_tree(root / 'absent')
    assert paths.files_under(root) == {'b.txt': 6} and not (root / 'deep').exists()


@pytest.mark.parametrize('target', ['nowhere', 'here', 'file'])
def test_what_is_in_the_way_of_a_folder_is_told(tmp_path, target):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'here').symlink_to(tmp_path / target)
    for path in (tmp_path / 'here', tmp_path / 'here' / 'below', tmp_path / 'here' / 'far' / 'below'):
        with pytest.raises(UserError, match=f'{path} cannot be '):
            paths.make_folder(path)
        with pytest.raises(UserError, match='--out=it: .*here is a (file|link to nothing), where'):
            paths.check_folder(path, '--out=it')
    assert paths.make_folder(tmp_path / 'new' / 'deep').is_dir()


def test_a_failed_local_write_leaves_the_old_file(tmp_path, monkeypatch):
    paths.write_text_atomic(tmp_path / 'a', 'old')

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='no room to write .*/a: .* are free on that disk .No space left'):
        paths.write_text_atomic(tmp_path / 'a', 'new')
    assert (tmp_path / 'a').read_text() == 'old' and [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_bucket_that_cannot_be_reached_is_named(bucket, tmp_path):  # noqa: F811
    paths.check_reachable(tmp_path / 'absent')
    paths.check_reachable('gs://bucket/run/that/will/be')
    with pytest.raises(UserError, match=r'gs://bukket/run: there is no such bucket \(b/bukket\)'):
        paths.check_reachable('gs://bukket/run')
    Store.broken = OSError('Forbidden: 403')
    with pytest.raises(UserError, match='gs://bucket/run cannot be reached: Forbidden: 403.*the '
                                        'permissions of this machine'):
        paths.check_reachable('gs://bucket/run')
    with pytest.raises(OSError, match='local trouble'), paths.explain_unreachable(tmp_path):
        raise OSError('local trouble')
    with pytest.raises(FileNotFoundError), paths.explain_unreachable('gs://bucket/x'):
        raise FileNotFoundError('x')


def places(root):
    """{what is wrong: (a folder that cannot be made or written, what is said)}."""
    (root / 'file').write_bytes(b'')
    (root / 'dead').symlink_to(root / 'nowhere')
    (root / 'round').symlink_to(root / 'round')
    return {'below a file': (root / 'file' / 'a' / 'b', 'a file stands where a folder is needed'),
            'a file': (root / 'file', 'something else stands there'),
            'a dead link': (root / 'dead', 'something else stands there'),
            'a circle': (root / 'round' / 'a', 'links lead in a circle'),
            'a long name': (root / ('n' * 300) / 'a', 'too long')}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    for folder, said in places(tmp_path).values():
        for write in (paths.prepare_folder, lambda path: paths.prepare_file(path / 'out.npz')):
            with pytest.raises(UserError) as raised:
                write(folder)
            assert said in str(raised.value) and 'cannot be written' in str(raised.value)
            assert str(tmp_path) in str(raised.value) and len(str(raised.value)) < 300
    with pytest.raises(UserError, match='out.png cannot be written: a folder stands where a file'):
        paths.prepare_file(paths.prepare_folder(tmp_path / 'out.png'))
    with pytest.raises(UserError, match='cannot be written: its name is too long'):
        paths.prepare_file(tmp_path / ('n' * 250))      # its temporary name is longer
    with pytest.raises(UserError, match='zero byte'):
        paths.prepare_folder('a\0b')
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'dead', 'round', 'out.png'}


@pytest.mark.parametrize('code, said', [
    (errno.EROFS, 'read-only'), (errno.EACCES, 'may not write'), (errno.EPERM, 'may not write'),
    (errno.ENOSPC, 'no room to write'), (errno.EDQUOT, 'no room to write'), (errno.EIO, 'reports an error')])
def test_writing_and_its_trial_say_what_the_disk_says(tmp_path, monkeypatch, code, said):
    def refuse(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr('builtins.open', refuse)
    monkeypatch.setattr(Path, 'write_bytes', refuse)
    for write in (paths.prepare_folder, lambda path: paths.write_bytes_atomic(path / 'a', b'1')):
        with pytest.raises(UserError, match=said):
            write(tmp_path)


def test_errors_of_other_files_pass(tmp_path):
    """Work in the block may read: its errors are no matter of the place that is written."""
    with pytest.raises(PermissionError), paths.explain_unwritable(tmp_path / 'out' / 'a'):
        raise PermissionError(errno.EACCES, 'denied', '/elsewhere/image.png')
    with pytest.raises(ValueError, match='wrong'), paths.explain_unwritable(tmp_path):
        raise ValueError('wrong')
    with pytest.raises(UserError, match='read-only'), paths.explain_unwritable(tmp_path):
        raise ValueError("FAILED_PRECONDITION [os_error_code='30']")     # as TensorStore says it


def test_a_trial_leaves_what_is_there(root):
    paths.prepare_folder(root)
    paths.write_text_atomic(root / 'a', 'old')
    assert paths.prepare_folder(root) == root and paths.prepare_file(root / 'a') == root / 'a'
    assert paths.files_under(root) == {'a': 3}


def test_links_that_lead_nowhere_are_files_of_no_length(tmp_path):
    (tmp_path / 'file').write_bytes(b'four')
    (tmp_path / 'dead').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'circular').symlink_to(tmp_path / 'circular')
    assert paths.files_under(tmp_path) == {'circular': -1, 'dead': -1, 'file': 4}
