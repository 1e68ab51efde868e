"""What the processes of test_processes.py run: `python checkpoint_processes.py SCENARIO FOLDER`, several at a
time."""
import os
import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lit_jax.checkpoint import manager, model_folder
from lit_jax.checkpoint.arrays import load_arrays, save_arrays
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.save_together import SaveTogether
from lit_jax.checkpoint.workdir import check_workdir, claim_workdir, read_workdir
from lit_jax.runtime import peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, files_under

OPTIMIZER = optax.adamw(1e-3)
MODEL = {'model': {'family': 'dit'}, 'diffusion': {'steps': 1000, 'kind': 'linear'},
         'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}, 'classes': None, 'provenance': {}}
RECIPE = {'name': 'tiny', 'seed': 3}


def host_state(step):
    """The state as numpy arrays: fp32 to be spread, bf16 and a counter that every device holds."""
    rng = np.random.default_rng(step)
    params = {'kernel': rng.standard_normal((8, 12), dtype=np.float32),
              'table': np.arange(8, dtype=np.int32) + step,
              'half': np.asarray(jnp.asarray(rng.standard_normal(5), jnp.bfloat16))}
    return {'params': params, 'ema': jax.tree.map(lambda leaf: leaf + leaf, params),
            'opt': jax.tree.map(np.asarray, OPTIMIZER.init(params)), 'step': np.int32(step)}


def shardings(tree):
    """Rows over all devices where they divide, everything on all devices else."""
    mesh = jax.make_mesh((jax.device_count(),), ('fsdp',), axis_types=(AxisType.Auto,))

    def sharding(leaf):
        rows = np.ndim(leaf) and np.shape(leaf)[0] % jax.device_count() == 0
        return NamedSharding(mesh, PartitionSpec('fsdp') if rows else PartitionSpec())

    return jax.tree.map(sharding, tree)


def spread(tree):
    """Global arrays over all processes."""
    return jax.tree.map(lambda leaf, sharding: jax.make_array_from_callback(np.shape(leaf), sharding,
                                                                            lambda i: leaf[i]),
                        tree, shardings(tree))


def abstract(tree):
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype,
                                                                    sharding=sharding),
                        tree, shardings(tree))


def assert_same_parts(restored, expected):
    """Every part that this process holds has the bits of `expected`."""
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for array, whole in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert array.dtype == whole.dtype and array.shape == np.shape(whole)
        for part in array.addressable_shards:
            assert np.asarray(part.data).tobytes() == np.ascontiguousarray(whole[part.index]).tobytes()


def refused(act) -> str:
    """The text of the UserError that `act` must raise."""
    try:
        act()
    except UserError as error:
        return str(error)
    raise AssertionError('nothing was raised')


def write_everything(folder) -> None:
    """Into an empty folder: two checkpoints, arrays, a model folder."""
    checkpoints = Checkpoints(folder, keep_latest=3)
    assert checkpoints.restore_latest(abstract(host_state(0))) is None
    check_workdir(folder, RECIPE)
    claim_workdir(folder, RECIPE, {'classes': None})
    assert read_workdir(folder)['recipe'] == RECIPE  # there when it returns, on every process
    assert 'seed: 3 there, 4 in this recipe' in refused(lambda: check_workdir(folder, {**RECIPE, 'seed': 4}))
    for step in (1, 2):
        assert checkpoints.save(step, spread(host_state(step)), {'seen': step})
    assert checkpoints.save(2, spread(host_state(2)), {}) is False
    checkpoints.close()
    params = host_state(5)['params']
    save_arrays(folder / 'arrays', spread(params))
    assert_same_parts(load_arrays(folder / 'arrays', abstract(params)), params)
    for seed in (5, 6):
        model_folder.save_model_folder(folder / 'model', MODEL, spread(host_state(seed)['params']),
                                       overwrite=seed == 6)
    config, loaded = model_folder.load_model_folder(folder / 'model', abstract(params))
    assert config['format'] == 1
    assert_same_parts(loaded, host_state(6)['params'])
    assert 'exists and is not empty' in refused(
        lambda: model_folder.save_model_folder(folder / 'model', MODEL, params))


