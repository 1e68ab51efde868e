"""Runs many small trainings at once: one process per core trains a recipe and measures the result."""
import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol, TextIO

import jax
from ml_collections import ConfigDict

from lit_jax.runtime import alive, cli
from lit_jax.runtime.compiler import wide_vectors
from lit_jax.runtime.progress import format_seconds, heard, unwatched, working
from lit_jax.training import loop
from lit_jax.training.metrics_log import read_lines


class Job(Protocol):
    """One run of `arm`, one of the compared variants; `recipe()` is trained in `path`."""
    arm: str
    seed: int
    path: Path

    def recipe(self) -> ConfigDict: ...


def run_all(workdir: Path, jobs: Sequence[Job], measure: Callable[[Path], dict], tell: Callable[[dict], str],
            there: Mapping[str, Path] | None = None, most: int = 0) -> dict[str, list[dict]]:
    """{arm: the figures of each seed}, first of the models that are `there` already.

    measure: (model folder or workdir) -> figures, picklable, because it runs in another process. tell:
    figures -> a line. most: processes; 0: one for each core."""
    there = dict(there or {})
    runs: dict[str, dict[int, dict]] = {arm: {} for arm in [*there, *(job.arm for job in jobs)]}
    began, waiting = time.monotonic(), {}

    def describe() -> str:
        left = {entry: future.running() for future, entry in waiting.items() if not future.done()}
        return _status(jobs, left, began)

    with working(describe), workers(min(most or _cores(), len(jobs) + len(there))) as pool:
        waiting |= {pool.submit(_train_and_measure, workdir, None, path, measure): (arm, 0)
                    for arm, path in there.items()}
        waiting |= {pool.submit(_train_and_measure, workdir, job, job.path, measure): (job.arm, job.seed)
                   for job in jobs}
        for done in as_completed(waiting):
            (arm, seed), (measured, seconds) = waiting[done], done.result()
            runs[arm][seed] = measured
            print(f'{arm:10} seed {seed}: {tell(measured)}  ({format_seconds(seconds)})', flush=True)
            heard()
    return {arm: [seeds[seed] for seed in sorted(seeds)] for arm, seeds in runs.items()}


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _status(jobs: Sequence[Job], left: Mapping[tuple[str, int], bool], began: float) -> str:
    """Which runs are on their way, how far each is, and where the logs are. left: (arm, seed) of what is not
    done -> whether a worker has it."""
    parts, waiting = [], 0
    for job in jobs:
        if (job.arm, job.seed) not in left:
            continue
        record = (read_lines(job.path / 'metrics.jsonl') or [{}])[-1]
        recipe = job.recipe()
        step, total = record.get('step', 0), recipe.align.steps + recipe.train.steps
        if not (job.path / 'log.txt').exists():
            waiting += 1
        elif step >= total:
            parts.append(f'{job.arm} seed {job.seed} is sampled and scored')
        else:
            eta = f', {format_seconds(record["time/eta_s"])} left' if 'time/eta_s' in record else ''
            parts.append(f'{job.arm} seed {job.seed} step {step:,}/{total:,}{eta}')
    for (arm, seed), running in left.items():
        if (arm, seed) not in {(job.arm, job.seed) for job in jobs}:      # it is there, to be measured
            parts += [f'{arm} is sampled and scored'] if running else []
            waiting += not running
    parts += [f'{waiting} waiting'] if waiting else []
    where = f'; logs: {jobs[0].path.parent}/*/log.txt' if jobs else ''
    return f'{format_seconds(time.monotonic() - began)}: {"; ".join(parts)}{where}'


class _Workers(ProcessPoolExecutor):
    """Starts nothing new after an error or Ctrl-C, for which its block ends."""

    def __exit__(self, kind, *error):
        self.shutdown(wait=True, cancel_futures=kind is not None)


def workers(count: int) -> ProcessPoolExecutor:
    """Processes with one core each, which end with this one: these models are too small for several."""
    # Large pages (glibc 2.35) make a step a quarter faster, because its temporaries are new memory each time.
    os.environ.setdefault('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
    flags = {'xla_cpu_multi_thread_eigen': 'false', **wide_vectors()}
    os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''),
                                        *(f'--{name}={value}' for name, value in flags.items())])
    context = multiprocessing.get_context('spawn')
    numbers = context.Queue()
    for number in range(count):
        numbers.put(number)
    return _Workers(count, context, initializer=_start_worker, initargs=(numbers, os.getpid()))


def _start_worker(numbers: multiprocessing.Queue, parent: int) -> None:
    """Ends with its parent, and stays on one core. Otherwise each worker starts a thread for every core,
    which is a fifth slower."""
    alive.stop_with_parent(parent)
    number = numbers.get()
    if hasattr(os, 'sched_setaffinity'):      # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def train_alone(workdir: Path, recipe: ConfigDict, path: Path) -> None:
    """Trains one recipe on one core, as the others are, but shows its log."""
    with unwatched(), workers(1) as pool:      # its own log is shown
        pool.submit(_train, workdir, recipe, path, watched=True).result()


def _train_and_measure(workdir: Path, job: Job | None, path: Path,
                       measure: Callable[[Path], dict]) -> tuple[dict, float]:
    """Trains a job, if there is one, and measures the model in `path`; in a worker, which logs to a file."""
    began = time.perf_counter()
    keep_compiled_programs(workdir)
    with contextlib.ExitStack() as open_files:
        if job is None:
            cli.setup_logging(open_files.enter_context(open(os.devnull, 'w')))
        else:
            path.mkdir(parents=True, exist_ok=True)
            log = open_files.enter_context(open(path / 'log.txt', 'a'))
            _train(workdir, job.recipe(), path, log)
        try:
            return measure(path), time.perf_counter() - began
        finally:
            cli.setup_logging()      # the file is closed


def _train(workdir: Path, recipe: ConfigDict, path: Path, log: TextIO | None = None, *,
           watched: bool = False) -> None:
    keep_compiled_programs(workdir)
    cli.setup_logging(log)
    if watched:
        alive.Alive().start()
    if loop.train(recipe, path) != 'done':
        os._exit(loop.PREEMPTED)      # interrupted: the worker must not take the next job


def keep_compiled_programs(workdir: Path) -> None:
    """Compiles each program only once for all seeds and runs of the demo."""
    jax.config.update('jax_compilation_cache_dir', str((workdir / 'compiled').absolute()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    logging.getLogger('jax').setLevel(logging.ERROR)
