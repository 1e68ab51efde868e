"""Claims: one writer at a time, also after a kill, seen from other hosts and containers, and in buckets."""
import errno
import json
import logging
import os
import threading
from pathlib import Path

import pytest
from buckets import bucket  # noqa: F401
from gcs_server import gcs_server

from lit_jax.runtime import claim, signals, writers
from lit_jax.runtime.claim import claimed
from lit_jax.runtime.errors import UserError

PARENT = writers.Writer('this-host', writers._place(), os.getppid(), writers._started(os.getppid()))
ALIVE = {**PARENT._asdict(), 'since': '2026-01-02 03:04:05', 'token': 'a'}
ELSEWHERE = {**ALIVE, 'place': '0123456789ab'}      # also a container of this host, whose name is the same


@pytest.fixture
def soon(monkeypatch):
    """Two minutes pass in a moment."""
    monkeypatch.setattr(claim, 'STALE_SECONDS', 0.3)
    monkeypatch.setattr(claim, '_LOOK_SECONDS', 0.02)


class OnDisk:
    def __init__(self, folder: Path):
        self.out, self._file = folder / 'out', folder / 'out' / '.claim'

    def leave(self, **said) -> None:
        self.out.mkdir(exist_ok=True)
        self._file.write_text(json.dumps(said))

    def said(self) -> dict | None:
        return json.loads(self._file.read_text()) if self._file.exists() else None

    def remove(self) -> None:
        self._file.unlink()


class InBucket:
    def __init__(self, url: str):
        self.out, self._store = f'{url}/runs/out', claim.open_bucket('gs', 'bucket', 'runs/out/')

    def leave(self, **said) -> None:
        self._store.write('.claim', json.dumps(said)).result()

    def said(self) -> dict | None:
        found = self._store.read('.claim').result()
        return json.loads(found.value) if found.state == 'value' else None

    def remove(self) -> None:
        self._store.write('.claim', None).result()


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
    return OnDisk(tmp_path) if request.param == 'disk' else InBucket(request.getfixturevalue('bucket'))


def test_a_live_claim_refuses_and_says_whose_it_is(place):
    place.leave(**ALIVE)
    with pytest.raises(UserError) as error, claimed(place.out, inside=True):
        pass
    for part in (str(place.out), str(ALIVE['pid']), ALIVE['since'], 'this-host', 'is in use'):
        assert part in str(error.value)
    assert place.said() == ALIVE


@pytest.mark.parametrize('gone', [{'started': '1'}, {'pid': 2 ** 22 + 1}, {'place': '0123456789ab'}],
                         ids=['number used again', 'ended', 'elsewhere, silent'])
def test_a_dead_claim_is_taken_over_with_one_line(place, soon, caplog, gone):
    place.leave(**ALIVE | gone)
    with claimed(place.out, inside=True):
        assert place.said()['pid'] == os.getpid()
        claim.check()
    assert caplog.text.count('taken over from') == 1 == len(caplog.records)
    assert place.said() is None


def test_who_is_elsewhere_and_touches_its_claim_is_alive(place, soon):
    place.leave(**ELSEWHERE)
    threading.Timer(0.1, lambda: place.leave(**ELSEWHERE)).start()
    with pytest.raises(UserError, match='is in use'), claimed(place.out, inside=True):
        pass


def test_a_process_whose_claim_was_taken_over_stops(place):
    with pytest.raises(UserError, match='belongs to process') as error, claimed(place.out, inside=True):
        claim.check()
        place.leave(**ALIVE)
        for one in claim._held.values():
            one._looked -= 1000       # in a bucket one look a minute is enough
        claim.check()
    assert str(ALIVE['pid']) in str(error.value) and place.said() == ALIVE


def test_a_claim_that_was_deleted_is_made_again(place):
    with claimed(place.out, inside=True):
        mine = place.said()
        place.remove()
        for one in claim._held.values():
            one._look()
        assert place.said() == mine
    assert place.said() is None


def test_after_a_long_sleep_a_claim_that_is_gone_is_lost(place):
    """Another process may have come, written, and gone."""
    with pytest.raises(UserError, match='belongs to an unknown process'), claimed(place.out, inside=True):
        place.remove()
        for one in claim._held.values():
            one._looked -= 1000
        claim.check()
    assert place.said() is None


def test_waiting_for_the_other_to_end(place, soon, caplog):
    caplog.set_level('INFO', 'lit_jax')
    place.leave(**ALIVE)
    threading.Timer(0.1, place.remove).start()
    with claimed(place.out, inside=True, wait=True):
        assert place.said()['pid'] == os.getpid()
    assert 'for its end' in caplog.text


