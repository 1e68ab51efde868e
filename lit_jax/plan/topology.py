"""Describes devices to compile for, which this machine need not have: `v5e:4x4`, `v5p:2x4x4`, `cpu:8`.

TPU slices need the TPU compiler of the `libtpu` package, which runs on any Linux machine. No accelerator is
used: jax is restricted to the CPU.
"""
import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from lit_jax.runtime.chips import CHIPS, Chip
from lit_jax.runtime.errors import UserError, reason_of, shown

# Stops libtpu from asking the cloud's metadata server about this machine, and from locking it. The slice type
# and the host are placeholders: the topology is passed separately.
_ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
                'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
                'TPU_LOG_DIR': 'disabled'}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: such as 'v5e:4x4'.
        devices: abstract TPU devices, or virtual CPU devices.
        hosts: number of machines of the slice; None for cpu.
        chip: from CHIPS; None for cpu.
        memory: bytes per device. usable_memory: the part that one program may use.
    """
    name: str
    devices: tuple
    hosts: int | None
    chip: Chip | None
    memory: float
    usable_memory: float


def find_topology(name: str) -> Topology:
    """The devices of a topology name. UserError, with the known names, for any other name."""
    kind, _, shape = name.partition(':')
    if kind == 'cpu':
        return _cpu(name, shape)
    chips = {chip.name: chip for chip in CHIPS}
    if kind in ('gpu', 'cuda', 'rocm') or (kind in chips and chips[kind].platform == 'gpu'):
        raise UserError(f'{name}: programs for a GPU can only be compiled on a machine with one, so a plan '
                        f'takes TPU slices and cpu:N. On a GPU machine, --dry_run shows the sharding, and '
                        f'the first log line the memory')
    if kind not in chips:
        raise UserError(f'unknown topology {shown(name)}; known:\n{_known()}')
    return _tpu(name, chips[kind], shape)


def next_larger(topology: Topology) -> str | None:
    """The name of the next larger slice of the same chip, or None."""
    if topology.chip is None:
        return None
    mine = _count(topology.name.partition(':')[2])
    larger = (shape for shape in topology.chip.shapes if _count(shape) > mine)
    return next((f'{topology.chip.name}:{shape}' for shape in larger), None)


def _known() -> str:
    lines = [f'  {chip.name:6} {", ".join(f"{chip.name}:{shape}" for shape in chip.shapes)}'
             for chip in CHIPS if chip.platform == 'tpu']
    return '\n'.join([*lines, '  cpu    cpu:8 (any number of virtual devices)',
                      'Slices are named by their shape in chips: v5litepod-16 of Google Cloud is v5e:4x4, '
                      'v5p-64 (64 cores, 32 chips) is v5p:2x4x4.'])


def _count(shape: str) -> int:
    return math.prod(int(side) for side in shape.split('x'))


def _tpu(name: str, chip: Chip, shape: str) -> Topology:
    others = ', and others of three axes' if chip.any_shape else ''
    known = f'shapes of {chip.name}: {", ".join(chip.shapes)}{others}'
    if not re.fullmatch(r'\d+(x\d+)*', shape) or shape.count('x') != chip.shapes[0].count('x'):
        raise UserError(f'{name}: {shown(shape)} is no shape of a {chip.name} slice; {known}')
    if shape not in chip.shapes and not chip.any_shape:
        raise UserError(f'{name}: there is no {chip.name} slice of that shape; {known}')
    if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
        raise UserError(f'{name}: the TPU compiler is missing; pip install "lit_jax[tpu]" (Linux on '
                        'x86-64; no TPU is needed)')
    options = dict(chip.options)
    if _count(shape) == 1:
        options['chips_per_host_bounds'] = (1, 1, 1)       # otherwise a host has four chips
    jax.config.update('jax_platforms', 'cpu')
    with _environment():
        try:
            devices = topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
        except (RuntimeError, ValueError) as error:        # jax.errors.JaxRuntimeError is a RuntimeError
            raise UserError(f'{name}: the TPU compiler refuses it: {reason_of(error)}\n{known}') from error
    hosts = len({device.process_index for device in devices})
    return Topology(name, tuple(devices), hosts, chip, chip.hbm_bytes, chip.usable_bytes or chip.hbm_bytes)


@contextlib.contextmanager
def _environment():
    """Sets _ENVIRONMENT while libtpu is loaded; variables that are set already stay."""
    missing = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _cpu(name: str, count: str) -> Topology:
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f'{shown(name)} does not give a number of virtual CPU devices; an example: cpu:8')
    wanted = int(count)
    jax.config.update('jax_platforms', 'cpu')
    with contextlib.suppress(RuntimeError):                # if jax has started, its devices stay
        jax.config.update('jax_num_cpu_devices', wanted)
    devices = jax.devices('cpu')
    if len(devices) < wanted:
        raise UserError(f'{name}: jax has already started with {len(devices)} CPU device(s), but the plan '
                        f'needs {wanted}; make the plan in a new process')
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / wanted     # shared by all
    return Topology(name, tuple(devices[:wanted]), None, None, memory, memory)
