"""Multi-process runs on top of jax.distributed: joining, checking that all are set up alike, noticing losses.

A process joins a run when a scheduler (TPU pods, GKE, SLURM, Open MPI) started it or three flags say so."""
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from lit_jax.runtime import peers, signals
from lit_jax.runtime.differences import LINES, find_differences
from lit_jax.runtime.errors import UserError, listed, reason_of
from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.memory import is_out_of_memory
from lit_jax.runtime.options import Processes

LOG = logging.getLogger('lit_jax')
LOST = 76                    # exit status: another process is gone, start all of them again
JOIN_SECONDS = 300
HANG_SECONDS = 1800          # without a step for so long, a run of several processes exits
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')


def find_cluster(environment: Mapping[str, str], tpu_host: bool = False) -> str | None:
    """The scheduler that started this process, or None. tpu_host: whether this machine has TPUs."""
    def count(name):
        text = environment.get(name, '')
        return int(text) if text.isdigit() else 0

    if 'SLURM_STEP_NODELIST' in environment and count('SLURM_NTASKS') > 1:     # srun, not the shell of salloc
        return 'SLURM'
    if count('OMPI_COMM_WORLD_SIZE') > 1:
        return 'Open MPI'
    if 'JAX_COORDINATOR_ADDRESS' in environment:
        return 'JAX_COORDINATOR_ADDRESS'
    if ',' in environment.get('TPU_WORKER_HOSTNAMES', '') or 'MEGASCALE_COORDINATOR_ADDRESS' in environment:
        return 'GKE'
    return 'TPU VM' if tpu_host else None        # its metadata names the other hosts


def has_tpus() -> bool:
    """Whether this machine has TPU devices and their library; opens neither."""
    if os.environ.get('JAX_PLATFORMS', 'tpu') not in ('', 'tpu', 'tpu,cpu'):
        return False
    devices = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
    return bool(devices) and importlib.util.find_spec('libtpu') is not None


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
         heartbeat_seconds: int = Processes.heartbeat_seconds) -> None:
    """Starts jax.distributed if this process is one of several. Call before anything uses a device.

    Args:
        coordinator: HOST:PORT of process 0. Give all three of these arguments, or none to ask the scheduler.
        heartbeat_seconds: a process that is silent for so long counts as lost, and all others exit.
    Raises:
        UserError: arguments are missing or contradict each other, or the scheduler names no others."""
    given = {'--coordinator': coordinator, '--num_processes': num_processes, '--process_id': process_id}
    options: dict[str, Any] = {'heartbeat_timeout_seconds': heartbeat_seconds,
                               'initialization_timeout': JOIN_SECONDS}
    if any(value is not None for value in given.values()):
        _check_flags(given)
        LOG.info('joining %s as process %d of %d; waiting up to %d s for the others', coordinator, process_id,
                 num_processes, JOIN_SECONDS)
        jax.distributed.initialize(coordinator, num_processes, process_id,
                                   cluster_detection_method='deactivate', **options)
    elif cluster := find_cluster(os.environ, has_tpus()):
        LOG.info('started by %s: joining the other processes, waiting up to %d s for them', cluster,
                 JOIN_SECONDS)
        try:
            jax.distributed.initialize(os.environ.get('JAX_COORDINATOR_ADDRESS'),
                                       *_count_and_index(os.environ), **options)
        except (ValueError, RuntimeError) as error:
            if cluster == 'TPU VM':      # notebooks have TPUs too, but no metadata that names other hosts
                LOG.info('this machine names no other hosts (%s): running alone', error)
                return
            raise UserError(f'{cluster} started this process beside others, but jax cannot tell which: '
                            f'{reason_of(error)}. Give --coordinator=HOST0:PORT --num_processes=N '
                            f'--process_id=I on '
                            f'every host.') from error
    if jax.process_count() > 1:      # gloo wants the first collective within 30 s of all
        multihost_utils.sync_global_devices('lit_jax joined')


def process() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    return jax.process_index(), jax.process_count()


