"""Chooses the blocks of a teacher that keep its attention (`analyze.py --linearize`): every block gets a new
mixer, all are aligned for a short time, and those with the largest errors keep what they had."""
import contextlib
import json
import time
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from lit_jax.analysis import figures
from lit_jax.analysis.analyze_options import AnalyzeOptions
from lit_jax.analysis.budget import Budget, Costs, worst_blocks
from lit_jax.analysis.examples import find_data
from lit_jax.checkpoint.load import read_weights_config
from lit_jax.data.pipeline import make_pipeline
from lit_jax.models.arch import check_arch, mixers_of
from lit_jax.models.network import Network
from lit_jax.recipes.recipe import finalize
from lit_jax.recipes.students import student
from lit_jax.report.html import Report
from lit_jax.runtime.errors import UserError, human_bytes
from lit_jax.runtime.paths import prepare_folder, write_text_atomic
from lit_jax.runtime.progress import Progress, format_seconds
from lit_jax.training import setup
from lit_jax.training.align import ERROR
from lit_jax.training.from_teacher import complete
from lit_jax.training.mesh import BatchLayout, make_mesh
from lit_jax.training.stages import plan_stages

MEASURED = 8      # batches after the alignment, over which errors are averaged
_KEPT_OF_WORKDIRS = ('path', 'classes', 'buckets', 'strict')


def linearize(request: AnalyzeOptions, out) -> str:
    """Writes linearize.json, linearize.png and report.html into `out`; returns a summary for people."""
    began, budget = time.perf_counter(), Budget.parse(request.budget)
    if request.align_steps < 1 or not request.align_rate > 0:
        raise UserError('--align_steps must be at least 1, and --align_rate above 0')
    config = student_recipe(request)
    setup.check_inputs(config)
    network = setup.build_network(config)
    teacher = Network(setup.read_teacher_arch(config))
    if len({json.dumps(mixer, sort_keys=True) for mixer in mixers_of(teacher.arch)}) > 1:
        raise UserError(f'the blocks of the teacher {request.source} have different mixers already; '
                        f'--linearize takes teachers with one')
    plan_stages(config, network, teacher.arch)      # that it can be aligned, before anything is computed
    costs = Costs.of(teacher, network)
    kept = budget.kept(costs)
    prepare_folder(out)
    errors = aligned_errors(config, network)
    found = describe(config, costs, errors, budget, kept)
    pixels = figures.save(figures.linearize(found), out / 'linearize.png')
    write_page(out, found, pixels)
    write_text_atomic(out / 'linearize.json', json.dumps(found, indent=1) + '\n')
    seconds = format_seconds(time.perf_counter() - began)
    return '\n'.join([*summary(found), f'wrote {out}: report.html, linearize.json, linearize.png; {seconds}'])