def read_everything(folder) -> None:
    """One process, in a bucket: what `write_everything` left, a damaged checkpoint, and the rest of a
    save."""
    model = model_folder.load_model_folder(folder / 'model', abstract(host_state(6)['params']))[1]
    assert_same_parts(model, host_state(6)['params'])
    state, meta, step = Checkpoints(folder).restore_latest(abstract(host_state(2)))
    assert (meta, step) == ({'seen': 2}, 2)
    assert_same_parts(state, host_state(2))
    newest = folder / 'checkpoints' / '000000002'
    sizes = files_under(newest / 'state')
    (newest / 'state' / max(sizes, key=sizes.get)).write_text('short')
    (folder / 'checkpoints' / '000000003' / 'state' / 'x').write_text('part')
    with Checkpoints(folder, keep_latest=1) as checkpoints:
        state, meta, step = checkpoints.restore_latest(abstract(host_state(1)))
        print('DAMAGED', step)
        assert_same_parts(state, host_state(1))
        assert (newest / 'damaged.txt').exists() and not (folder / 'checkpoints' / '000000003').exists()
        (folder / 'checkpoints' / '000000003' / 'state' / 'x').write_text('part')
        print('UNFINISHED', checkpoints.restore_latest(abstract(host_state(1)))[2])
        again = host_state(7) | {'step': np.int32(2)}
        assert checkpoints.save(2, spread(again), {})     # where the damaged one lies
    left = sorted(path.name for path in (folder / 'checkpoints').iterdir())
    assert left == ['000000002'], left
    state, _, step = checkpoints.restore_latest(abstract(again))
    assert_same_parts(state, again)
    print('AGAIN', step)


def read_damaged(folder) -> None:
    """Step 2 is damaged; so is all of another run. Then saving goes on."""
    with Checkpoints(folder, keep_latest=3) as checkpoints:
        ema, step = checkpoints.restore_part('ema', abstract(host_state(1)['ema']))
        assert step == 1
        assert_same_parts(ema, host_state(1)['ema'])
        state, meta, step = checkpoints.restore_latest(abstract(host_state(1)))
        assert (meta, step) == ({'seen': 1}, 1)
        assert_same_parts(state, host_state(1))
        assert checkpoints.steps() == [1]
        state |= spread({'step': np.int32(2)})
        assert checkpoints.save(2, state, {'seen': 22}) and not checkpoints.save(1, state, {})
    print('RESTORED', step)
    lost = Checkpoints(folder / 'lost')
    print('LOST', refused(lambda: lost.restore_latest(abstract(host_state(1)))).replace('\n', ' '))
    print('MODEL',
          refused(lambda: model_folder.load_model_folder(folder / 'broken_model')).replace('\n', ' '))
    other = {**host_state(1), 'step': np.zeros(3, np.float32)}
    assert 'step is int32[], expected float32[3]' in refused(
        lambda: checkpoints.restore_latest(abstract(other)))
    for number in range(2):
        print('ONE OF US', refused(lambda number=number: peers.together(lambda: only(number))))


def only(number):
    """An act that goes wrong on one process."""
    if jax.process_index() == number:
        raise UserError(f'{number} cannot')


def fill_the_disk(folder) -> None:
    """The disk is full for one process, in the middle of a save; then for process 0 while it commits."""
    checkpoints = Checkpoints(folder, keep_latest=3)
    w = spread({'w': np.ones((1024, 1024), np.float32)})
    checkpoints.save(1, w, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    began = time.monotonic()
    checkpoints.save(2, w, {})
    print('FULL', refused(checkpoints.wait), f'after {time.monotonic() - began:.1f} s')
    assert time.monotonic() - began < 20 and checkpoints.steps() == [1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    write_manifest = manager.storage.write_manifest

    def no_room(*_, **__):
        raise OSError(28, os.strerror(28))

    manager.storage.write_manifest = no_room
    checkpoints.save(3, w, {})
    print('COMMIT', refused(checkpoints.wait))
    manager.storage.write_manifest = write_manifest
    assert time.monotonic() - began < 40 and checkpoints.steps() == [1]
    checkpoints.save(4, w, {})  # the same object goes on
    checkpoints.close()
    assert checkpoints.steps() == [1, 4]


def die_while_saving(folder) -> None:
    """Process 1 is gone when its part should be written."""
    checkpoints = Checkpoints(folder, keep_latest=3)
    restored = checkpoints.restore_latest(abstract(host_state(1)))
    print('WENT ON FROM', restored and restored[2], flush=True)
    step = restored[2] + 1 if restored else 1
    checkpoints.save(step, spread(host_state(step)), {})
    checkpoints.wait()
    if jax.process_index() == 1:
        SaveTogether._exchange = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    print('SAVING', step + 1, flush=True)
    checkpoints.save(step + 1, spread(host_state(step + 1)), {})
    checkpoints.wait()


if __name__ == '__main__':
    processes.join(heartbeat_timeout_seconds=10)
    globals()[sys.argv[1]](as_path(sys.argv[2]))
    print('DONE')