def _check_flags(given: Mapping) -> None:
    if missing := [name for name, value in given.items() if value is None]:
        raise UserError(f'{", ".join(missing)} is missing: give --coordinator=HOST0:PORT, --num_processes=N '
                        'and --process_id=I together, the same on every host except I')
    address, count, index = given.values()
    if ':' not in address or not address.rsplit(':', 1)[1].isdigit():
        raise UserError(f'--coordinator={address} has no port; expected HOST:PORT of process 0, such as '
                        '10.0.0.2:8476')
    if not 0 <= index < count:
        raise UserError(f'--process_id={index} is not in 0..{count - 1} (--num_processes={count})')


def _count_and_index(environment) -> tuple[int | None, int | None]:
    """Variables set beside JAX_COORDINATOR_ADDRESS by launchers that jax does not know."""
    count, index = environment.get('JAX_NUM_PROCESSES'), environment.get('JAX_PROCESS_ID')
    return (int(count) if count else None), (int(index) if index else None)


def check_same(facts: Mapping) -> None:
    """Raises UserError on every process if nested `facts` (JSON-able) differ, naming keys and processes."""
    if jax.process_count() == 1:
        return
    (first, mine), *others = _gather(json.dumps(facts, sort_keys=True))
    if lines := [line for name, theirs in others
                 for line in find_differences(parse_json(mine, first), parse_json(theirs, name),
                                              f'on {first}', f'on {name}')]:
        raise UserError(f'the processes of this run are not set up alike:{listed(lines, LINES)}\nStart every '
                        'host with the same command, the same code and the same packages.')


@functools.cache      # of the code that runs: files may change under a run
def code_facts() -> dict:
    """What all hosts must share beside the recipe: a checksum of this code, Python and package versions."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {'lit_jax code': digest.hexdigest()[:12], 'python': platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES}}


def _gather(text: str) -> list[tuple[str, str]]:
    """('process 0 (host name)', its text) for each process."""
    pairs = [parse_json(said, 'the message of a process')
             for said in peers.gather(json.dumps([socket.gethostname(), text]))]
    return [(f'process {index} ({host})', text) for index, (host, text) in enumerate(pairs)]


def asked_to_stop(step: int) -> bool:
    """Whether all processes save and stop after `step`: one got SIGTERM, and jax picked the step for all."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def peers_watched(where: Callable[[], str]):
    """Exits with status LOST if a collective in this block fails because another process is gone.

    Unwinding would wait in barriers for a process that never comes. Processes that hang in a collective
    when heartbeats stop are aborted by jax (status 134). where(): which checkpoint the run resumes from."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or is_out_of_memory(error):
            raise
        LOG.error('error: another process of this run is gone (%s). Its own log has the reason. Start the '
                  'same command on every host again; %s.', reason_of(error), where())
        signals.leave(LOST)


class Watchdog:
    """Logs an error when no step has finished for long, and exits if a run of several processes hangs.

    Dead processes are also found by jax's heartbeats, but this message comes earlier and says what to do."""

    def __init__(self, warn_seconds: float, where: Callable[[], str], hang_seconds: float = HANG_SECONDS):
        self._warn, self._hang, self._where = warn_seconds, hang_seconds, where
        self._last: float | None = None
        self._longest, self._warned = 0.0, False
        self._closed = threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        """Call after each step, or anything else that shows progress."""
        now = time.monotonic()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last, self._warned = now, False

    def rest(self) -> None:
        """Call before work of unknown length (saving, sampling); the next `beat` starts the clock again."""
        self._last = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._warn / 4, 5.0)):
            last = self._last
            quiet = 0.0 if last is None else time.monotonic() - last
            if quiet > max(self._warn, 5 * self._longest) and not self._warned:
                self._warned = True
                LOG.error('no step has finished for %.0f s: another process of this run is probably gone or '
                          'stuck; look at its log. If it is gone, jax ends this one when its heartbeats are '
                          'missed. Then start all again; %s.', quiet, self._where())
            if quiet > max(self._hang, 20 * self._longest):
                LOG.error('error: no step for %.0f s, giving up; start the same command on every host again',
                          quiet)
                signals.leave(LOST)
