"""Checkpoints of a run: exact, asynchronous, and whole after a kill, damage or a full disk at any moment."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lit_jax.checkpoint import arrays, manager
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.runtime import storage
from lit_jax.runtime.claim import claimed
from lit_jax.runtime.errors import UserError

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step):
    """Every leaf depends on the step: fp32, bf16, int32, 0-d, an empty subtree, optax states of both
    kinds."""
    rng = np.random.default_rng(step)
    params = {'blocks': {'kernel': jnp.asarray(rng.standard_normal((4, 8, 16)), jnp.float32)},
              'half': jnp.asarray(rng.standard_normal(7), jnp.bfloat16), 'none': {}}
    opt = OPTIMIZER.init(params)
    opt = jax.tree.map(lambda leaf: (leaf + step).astype(leaf.dtype), opt)
    return {'params': params, 'ema': jax.tree.map(lambda leaf: leaf * 2, params), 'opt': opt,
            'step': jnp.int32(step)}


def abstract_state():
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_state(0)))


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def assert_restores(checkpoints, step):
    state, meta, found = checkpoints.restore_latest(abstract_state())
    assert (found, meta) == (step, {'seen': step * 64})
    assert_same_bits(state, make_state(step))


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step), {'seen': step * 64})
    checkpoints.wait()


def names(checkpoints):
    return sorted(path.name for path in checkpoints.directory.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path, keep_latest=3) as opened:
        yield opened


def test_nothing_saved_yet(checkpoints):
    assert checkpoints.restore_latest(abstract_state()) is None
    with pytest.raises(UserError, match='there is no checkpoint in .* yet'):
        checkpoints.restore_part('ema')
    assert checkpoints.steps() == []
    assert not checkpoints.directory.exists()  # looking makes nothing


def test_round_trip_is_bitwise_and_keeps_types(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 400000)
    reopened = Checkpoints(tmp_path)
    state, meta, step = reopened.restore_latest(abstract_state())
    assert_same_bits(state, make_state(400000))
    assert type(state['opt'][1][0]) is optax.ScaleByAdamState and isinstance(state['opt'][0],
                                                                             optax.EmptyState)
    assert (meta, step) == ({'seen': 400000 * 64}, 400000)
    assert names(reopened) == ['000400000']


def test_numpy_leaves_and_scalars(checkpoints):
    state = {'a': np.float32(0.1), 'b': np.array(3, np.int32), 'c': np.arange(5, dtype=np.uint8)}
    checkpoints.save(1, state, {})
    state['c'][:] = 0  # the save in the background must hold a copy
    restored, _, _ = checkpoints.restore_latest(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                                                             state))
    assert_same_bits(restored, {'a': np.float32(0.1), 'b': np.array(3, np.int32),
                                'c': np.arange(5, dtype=np.uint8)})


def test_donating_the_state_during_a_save_does_not_change_what_is_saved(checkpoints):
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {'w': jnp.zeros((500, 1000)), 'step': jnp.int32(0)}
    for step in (0, 5, 10):
        checkpoints.save(step, state, {})
        for _ in range(5):
            state = advance(state)
    restored, _, step = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    assert step == int(restored['step']) == 10
    np.testing.assert_array_equal(restored['w'], 10.0)


def test_sharded_leaves_restore_onto_other_shardings(checkpoints):
    mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    value = np.random.default_rng(0).standard_normal((8, 6), dtype=np.float32)
    spread = jax.device_put(value, NamedSharding(mesh, PartitionSpec('data', 'fsdp')))
    everywhere = jax.device_put(value, NamedSharding(mesh, PartitionSpec()))
    checkpoints.save(1, {'spread': spread, 'everywhere': everywhere}, {})
    targets = [NamedSharding(mesh, PartitionSpec('fsdp')), NamedSharding(mesh, PartitionSpec()), None]
    for sharding in targets:
        leaf = jax.ShapeDtypeStruct((8, 6), np.float32, sharding=sharding)
        state, _, _ = checkpoints.restore_latest({'spread': leaf, 'everywhere': leaf})
        for restored in state.values():
            assert restored.sharding == (sharding
                                         or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
            np.testing.assert_array_equal(restored, value)


def test_latest_and_every_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2, keep_every=4) as checkpoints:
        save(checkpoints, *range(1, 8))
        assert checkpoints.steps() == [4, 6, 7]
    with Checkpoints(tmp_path, keep_latest=2, keep_every=4) as checkpoints:
        save(checkpoints, 8, 9)
        assert checkpoints.steps() == [4, 8, 9]


def test_a_step_saved_already_is_left_alone(checkpoints):
    save(checkpoints, 1)
    before = storage.read_manifest(checkpoints.directory / '000000001')
    assert checkpoints.save(1, make_state(2), {}) is False
    assert storage.read_manifest(checkpoints.directory / '000000001') == before
    assert_restores(checkpoints, 1)


def test_another_recipe_is_an_error_that_lists_all_leaves(checkpoints):
    save(checkpoints, 1)
    abstract = abstract_state()
    abstract['params']['half'] = jax.ShapeDtypeStruct((7,), np.float32)
    abstract['opt'] = jax.eval_shape(optax.sgd(1e-3, momentum=0.9).init, abstract['params'])
    with pytest.raises(UserError) as error:
        checkpoints.restore_latest(abstract)
    assert 'params/half is bfloat16[7], expected float32[7]' in str(error.value)
    assert 'missing: opt/0/trace/half' in str(error.value) and 'extra: opt/1/0/mu/half' in str(error.value)
    assert checkpoints.steps() == [1]


def test_restore_part_reads_one_entry_and_changes_nothing(checkpoints):
    save(checkpoints, 1, 2)
    (checkpoints.directory / '000000003.orbax-checkpoint-tmp').mkdir()  # a save that another process is at
    before = names(checkpoints)
    reader = Checkpoints(checkpoints.directory.parent)
    ema, step = reader.restore_part('ema')
    assert_same_bits(ema, jax.tree.map(np.asarray, make_state(2)['ema']))
    assert step == 2
    ema, _ = reader.restore_part('ema', abstract_state()['ema'])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ema))
    assert_same_bits(ema, make_state(2)['ema'])
    with pytest.raises(UserError, match='no entry "emma", only ema, opt, params, step'):
        reader.restore_part('emma')
    with pytest.raises(UserError, match='missing: ema/more float32'):
        reader.restore_part('ema', {**abstract_state()['ema'], 'more': jax.ShapeDtypeStruct((), np.float32)})
    assert names(checkpoints) == before


def test_empty_nodes_and_containers_may_differ_where_leaves_do_not(checkpoints):
    checkpoints.save(1, {'a': [jnp.ones(2)], 'none': None, 'empty': {}, 'opt': optax.EmptyState()}, {})
    abstract = {'a': (jax.ShapeDtypeStruct((2,), np.float32),), 'more': {'deep': {}}, 'opt': ()}
    restored, _, _ = checkpoints.restore_latest(abstract)
    assert_same_bits(restored, {'a': (np.ones(2, np.float32),), 'more': {'deep': {}}, 'opt': ()})


def test_meta_that_json_cannot_hold_fails_and_leaves_nothing(checkpoints):
    with pytest.raises(TypeError):
        checkpoints.save(1, make_state(1), {'what': object()})
    assert checkpoints.steps() == []
    save(checkpoints, 1)
    assert_restores(checkpoints, 1)


@pytest.mark.parametrize('options', [{'keep_latest': 0}, {'keep_every': -1}])
def test_bad_options(tmp_path, options):
    with pytest.raises(UserError, match='keep_latest must be at least 1'):
        Checkpoints(tmp_path, **options)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_restore_part_of_a_step_that_is_named(checkpoints):
    save(checkpoints, 1, 2)
    ema, step = checkpoints.restore_part('ema', step=1)
    assert step == 1
    assert_same_bits(ema, jax.tree.map(np.asarray, make_state(1)['ema']))
    with pytest.raises(UserError, match='no checkpoint of step 3 in .*; there are: 1, 2'):
        checkpoints.restore_part('ema', step=3)
    (checkpoints.directory / '000000001' / 'manifest.json').unlink()
    with pytest.raises(UserError, match='checkpoint of step 1 in .* cannot be used'):
        checkpoints.restore_part('ema', step=1)


def _misplace(path: Path) -> None:
    """Something else in the place of a file, another thing for each."""
    path.unlink()
    if (kind := len(str(path)) % 4) == 0:
        path.mkdir()
    else:
        path.symlink_to((path.with_name('nowhere'), path, path.parent)[kind - 1])


HARM = {'flip': _flip, 'truncate': lambda path: os.truncate(path, path.stat().st_size - 1),
        'delete': Path.unlink, 'misplace': _misplace}


@pytest.mark.parametrize('harm', HARM)
def test_damage_to_any_file_is_found_named_and_survived(checkpoints, caplog, harm):
    save(checkpoints, 1, 2)
    newest = Path(checkpoints.directory, '000000002')
    whole = checkpoints.directory.parent / 'copy'
    shutil.copytree(newest, whole)
    files = [path.relative_to(newest) for path in newest.rglob('*') if path.is_file()]
    assert {path.parts[0] for path in files} >= {'state', 'meta', 'manifest.json'}
    for name in files:
        caplog.clear()
        HARM[harm](newest / name)
        assert checkpoints.restore_part('ema')[1] == 1  # a reader skips it, and leaves it
        assert newest.is_dir()
        assert_restores(checkpoints, 1)
        assert any(str(newest / name) in record.getMessage() for record in caplog.records), name
        assert not newest.exists()
        shutil.rmtree(checkpoints.directory / '000000002.damaged')
        shutil.copytree(whole, newest)
    assert_restores(checkpoints, 2)


@pytest.mark.parametrize('what', ['dead link', 'circular link', 'file', 'link to a file'])
def test_something_else_in_the_place_of_a_checkpoint_is_moved_aside(tmp_path, what):
    """Also of an older one, which nobody looks at until it is to be deleted."""
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        save(checkpoints, 2)
    for step in (1, 3):
        place = Path(checkpoints.directory, f'{step:09d}')
        if what == 'file':
            place.write_bytes(b'')
        else:
            place.symlink_to({'dead link': 'nowhere', 'circular link': place.name,
                              'link to a file': __file__}[what])
    unfinished = Path(checkpoints.directory, '000000004.orbax-checkpoint-tmp')
    unfinished.symlink_to('nowhere')
    assert checkpoints.restore_part('ema')[1] == 2
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        assert_restores(checkpoints, 2)
        assert not os.path.lexists(unfinished)
        save(checkpoints, 3, 4)
        assert_restores(checkpoints, 4)
    assert {'000000003', '000000003.damaged', '000000004'} <= {*names(checkpoints)}
def rename(newest):
    newest.rename(newest.with_name('000000009'))


def leave_apart(newest):
    """As where Orbax only warns that it could not join the parts."""
    (newest / 'state' / 'manifest.ocdbt').unlink()
    storage.write_manifest(newest)


@pytest.mark.parametrize('change, said', [(rename, '000000009 holds the state of step 2, not of 9'),
                                          (leave_apart, '000000002/state cannot be read')])
def test_a_checkpoint_that_is_not_what_its_name_says_is_passed_over(checkpoints, caplog, change, said):
    save(checkpoints, 1, 2)
    checkpoints.wait()
    change(Path(checkpoints.directory, '000000002'))
    assert checkpoints.restore_part('ema')[1] == 1
    assert_restores(checkpoints, 1)
    assert said in caplog.text and 'resuming from step 1' in caplog.text
    assert len([path for path in checkpoints.directory.iterdir() if '.damaged' in path.name]) == 1


def test_a_save_whose_parts_cannot_be_read_is_not_kept(checkpoints, monkeypatch):
    save(checkpoints, 1)
    checkpoints.wait()
    with monkeypatch.context() as patch, pytest.raises(UserError, match='state cannot be read'):
        patch.setattr(manager, 'read_leaf', lambda path, name: (path / 'manifest.ocdbt').unlink()
                      or arrays.read_leaf(path, name))
        save(checkpoints, 2)
        checkpoints.wait()
    assert names(checkpoints) == ['000000001']
    save(checkpoints, 3)
    assert_restores(checkpoints, 3)


def test_a_run_that_lost_its_claim_saves_nothing_more(checkpoints):
    workdir = checkpoints.directory.parent
    with pytest.raises(UserError, match='belongs to process 7 on .elsewhere'), claimed(workdir, inside=True):
        save(checkpoints, 1)
        checkpoints.wait()
        said = json.loads((workdir / '.claim').read_text()) | {'token': 'x', 'pid': 7, 'host': 'elsewhere'}
        (workdir / '.claim').write_text(json.dumps(said))
        save(checkpoints, 2)
    assert checkpoints.steps() == [1]


def test_a_damaged_step_can_be_saved_again(tmp_path, caplog):
    for _ in range(2):
        with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
            save(checkpoints, 1, 2)
            (checkpoints.directory / '000000002' / 'meta' / 'metadata').unlink()
            assert_restores(checkpoints, 1)
            assert 'resuming from step 1' in caplog.text
            save(checkpoints, 2)
            assert_restores(checkpoints, 2)
    assert names(checkpoints) == ['000000001', '000000002', '000000002.damaged', '000000002.damaged2']


def test_no_whole_checkpoint_is_an_error_and_nothing_is_moved(checkpoints):
    save(checkpoints, 1, 2)
    for step in (1, 2):
        (checkpoints.directory / f'{step:09d}' / 'manifest.json').unlink()
    with pytest.raises(UserError, match='none of the 2 checkpoints .* is whole'):
        checkpoints.restore_latest(abstract_state())
    assert names(checkpoints) == ['000000001', '000000002']


def test_what_a_kill_leaves_behind(tmp_path):
    """The states between two system calls that a random kill seldom hits, made by hand."""
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        save(checkpoints, 1, 2)
    root = checkpoints.directory
    # During a save: an unfinished directory, with or without its manifest.
    shutil.copytree(root / '000000002', root / '000000003.orbax-checkpoint-tmp')
    # Between the commit and the entry of Orbax's own two files into the manifest.
    manifest = json.loads((root / '000000002' / 'manifest.json').read_text())['files']
    complete = set(manifest)
    (root / '000000002' / 'manifest.json').unlink()
    storage.write_manifest(root / '000000002', skip=('_CHECKPOINT_METADATA', 'commit_success.txt'))
    (root / '000000002' / '.manifest.json.partial').write_text('{"fi')
    # During the deletion of an old one.
    shutil.rmtree(root / '000000001' / 'state')
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        assert_restores(checkpoints, 2)
        assert set(storage.read_manifest(root / '000000002')) == complete
        save(checkpoints, 3, 4)
        assert names(checkpoints) == ['000000003', '000000004']
        assert_restores(checkpoints, 4)


@pytest.fixture
def limit_files():
    """A switch for `ulimit -f`: a portable stand-in for a full disk that fails inside TensorStore in the same
    way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000 if on else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('surfaces_at', ['save', 'wait', 'restore', 'close'])
