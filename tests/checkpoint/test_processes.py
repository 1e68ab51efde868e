"""Checkpoints and model folders of several real processes: saved by four, read by one, two and four;
accidents."""
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_processes import abstract, assert_same_parts, host_state
from processes import assert_all_good, run_processes

from lit_jax.checkpoint import model_folder
from lit_jax.checkpoint.arrays import load_arrays
from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.runtime import storage

SCRIPT = Path(__file__).with_name('checkpoint_processes.py')


def run(scenario, folder, n, **options):
    return run_processes([SCRIPT, scenario, folder], n, timeout=60, **options)


def said(output, word):
    """The rest of each line that begins with `word`."""
    return [line.removeprefix(word + ' ') for line in output.splitlines() if line.startswith(word + ' ')]


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """What four processes with a device each have written."""
    folder = tmp_path_factory.mktemp('written')
    assert_all_good(run('write_everything', folder, 4))
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / 'copy'))


def test_four_processes_write_whole_checkpoints_and_nothing_else(written):
    assert names(written) == ['arrays', 'checkpoints', 'config.json', 'model']
    assert names(written / 'checkpoints') == ['000000001', '000000002']
    for step in (1, 2):
        root = written / 'checkpoints' / f'{step:09d}'
        assert storage.find_damage(root) == []
        files = {path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file()}
        assert set(storage.read_manifest(root)) == files - {'manifest.json'}
        assert {name.split('/')[1] for name in files
                if 'ocdbt.process' in name} == {f'ocdbt.process_{i}' for i in range(4)}


def test_one_process_reads_what_four_wrote(written):
    state, meta, step = Checkpoints(written).restore_latest(abstract(host_state(2)))
    assert (meta, step) == ({'seen': 2}, 2)
    assert_same_parts(state, host_state(2))
    ema, step = Checkpoints(written).restore_part('ema')
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, ema, host_state(2)['ema'])
    jax.tree.map(np.testing.assert_array_equal, load_arrays(written / 'arrays'), host_state(5)['params'])
    _, params = model_folder.load_model_folder(written / 'model')
    jax.tree.map(np.testing.assert_array_equal, params, host_state(6)['params'])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_two_processes_decide_alike_about_damage_and_go_on(copy):
    checkpoints = copy / 'checkpoints'
    shutil.copytree(copy / 'model', copy / 'broken_model')
    flip(copy / 'broken_model' / 'arrays' / 'kernel' / '0.0')
    flip(max((checkpoints / '000000002' / 'state').glob('ocdbt.process_3/d/*'),
             key=lambda path: path.stat().st_size))
    shutil.copytree(checkpoints / '000000002', copy / 'lost' / 'checkpoints' / '000000002')
    shutil.copytree(checkpoints / '000000002', checkpoints / '000000003.orbax-checkpoint-tmp')
    results = run('read_damaged', copy, 2, devices_each=2)
    assert_all_good(results)
    for i, (_, output) in enumerate(results):
        assert said(output, 'RESTORED') == ['1']
        assert 'none of the 1 checkpoints' in said(output, 'LOST')[0]
        assert str(copy / 'broken_model' / 'arrays' / 'kernel' / '0.0') in said(output, 'MODEL')[0]
        assert said(output, 'ONE OF US') == [('' if i == number else f'process {number} of this run: ') +
                                             f'{number} cannot'
                                             for number in range(2)]
    assert names(checkpoints) == ['000000001', '000000002', '000000002.damaged']
    assert names(copy / 'lost' / 'checkpoints') == ['000000002']
    state, meta, step = Checkpoints(copy).restore_latest(abstract(host_state(1)))
    assert (meta, step) == ({'seen': 22}, 2)
    assert_same_parts(state, {**host_state(1), 'step': np.int32(2)})


def test_a_full_disk_on_one_process_ends_the_save_on_all_at_once(tmp_path):
    results = run('fill_the_disk', tmp_path, 2)
    assert_all_good(results)
    (_, first), (_, second) = results
    assert 'process 1 could not write its part' in said(first, 'FULL')[0]
    assert 'no room to write' in said(second, 'FULL')[0]
    assert said(first, 'COMMIT')[0].startswith('no room to write')
    assert said(second, 'COMMIT')[0].startswith('process 0 of this run: no room to write')
    assert names(tmp_path / 'checkpoints') == ['000000001', '000000004']


@pytest.mark.slow
def test_a_process_that_dies_during_a_save_takes_the_others_with_it_and_costs_that_save_only(tmp_path):
    began = time.monotonic()
    results = run('die_while_saving', tmp_path, 2)
    assert time.monotonic() - began < 50
    assert results[1][0] == -signal.SIGKILL and results[0][0] not in (0, None)
    assert 'SAVING 2' in results[0][1] and '[killed' not in results[0][1]
    assert names(tmp_path / 'checkpoints') == ['000000001', '000000002.orbax-checkpoint-tmp']
    with Checkpoints(tmp_path) as checkpoints:
        state, _, step = checkpoints.restore_latest(abstract(host_state(1)))
    assert step == 1 and names(tmp_path / 'checkpoints') == ['000000001']
    assert_same_parts(state, host_state(1))
