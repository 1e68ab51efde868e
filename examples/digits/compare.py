"""Compares all systems of the papers on handwritten digits, with the same recipe, sampler and judge:

    python -m examples.digits.compare                              all systems, three seeds each
    python -m examples.digits.compare --systems dit,lit --seeds 1 --steps 5000 --workdir demo/compare_longer

Each is trained from scratch with the same steps, batch and optimizer; only the model differs. The results
show that each one learns, and the cost of a step on this machine; they say nothing about ImageNet. The same
command resumes an interrupted run.
"""
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from examples import pool, ruler
from examples.words import print_next, quoted
from lit_jax import recipes
from lit_jax.checkpoint.load import load
from lit_jax.recipes.recipe import finalize
from lit_jax.report.grids import make_sheet, save_png, to_uint8
from lit_jax.report.html import Report
from lit_jax.runtime import cli
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import option, parse_options
from lit_jax.runtime.progress import format_seconds
from lit_jax.training import setup
from lit_jax.training.mesh import BatchLayout, make_mesh

STEPS, SAMPLING_STEPS = 1_500, 25
SHOWN, GUIDED, CFG_SCALE = 10, 500, 2.0
TIMED = 30       # timed steps, after five untimed ones
# config.model of each system, with the sizes of the digits DiT. With 4x4 tokens, kernels are 3x3.
DIT = {'family': 'dit', 'depth': 4, 'width': 64, 'patch': 2}
SYSTEMS = {
    'dit': ('DiT: softmax attention', {**DIT, 'mixer': {'name': 'softmax', 'heads': 4}}),
    'dit_kv': ('KV-compressed DiT: softmax, the later half of the blocks sees 2x2 merged tokens', {
        **DIT, 'mixer': {'name': 'softmax', 'heads': 4},
        'stages': ({'depth': 2}, {'depth': 2, 'mixer': {'compress': 2}})}),
    'moh_dit': ('MoH-DiT: softmax heads, some shared, some routed', {
        **DIT, 'mixer': {'name': 'moh', 'heads': 4, 'shared': 2, 'routed': 1}}),
    'lit': ('LiT: ReLU linear attention, convolution on the values', {
        **DIT, 'mixer': {'name': 'linear', 'heads': 2, 'dwc_kernel': 3}}),
    'sana': ('Sana: ReLU linear attention, Mix-FFN',
             {**DIT, 'ffn': 'mix', 'mixer': {'name': 'sana', 'heads': 1}}),
    'edit': ('EDiT: linear compressed attention', {**DIT, 'mixer': {'name': 'edit', 'heads': 1}}),
    'dydi_lit': ('DyDi-LiT: routed projections, dynamic kernel, differential tokens, Mix-FFN', {
        **DIT, 'ffn': 'mix', 'mixer': {'name': 'dydila', 'heads': 1, 'projectors': 3, 'powers': 9,
                                       'factors': 9}}),
    'dig': ('DiG: gated linear attention, four scan directions', {
        **DIT, 'family': 'dig', 'ffn': 'swiglu', 'mixer': {'name': 'gla', 'heads': 2}}),
    'udig': ('U-DiG: DiG in three stages, patch 1', {
        **DIT, 'family': 'udig', 'ffn': 'swiglu', 'depth': 5, 'width': 32, 'patch': 1,
        'mixer': {'name': 'gla', 'heads': 1}}),
}
HEADER = ('system', 'parameters', 'MMACs', 'ms a step', 'Fréchet distance', 'of each seed', 'class accuracy')


