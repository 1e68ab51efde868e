"""Virtual CPU devices (`XLA_FLAGS=--xla_force_host_platform_device_count=8`) and the threads that they need.

XLA's collectives on CPU hold the thread that they wait in. All devices of a process share one pool, by
default of a thread a device or a core; a program on all devices beside others, as steps that are sent ahead
are, can fill it with waiting threads. Then none is left for the device that the others wait for, and after 40
seconds XLA ends the process.
"""
import os
import re

FLAG = 'xla_force_host_platform_device_count'
THREADS_A_DEVICE = 8


def give_threads() -> None:
    """Sets `PJRT_NPROC`, the size of the pool, where several virtual devices are asked for and nobody set it.
    Call it before jax opens its devices."""
    if not {'PJRT_NPROC', 'NPROC'} & set(os.environ) and (devices := requested()) > 1:
        os.environ['PJRT_NPROC'] = str(max(THREADS_A_DEVICE * devices, os.cpu_count() or 1))


def requested() -> int:
    """How many virtual devices XLA_FLAGS asks for; the last word counts, as in XLA. 1 without any."""
    found = re.findall(rf'--{FLAG}=(\d+)', os.environ.get('XLA_FLAGS', ''))
    return int(found[-1]) if found else 1
