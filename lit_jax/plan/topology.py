"""Devices to compile for that need not be here: `v5e:4x4`, `v5p:2x4x4`, `cpu:8`.

TPU slices come from the TPU compiler, which the `libtpu` wheel brings to any Linux machine. Nothing here
starts or looks for an accelerator: jax is told to use the CPU only.
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
from lit_jax.runtime.errors import UserError

# libtpu asks the cloud's metadata server what machine it is on, and wants to be alone: neither holds for a
# compiler. A slice type and a host are only there to be named; the topology is given apart.
_ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
                'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
                'TPU_LOG_DIR': 'disabled'}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: as it was asked for, 'v5e:4x4'.
        devices: abstract TPU devices, or virtual CPU devices.
        hosts: machines of the slice; None for cpu.
        chip: its row of CHIPS; None for cpu.
        memory: bytes a device, usable_memory: what one program may use of them.
    """
    name: str
    devices: tuple
    hosts: int | None
    chip: Chip | None
    memory: float
    usable_memory: float


def find_topology(name: str) -> Topology:
    """The devices of a topology name; UserError that lists what is known if there are none of that name."""
    kind, _, shape = name.partition(':')
    if kind == 'cpu':
        return _cpu(name, shape)
    chips = {chip.name: chip for chip in CHIPS}
    if kind in ('gpu', 'cuda', 'rocm') or (kind in chips and chips[kind].platform == 'gpu'):
        raise UserError(f'{name}: programs for a GPU can only be compiled where one is, so a plan covers TPU '
                        f'slices and cpu:N. On a GPU machine, --dry_run shows the sharding, and the first '
                        f'log line the memory.')
    if kind not in chips:
        raise UserError(f'unknown topology {name!r}; known:\n{_known()}')
    return _tpu(name, chips[kind], shape)


def next_larger(topology: Topology) -> str | None:
    """The name of the next slice of the same chip with more devices; None if there is none."""
    if topology.chip is None:
        return None
    mine = _count(topology.name.partition(':')[2])
    larger = [shape for shape in topology.chip.shapes if _count(shape) > mine]
    return f'{topology.chip.name}:{larger[0]}' if larger else None


def _known() -> str:
    lines = [f'  {chip.name:6} {", ".join(f"{chip.name}:{shape}" for shape in chip.shapes)}'
             for chip in CHIPS if chip.platform == 'tpu']
    return '\n'.join([*lines, '  cpu    cpu:8 (any number of virtual devices)',
                      'A slice goes by its shape in chips: what the cloud calls v5litepod-16 is v5e:4x4, '
                      'v5p-64 (64 cores, 32 chips) is v5p:2x4x4.'])


def _count(shape: str) -> int:
    return math.prod(int(side) for side in shape.split('x'))


# ------------------------------------------------------------------------------------------------------
# TPU


def _tpu(name: str, chip: Chip, shape: str) -> Topology:
    known = f'shapes of {chip.name}: {", ".join(chip.shapes)}' + (', and others of three axes'
                                                                  if chip.any_shape else '')
    if not re.fullmatch(r'\d+(x\d+)*', shape) or shape.count('x') != chip.shapes[0].count('x'):
        raise UserError(f'{name}: {shape!r} is no shape of a {chip.name} slice; {known}')
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
            raise UserError(f'{name}: the TPU compiler refuses it: {_first_line(error)}\n{known}') from error
    hosts = len({device.process_index for device in devices})
    return Topology(name, tuple(devices), hosts, chip, chip.hbm_bytes, chip.usable_bytes or chip.hbm_bytes)


@contextlib.contextmanager
def _environment():
    """_ENVIRONMENT for as long as libtpu is being loaded; what a person has set stays."""
    missing = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


# ------------------------------------------------------------------------------------------------------
# CPU


def _cpu(name: str, count: str) -> Topology:
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f'{name!r} is no number of virtual CPU devices; an example: cpu:8')
    wanted = int(count)
    jax.config.update('jax_platforms', 'cpu')
    with contextlib.suppress(RuntimeError):                # jax has started: it keeps the devices that it has
        jax.config.update('jax_num_cpu_devices', wanted)
    devices = jax.devices('cpu')
    if len(devices) < wanted:
        raise UserError(f'{name}: jax runs already with {len(devices)} CPU device(s) in this process, '
                        f'{wanted} are asked for; make the plan in a process of its own')
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / wanted     # they share this machine's
    return Topology(name, tuple(devices[:wanted]), None, None, memory, memory)