def test_full_disk_during_a_save(tmp_path, limit_files, surfaces_at):
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    save(checkpoints, 1)
    limit_files(True)
    checkpoints.save(2, {'w': jnp.ones((1000, 1000))}, {})
    with pytest.raises(UserError,
                       match=r'no room to write .*000000002: it needs about 4\.0 MB.*free on that disk'):
        if surfaces_at == 'save':
            checkpoints.save(3, make_state(3), {})
        elif surfaces_at == 'restore':
            checkpoints.restore_latest(abstract_state())
        else:
            getattr(checkpoints, surfaces_at)()
    assert names(checkpoints) == ['000000001']
    assert_restores(checkpoints, 1)
    limit_files(False)
    save(checkpoints, 2)  # with room again, the same object goes on
    assert names(checkpoints) == ['000000002']
    assert_restores(checkpoints, 2)
    checkpoints.close()


def test_full_disk_while_the_manifest_is_written(checkpoints, monkeypatch):
    save(checkpoints, 1)

    def no_room(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(storage, 'write_text_atomic', no_room)
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(UserError, match='000000002'):
        checkpoints.wait()
    monkeypatch.undo()
    assert names(checkpoints) == ['000000001']
    assert_restores(checkpoints, 1)


def test_disk_too_small_is_seen_before_writing(checkpoints, monkeypatch):
    save(checkpoints, 1)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(UserError, match='10 bytes are free'):
        checkpoints.save(2, make_state(2), {})
    assert names(checkpoints) == ['000000001']


def test_a_save_returns_before_it_is_on_disk(checkpoints, monkeypatch):
    save(checkpoints, 1)  # the first call also starts Orbax's threads
    write_manifest = storage.write_manifest

    def slow(*args, **kwargs):
        time.sleep(2)
        write_manifest(*args, **kwargs)

    monkeypatch.setattr(storage, 'write_manifest', slow)
    start = time.monotonic()
    checkpoints.save(2, make_state(2), {'seen': 128})
    assert time.monotonic() - start < 1.5
    assert checkpoints.steps() == [1]
    assert_restores(checkpoints, 2)


WORKER = '''
import sys
from test_manager import Checkpoints, abstract_state, assert_same_bits, make_state
checkpoints = Checkpoints(sys.argv[1], keep_latest=2)
found = checkpoints.restore_latest(abstract_state())
step = 0 if found is None else found[2]
if found:
    assert_same_bits(found[0], make_state(step))
print('start', step, flush=True)
while True:
    step += 1
    checkpoints.save(step, make_state(step), {'seen': step * 64})
    if step % 3 == 0:
        checkpoints.wait()
        print('whole', step, flush=True)
'''


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path):
    """Ten runs that only save, each ended by SIGKILL: the state restored is exact, and not older than
    reported."""
    here = Path(__file__).resolve().parent
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu',
           'PYTHONPATH': os.pathsep.join([str(here), str(here.parents[1])])}
    draw = random.Random(0)
    for _ in range(10):
        worker = subprocess.Popen([sys.executable, '-c', WORKER, tmp_path], env=env, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert worker.stdout.readline().startswith('start'), worker.communicate()[1]
            time.sleep(draw.uniform(0, 1.2))
        finally:
            worker.send_signal(signal.SIGKILL)
            said = worker.communicate()[0]
        reported = max([int(line.split()[1]) for line in said.splitlines() if line.startswith('whole')],
                       default=0)
        checkpoints = Checkpoints(tmp_path)
        found = checkpoints.restore_latest(abstract_state())
        if found is None:
            assert reported == 0
            continue
        state, meta, step = found
        assert step >= reported and meta == {'seen': step * 64}
        assert_same_bits(state, make_state(step))
        assert not [name for name in names(checkpoints) if 'damaged' in name or 'tmp' in name]
    assert step > 0