def student_recipe(request: AnalyzeOptions) -> ConfigDict:
    """The recipe of the student with a new mixer in every block, on the data of the request or of the
    teacher's own workdir, for the devices that are here (batches of a multiple of them)."""
    source = request.source
    given = read_weights_config(source)
    recipe = student(request.mixer).unlock()
    recipe.teacher.path = recipe.inherit.path = source
    recipe.data.name, own = find_data(given, source, request.data, request.data_path)
    recipe.data.update({name: own[name] for name in _KEPT_OF_WORKDIRS if name in own})
    before = given.get('recipe', {})
    recipe.latent.vae_path = request.vae or before.get('latent', {}).get('vae_path') or recipe.latent.vae_path
    recipe.text.encoder_path = before.get('text', {}).get('encoder_path') or recipe.text.encoder_path
    recipe.seed, recipe.data.flip = request.seed, False
    devices = jax.device_count()
    recipe.train.batch_size, recipe.train.dtype = -(-request.batch_size // devices) * devices, request.dtype
    recipe.train.scan_layers = check_arch(given['model'])['depth'] > 12
    recipe.align.update({'steps': request.align_steps, 'learning_rate': request.align_rate})
    return finalize(complete(recipe.lock()), devices)


def aligned_errors(config: ConfigDict, network: Network) -> list[float]:
    """[depth]: squared error of each new mixer over the variance of its target after the alignment of a
    recipe, on batches that it has not seen in this order."""
    mesh = make_mesh(config.mesh.to_dict())
    source = setup.build_source(config)
    frozen = setup.load_frozen(config, mesh, source)
    stage = plan_stages(config, network, frozen.teacher.arch)[0]
    with jax.set_mesh(mesh):
        params, _ = setup.init_params(config, network, mesh)
        state, key = stage.begin(params, network, mesh), setup.run_key(config, mesh)
        step = setup.jit_stage(config, network, stage, mesh, *frozen.networks)
        layout = BatchLayout(mesh, config.train.batch_size)
        pipeline = make_pipeline(source, global_batch=config.train.batch_size, seed=config.seed,
                                 rows=layout.rows, augment=setup.build_augment(config),
                                 threads=setup.reading_threads(config))
        names = [f'{ERROR}{block:02d}' for block in range(network.arch['depth'])]
        measured = []
        with Progress(stage.last + MEASURED, 'steps of alignment') as progress:
            # The rate has fallen to 0 after the last step: what follows only measures.
            with contextlib.closing(pipeline):
                for number, batch in zip(range(stage.last + MEASURED), pipeline, strict=False):
                    state, metrics = step(state, frozen.params, layout.place(batch), key)
                    if number >= stage.last:
                        measured.append([metrics[name] for name in names])
                    progress.add(1)
    return np.mean(jax.device_get(measured), axis=0, dtype=np.float64).tolist()


def describe(config: ConfigDict, costs: Costs, errors: list[float], budget: Budget, kept: int) -> dict:
    """Everything that was found, for linearize.json."""
    chosen = worst_blocks(errors, kept)
    return {
        'teacher': config.teacher.path, 'mixer': config.model.mixer.to_dict(), 'data': config.data.name,
        'align': {'steps': config.align.steps, 'learning_rate': config.align.learning_rate,
                  'batch_size': config.train.batch_size, 'seed': config.seed},
        'blocks': [{'block': block, 'error': error, 'keeps': block in chosen}
                   for block, error in enumerate(errors)],
        'block_gmacs': {'teacher': costs.macs[0] / 1e9, 'new': costs.macs[1] / 1e9},
        'block_state_bytes': dict(zip(('teacher', 'new'), costs.state, strict=True)),
        'teacher_gmacs': costs.teacher_macs / 1e9,
        'hybrids': [{'kept': count, 'blocks': (blocks := worst_blocks(errors, count)),
                     'error': sum(error for block, error in enumerate(errors) if block not in blocks)
                     / costs.depth, 'gmacs': costs.gmacs(count), 'state_bytes': costs.state_bytes(count)}
                    for count in range(costs.depth)],
        'budget': budget.text, 'kept': chosen, 'flag': stages_flag(chosen)}


def stages_flag(blocks: list[int]) -> str:
    """The flag of train.py that keeps these blocks; '' for none."""
    return f'--config.model.stages={",".join(map(str, blocks))}' if blocks else ''


def command(found: Mapping) -> str:
    """The command that trains the hybrid."""
    return ' '.join(filter(None, (
        f'python train.py --config=configs/student.py:{found["mixer"]["name"]}',
        f'--config.teacher.path={found["teacher"]}', found['flag'])))


def summary(found: Mapping) -> list[str]:
    """The table of the blocks, what was chosen, and the command."""
    chosen = found['hybrids'][len(found['kept'])]
    rows = [f'{"block":>5} {"error":>8}  keeps its attention']
    rows += [f'{one["block"]:5} {one["error"]:8.4f}  {"yes" if one["keeps"] else ""}'.rstrip()
             for one in found['blocks']]
    cost, state = found['block_gmacs'], found['block_state_bytes']
    rows += [f'a block: attention of the teacher {cost["teacher"]:.4g} GMACs{_bytes(state["teacher"])}, '
             f'{found["mixer"]["name"]} {cost["new"]:.4g} GMACs{_bytes(state["new"])}']
    if cost['new'] >= cost['teacher']:
        rows += ['at so few tokens the new mixer costs more than the attention that it replaces']
    rows += [f'{found["budget"]}: {len(found["kept"])} of {len(found["blocks"])} blocks keep their '
             f'attention; error, mean over all blocks, {chosen["error"]:.4f} instead of '
             f'{found["hybrids"][0]["error"]:.4f}; {chosen["gmacs"]:.4g} GMACs (teacher '
             f'{found["teacher_gmacs"]:.4g}){_bytes(chosen["state_bytes"])}',
             f'  {found["flag"] or "no block keeps its attention: no flag is needed"}', f'  {command(found)}']
    return rows


def _bytes(count: int | None) -> str:
    return '' if count is None else f', {human_bytes(count)} of state'


def write_page(out, found: Mapping, pixels: np.ndarray) -> None:
    """report.html."""
    report, align = Report(f'Which blocks of {found["teacher"]} keep their attention'), found['align']
    report.paragraph(f'A {found["mixer"]["name"]} mixer in every block, aligned for {align["steps"]:,} steps '
                     f'of {align["batch_size"]} images of {found["data"]} (learning rate '
                     f'{align["learning_rate"]:g}, seed {align["seed"]}). Error: squared error over the '
                     f"variance of what the teacher's attention returns, mean of {MEASURED} further batches.")
    report.image(pixels, 'error by block, and what is left of it by the number of blocks that keep theirs')
    report.heading(f'For {found["budget"]}')
    report.preformatted('\n'.join(filter(None, (found['flag'], command(found)))))
    report.heading('Blocks')
    report.table(('block', 'error', 'keeps its attention'), [
        (one['block'], f'{one["error"]:.4f}', 'yes' if one['keeps'] else '') for one in found['blocks']])
    cost, state = found['block_gmacs'], found['block_state_bytes']
    report.table(('a block', 'GMACs', 'bytes of state'), [
        (name, f'{cost[name]:.4g}', '' if state[name] is None else f'{state[name]:,}') for name in cost])
    report.heading('Hybrids')
    report.paragraph('The blocks with the largest errors keep theirs; errors are means over all blocks.')
    report.table(('blocks that keep theirs', 'error', 'GMACs of an image', 'bytes of state', 'which'), [
        (one['kept'], f'{one["error"]:.4f}', f'{one["gmacs"]:.4g}',
         '' if one['state_bytes'] is None else f'{one["state_bytes"]:,}', ','.join(map(str, one['blocks'])))
        for one in found['hybrids']], scroll=True)
    report.write(out / 'report.html')