def test_a_claim_ends_with_its_block_and_may_be_nested(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / 'new' / 'out'):
        with claimed(tmp_path / 'new' / 'out'):
            pass
        assert (tmp_path / 'new' / '.out.claim').exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_links_lead_to_one_claim(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'link').symlink_to('run')
    with claimed(tmp_path / 'link'):
        assert (tmp_path / '.run.claim').exists()


@pytest.mark.parametrize('code', [errno.EPERM, errno.EOPNOTSUPP])
def test_disks_without_hard_links(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, 'link', refuse)
    with claimed(tmp_path / 'out'):
        assert json.loads((tmp_path / '.out.claim').read_text())['pid'] == os.getpid()
    OnDisk(tmp_path).leave(**ALIVE)
    with pytest.raises(UserError, match='is in use'), claimed(tmp_path / 'out', inside=True):
        pass
    OnDisk(tmp_path).leave(**ALIVE | {'started': '1'})
    with claimed(tmp_path / 'out', inside=True):
        pass


@pytest.mark.parametrize('damage', [b'', b'\xff{', b'[]', b'{"pid": "x"}'])
def test_a_damaged_claim_is_one_of_an_unknown_process(tmp_path, soon, damage):
    (tmp_path / '.claim').write_bytes(damage)
    with claimed(tmp_path, inside=True):
        assert json.loads((tmp_path / '.claim').read_text())['pid'] == os.getpid()


def test_where_no_claim_can_be_it_is_told(tmp_path):
    (tmp_path / '.claim').mkdir()
    for place, inside, said in ((tmp_path, True, r'\.claim is a folder'), ('/', False, 'root of a disk'),
                                ('/proc/nothing/here', True, 'its disk takes no folders')):
        with pytest.raises(UserError, match=said), claimed(place, inside=inside):
            pass


def test_what_ended_processes_were_writing_is_cleaned_up(tmp_path):
    (out := tmp_path / 'out').mkdir()
    _, place, pid, began = writers.this_process()
    dead, alive = f'{place}.{2 ** 22 + 1}.1', f'{place}.{ALIVE["pid"]}.{ALIVE["started"]}'
    left = [tmp_path / f'.out.partial.{dead}', out / f'.a.png.partial.{dead}', out / f'.b.trial.{dead}']
    kept = [tmp_path / f'.out.old.{dead}', tmp_path / f'.another.partial.{dead}', out / f'.a.partial.{alive}',
            out / f'.a.partial.0123456789ab.{2 ** 22 + 1}.1', out / '.a.partial', out / 'a.png']
    for path in (*left, *kept):
        path.write_text('')
    with claimed(out):
        assert not any(path.exists() for path in left) and all(path.exists() for path in kept)


def test_a_process_that_leaves_at_once_leaves_no_claim(place, monkeypatch):
    left = []
    monkeypatch.setattr(os, '_exit', left.append)
    monkeypatch.setattr(logging, 'shutdown', lambda: None)
    with claimed(place.out, inside=True):
        assert place.said()
        signals.leave(76)
        assert left == [76] and place.said() is None


def test_a_bucket_as_google_has_it(monkeypatch):
    """The condition is the store's own: of two that replace one claim, one does."""
    with gcs_server() as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        one, two, three = (claim._Bucket('gs://bucket/runs/.claim') for _ in range(3))
        assert one.create(ALIVE) and not two.create(ELSEWHERE) and not three.create(ELSEWHERE)
        assert [bucket.read()[0] for bucket in (one, two, three)] == [ALIVE] * 3
        assert two.take(ALIVE, ELSEWHERE | {'token': 'b'})
        assert not three.take(ALIVE, ELSEWHERE | {'token': 'c'})
        assert one.touch(ALIVE, True)['token'] == 'b' and two.touch(ELSEWHERE | {'token': 'b'}, True) is None
        one.remove(ALIVE)
        assert three.read()[0]['token'] == 'b'
        two.remove(ELSEWHERE | {'token': 'b'})
        assert three.read() is None


def test_names_of_hosts_do_not_matter(monkeypatch):
    """Two containers may have one name, and one machine two."""
    me = writers.this_process()
    assert me._replace(host='another').runs() and me._replace(place='0123456789ab').runs() is None
    assert me._replace(started='1').runs() is False and me._replace(pid=2 ** 22 + 1).runs() is False