@dataclass(frozen=True)
class Entry:
    """One run of the comparison; a `pool.Job`."""
    workdir: Path
    arm: str            # a key of SYSTEMS
    seed: int
    steps: int = STEPS

    @property
    def path(self) -> Path:
        return self.workdir / f'{self.arm}_{self.seed}'

    def recipe(self) -> ConfigDict:
        """The digits recipe with this system's model."""
        config = recipes.digits(recipes.default())
        config.name, config.seed = f'compare_{self.arm}', self.seed
        config.unlock()
        config.model = ConfigDict({'mlp_ratio': 4.0, 'learn_sigma': True, **SYSTEMS[self.arm][1]})
        config.lock()
        config.train.update({'steps': self.steps, 'warmup_steps': 100})
        config.checkpoint.every, config.sample.every = max(1, self.steps // 2), 0
        return config


def compare(workdir: Path, systems: Sequence[str], seeds: int, steps: int = STEPS) -> int:
    """Trains and measures; writes figures.json, table.md, samples.png and report.html; returns 0."""
    began = time.perf_counter()
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise UserError(f'unknown --systems: {", ".join(unknown)}; known: {", ".join(SYSTEMS)}')
    if seeds < 1 or steps < 1:
        raise UserError(f'--seeds and --steps must be at least 1, got {seeds} and {steps}')
    workdir.mkdir(parents=True, exist_ok=True)
    pool.keep_compiled_programs(workdir)
    one = measure_with(workdir)
    real = one.real()
    entries = [Entry(workdir, name, seed, steps) for seed in range(seeds) for name in systems]
    print(f'{len(entries)} runs of {steps:,} steps', flush=True)
    runs = pool.run_all(workdir, entries, one.measure, ruler.tell)
    rows = [ruler.row(name, load(Entry(workdir, name, 0).path), runs[name]) for name in systems]
    with pool.workers(1) as alone:
        for row in rows:
            print(f'timing a step of {row["name"]}', flush=True)
            row['step_ms'] = alone.submit(step_milliseconds, Entry(workdir, row['name'], 0)).result()
    result = {'rows': rows, 'steps': steps, 'seconds': round(time.perf_counter() - began), **real,
              'versions': {'python': platform.python_version(), 'jax': version('jax'),
                           'flax': version('flax')}}
    (workdir / 'figures.json').write_text(json.dumps(result, indent=1))
    (workdir / 'table.md').write_text(table(result))
    sheet = draw_sheet(workdir, systems)
    save_png(workdir / 'samples.png', sheet)
    write_report(workdir, result, sheet)
    print(f'\n{table(result)}\n{notes(result)}\n\n{format_seconds(time.perf_counter() - began)}. Open '
          f'{workdir / "report.html"}')
    first, last = (quoted(Entry(workdir, systems[i], 0).path) for i in (0, -1))
    print_next([f'python sample.py --from {first} --cfg_scale 2 --out digits.png',
                f'python analyze.py --from {last} --data digits',
                'python -m examples.mnist      # a teacher becomes linear'])
    return 0


def measure_with(workdir: Path) -> ruler.Ruler:
    return ruler.Ruler('digits', workdir, replace(ruler.DIGITS, steps=SAMPLING_STEPS), GUIDED)


def step_milliseconds(entry: Entry) -> float:
    """The median time of a train step on one batch."""
    pool.keep_compiled_programs(entry.workdir)
    config = finalize(entry.recipe(), 1)
    mesh = make_mesh(config.mesh.to_dict(), jax.devices()[:1])
    network, optimizer = setup.build_network(config), setup.build_optimizer(config)
    batch = BatchLayout(mesh,
                        config.train.batch_size).place(
                            setup.build_source(config).take(range(config.train.batch_size)))
    with jax.set_mesh(mesh):
        state, _ = setup.init_state(config, network, optimizer, mesh)
        step = setup.jit_step(config, network, optimizer, mesh,
                              setup.abstract_sharded_state(network, optimizer, mesh))
        times, key = [], setup.run_key(config, mesh)
        for _ in range(5 + TIMED):
            began = time.perf_counter()
            state, metrics = step(state, {}, batch, key)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times[5:]))


def cells(row: Mapping) -> tuple[str, ...]:
    """A row of the table as text."""
    each = ' / '.join(f'{run["distance"]:.2f}' for run in row['runs'])
    return (row['name'], f'{row["parameters"]:,}', f'{row["macs"] / 1e6:.2f}', f'{row["step_ms"]:.1f}',
            f'{row["distance"]:.2f}', each, f'{row["accuracy"]:.3f}')


def table(result: Mapping) -> str:
    """Markdown."""
    lines = [HEADER, ('---',) * len(HEADER), *(cells(row) for row in result['rows'])]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def notes(result: Mapping) -> str:
    """How the figures were measured."""
    return (f'{result["steps"]:,} steps of batch 64 from scratch, AdamW 2e-3, EMA weights, float32. Fréchet '
            f'distance of {ruler.COUNT:,} unguided samples in the features of a digits classifier '
            f'(floor, 360 real held-out digits: {result["floor"]:.2f}); class accuracy of {GUIDED} '
            f'samples with guidance {CFG_SCALE:g}; {SAMPLING_STEPS} sampling steps. ms a step: '
            f'median of {TIMED} on one core, without other load.')


def draw_sheet(workdir: Path, systems: Sequence[str]) -> np.ndarray:
    """Ten guided samples of each system, one row each, all from the same noise."""
    settings = replace(ruler.DIGITS, cfg_scale=CFG_SCALE)
    images = [ruler.draw(load(Entry(workdir, name, 0).path, scan_layers=False), np.arange(SHOWN), settings)
              for name in systems]
    return make_sheet([('', to_uint8(np.concatenate(images)))], SHOWN, list(systems), pad=1, scale=4)


def write_report(workdir: Path, result: Mapping, sheet: np.ndarray) -> None:
    report = Report('Token mixers compared on handwritten digits')
    report.paragraph('One recipe, one trainer, one sampler, one judge; only the model differs.')
    report.table(HEADER, [cells(row) for row in result['rows']])
    report.paragraph(notes(result))
    report.image(sheet, 'ten guided samples of each, from the same noise')
    report.heading('The systems')
    report.table(('name', 'what it is', 'config.model'), [
        (row['name'], *map(str, SYSTEMS[row['name']])) for row in result['rows']], scroll=True)
    report.write(workdir / 'report.html')


@dataclass(frozen=True)
class CompareOptions:
    workdir: Path = option('output folder', default=Path('demo/compare'))
    systems: tuple[str, ...] = option('systems to compare', default=tuple(SYSTEMS), metavar='NAMES')
    seeds: int = option('training runs of each system', default=3)
    steps: int = option('training steps of each run', default=STEPS)


def main() -> int:
    options = parse_options(CompareOptions, prog='python -m examples.digits.compare', description=__doc__)
    return compare(options.workdir, options.systems, options.seeds, options.steps)


if __name__ == '__main__':
    cli.run(main)
