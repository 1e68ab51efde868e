"""Virtual CPU devices (`XLA_FLAGS=--xla_force_host_platform_device_count=8`) and the threads that they need.

A CPU collective of XLA blocks the thread that it waits in. The thread pool, by default one per device or
core, fills up when several programs run on all devices, as with train steps dispatched ahead. The collective
then never completes, and XLA aborts the process after 40 seconds."""
import os
import re

FLAG = 'xla_force_host_platform_device_count'
THREADS_A_DEVICE = 8


def give_threads() -> None:
    """Sets `PJRT_NPROC`, the pool size, for several virtual devices unless set. Call before jax starts."""
    if not {'PJRT_NPROC', 'NPROC'} & set(os.environ) and (devices := requested()) > 1:
        os.environ['PJRT_NPROC'] = str(max(THREADS_A_DEVICE * devices, os.cpu_count() or 1))


def requested() -> int:
    """Virtual devices that XLA_FLAGS asks for (the last flag counts, as in XLA); 1 without the flag."""
    found = re.findall(rf'--{FLAG}=(\d+)', os.environ.get('XLA_FLAGS', ''))
    return int(found[-1]) if found else 1
