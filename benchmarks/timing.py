"""Command line and timing of the benchmarks, whose contenders take turns."""
import argparse
import os
import time


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_clock(parser: argparse.ArgumentParser) -> None:
    """--threads and --clock, for benchmarks that compare jax with PyTorch; see `set_clock`."""
    parser.add_argument('--threads', type=int, default=2, help='cores that both frameworks may use')
    parser.add_argument('--clock', choices=('wall', 'cpu'), default='wall',
                        help='cpu: processor time, less noisy on a busy machine; needs --threads 1')


def set_clock(parser: argparse.ArgumentParser):
    """(the arguments, the clock); limits the cores. To be called before jax and torch are imported: both
    start as many threads as they see cores."""
    arguments = parser.parse_args()
    if arguments.clock == 'cpu' and arguments.threads != 1:
        parser.error('--clock cpu adds up the time of all threads, also while they wait; give --threads 1 '
                     'with it')
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
    os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = str(arguments.threads)
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')     # leaves GPU memory to PyTorch
    return arguments, time.process_time if arguments.clock == 'cpu' else time.perf_counter


def take_turns(calls: dict, repeats: int, clock=time.perf_counter, timed: int = 1,
               warm: bool = True) -> dict[str, list[float]]:
    """Milliseconds of each call, `timed` of them in each of `repeats` turns.

    The calls take turns, so that other load on the machine affects all alike. A turn begins with an untimed
    call (`warm`), which fills caches and frees the memory of the call before."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if warm:
                call()
            for _ in range(timed):
                start = clock()
                call()
                taken[name].append(1e3 * (clock() - start))
    return taken


def check_same(name: str, ours, theirs, bound: float) -> None:
    """Exits if the largest difference of two float arrays, relative to the largest value, exceeds `bound`."""
    import numpy as np
    error = float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())
    print(f'{name}: largest difference {error:.1e} of the largest value')
    if not error <= bound:
        raise SystemExit(f'{name}: the results differ, so the times cannot be compared')
