"""Published figures of accelerators (peak FLOP/s, memory, names of TPU slices), and whether a TPU is there.

Peaks are dense bfloat16. Sources: Google Cloud's page of each TPU version (peak compute per chip, HBM,
interconnect, topologies); NVIDIA's data sheets (BF16 Tensor Core, halved where the sheet quotes the figure
with sparsity).
`usable_bytes` is the limit that the compiler of libtpu 0.0.42.1 names when it refuses a program."""
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """One accelerator as jax counts devices: a whole chip; for TPU7x, half of one.

    Attributes:
        name: common name; for TPUs the first part of a topology name ('v5e' in 'v5e:16x16').
        kinds: its `jax.Device.device_kind` values.
        peak_flops: bfloat16 operations per second (a multiply-accumulate is two).
        hbm_bytes: memory per device.
        usable_bytes: memory available to one program; 0: unknown.
        shapes: available slices in chips, small to large: the second part of a topology name ('v5e:4x4').
        any_shape: other three-axis shapes exist too; otherwise `shapes` is complete.
        options: settings of `get_topology_desc` that give the devices of a real slice.
        clock: Hz, from the peak: matrix units x side² x 2 x clock; 0: unknown.
        link_bytes: bytes per second that a chip sends on all its links, half the published two-way rate.
        hbm_rate: bytes per second."""
    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: float
    platform: str = 'tpu'
    usable_bytes: float = 0
    shapes: tuple[str, ...] = ()
    any_shape: bool = False
    options: tuple[tuple[str, str], ...] = ()
    clock: float = 0
    link_bytes: float = 0
    hbm_rate: float = 0


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16')

CHIPS = (
    Chip('v4', ('TPU v4',), 275e12, 32 * 2**30, usable_bytes=30.75 * 2**30, shapes=_CUBES, any_shape=True,
         options=(('chip_config_name', 'megacore'),),    # else the compiler counts its two cores as devices
         clock=1.05e9, link_bytes=300e9, hbm_rate=1200e9),
    Chip('v5e', ('TPU v5 lite', 'TPU v5e'), 197e12, 16 * 2**30, usable_bytes=15.75 * 2**30, shapes=_FLAT,
         clock=1.5e9, link_bytes=200e9, hbm_rate=819e9),
    Chip('v5p', ('TPU v5', 'TPU v5p'), 459e12, 95 * 2**30, usable_bytes=95.74 * 2**30, shapes=_CUBES,
         any_shape=True, clock=1.75e9, link_bytes=600e9, hbm_rate=2765e9),
    Chip('v6e', ('TPU v6 lite', 'TPU v6e'), 918e12, 32 * 2**30, usable_bytes=31.25 * 2**30, shapes=_FLAT,
         clock=1.75e9, link_bytes=400e9, hbm_rate=1640e9),
    Chip('tpu7x', ('TPU7x',), 2307e12 / 2, 192 * 2**30 / 2, usable_bytes=94.75 * 2**30, shapes=_CUBES,
         any_shape=True),
    Chip('l4', ('NVIDIA L4',), 121e12, 24e9, 'gpu'),
    Chip('l40s', ('NVIDIA L40S',), 362e12, 48e9, 'gpu'),
    Chip('a100-40', ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-PCIE-40GB'), 312e12, 40e9, 'gpu'),
    Chip('a100-80', ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100 80GB PCIe'), 312e12, 80e9, 'gpu'),
    Chip('h100', ('NVIDIA H100 80GB HBM3',), 989e12, 80e9, 'gpu'),
    Chip('h100-pcie', ('NVIDIA H100 PCIe',), 756e12, 80e9, 'gpu'),
    Chip('h200', ('NVIDIA H200',), 989e12, 141e9, 'gpu'),
    Chip('b200', ('NVIDIA B200',), 2250e12, 180e9, 'gpu'),
)

_GOOGLE = '0x1ae0'           # PCI vendor of TPUs, and of disks and network cards of Google's machines,
_NOT_TPUS = '0x01', '0x02'   # whose PCI classes begin with these


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, or None for one that is not listed (a CPU, a new GPU)."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def choose_cpu() -> None:
    """Keeps jax from looking for a TPU where libtpu is installed and no TPU is, which prints errors of libtpu
    each time: sets JAX_PLATFORMS, unless it is set. Call before jax starts; it may be imported already."""
    if 'JAX_PLATFORMS' in os.environ or importlib.util.find_spec('libtpu') is None or has_tpu() or has_gpu():
        return
    jax = sys.modules.get('jax')
    if jax is not None and jax.config.jax_platforms:      # set by the program
        return
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if jax is not None:      # it has read the environment
        jax.config.update('jax_platforms', 'cpu')


def has_gpu() -> bool:
    """Whether NVIDIA's driver is there, or that of WSL."""
    return any(Path(device).exists() for device in ('/dev/nvidiactl', '/dev/dxg'))


def has_tpu(root: Path = Path('/')) -> bool:
    """Whether a TPU is attached to this machine: its device files, or Google's chips on the PCI bus."""
    if any(root.glob('dev/accel*')):
        return True
    for file in root.glob('sys/bus/pci/devices/*/vendor'):
        try:
            vendor, kind = file.read_text().strip(), file.with_name('class').read_text()
        except OSError:
            continue
        if vendor == _GOOGLE and not kind.startswith(_NOT_TPUS):
            return True
    return False
