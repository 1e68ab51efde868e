"""Measures the overhead of the training loop: the gap between steps, and the cost of a checkpoint.

    python -m benchmarks.overhead --config configs/lit_s.py --batch_size 8 --steps 40

Runs the real loop on synthetic data, with one save in the middle. The gap is the time from the end of a step
to the dispatch of the next: data, metrics, watchdog, signals. A save costs the time that it blocks the loop,
plus the slowdown of the steps during its background writing, given as a fraction of 500 steps.
"""
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.timing import make_parser


class Clock:
    """Replaces the jitted step: waits for each step, and records its times."""

    def __init__(self, step):
        self.step, self.calls = step, []

    def __call__(self, *args):
        import jax
        called = time.perf_counter()
        out = self.step(*args)
        dispatched = time.perf_counter()
        jax.block_until_ready(out)
        self.calls.append((called, dispatched, time.perf_counter()))
        return out


def measure(config, steps: int, workdir: Path) -> dict:
    """Seconds of the median step, the median gap, blocked by the save, and lost in the steps after it."""
    from lit_jax.training import loop
    clocks, blocked = [], []
    original_steps, original_save = loop._Run.steps, loop._Run._save

    def timed_steps(run, state, step_fn, *rest):
        clocks.append(Clock(step_fn))
        return original_steps(run, state, clocks[0], *rest)

    def timed_save(run, step, state):
        if step == steps:
            return
        began = time.perf_counter()
        original_save(run, step, state)
        blocked.append((began, time.perf_counter()))

    loop._Run.steps, loop._Run._save = timed_steps, timed_save
    loop.train(config, workdir)
    calls = clocks[0].calls[2:]          # the first ones compile and fill caches
    durations = [end - called for called, _, end in calls]
    gaps = [after[0] - before[2] for before, after in zip(calls, calls[1:], strict=False)]
    (began, ended), = blocked
    step = statistics.median(durations)
    beside = [d - step for d, (called, _, _) in zip(durations, calls, strict=True) if called >= ended][:10]
    return {'step': step, 'gap': statistics.median(gaps), 'blocked': ended - began, 'beside': sum(beside)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--config', default='configs/lit_s.py')
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--dtype', default='float32')
    args = parser.parse_args()
    from lit_jax.recipes.recipe import load_recipe
    config = load_recipe(args.config)
    config.data.name, config.train.steps, config.train.batch_size = 'synthetic', args.steps, args.batch_size
    config.teacher.path = config.inherit.path = ''
    config.train.dtype, config.sample.every = args.dtype, 0
    config.checkpoint.every = config.log.every = args.steps // 2
    with tempfile.TemporaryDirectory() as workdir:
        seconds = measure(config, args.steps, Path(workdir))
    step, cost = seconds['step'], seconds['blocked'] + seconds['beside']
    print(f'{config.name}, batch {args.batch_size}: median step {1e3 * step:.0f} ms\n'
          f'gap before the next dispatch {1e3 * seconds["gap"]:.2f} ms = {100 * seconds["gap"] / step:.2f} % '
          f'of a step\none checkpoint: blocks the loop for {seconds["blocked"]:.2f} s, and slows the ten '
          f'steps after it by {seconds["beside"]:.2f} s; {100 * cost / (500 * step):.2f} % of 500 steps')


if __name__ == '__main__':
    from lit_jax.runtime.cli import setup_logging
    setup_logging()
    main()
