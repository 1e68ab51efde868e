"""The training loop: devices, data, model, teacher, state, restore, steps.

Starting again in the same workdir resumes exactly: batch k and the noise of step k are functions of (seed,
k), everything else is in the checkpoint. All processes of a run execute this; process 0 writes the log."""
import contextlib
import json
import logging
import threading
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.workdir import check_workdir, claim_workdir, read_inputs, read_workdir
from lit_jax.data.pipeline import make_pipeline
from lit_jax.recipes.recipe import finalize
from lit_jax.runtime import claim, cluster, peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.runtime.memory import explain_out_of_memory
from lit_jax.runtime.paths import as_path, write_text_atomic
from lit_jax.runtime.progress import format_seconds
from lit_jax.runtime.signals import PREEMPTED, save_first
from lit_jax.training import setup
from lit_jax.training.flops import stage_macs
from lit_jax.training.from_teacher import complete
from lit_jax.training.inputs import identify_inputs
from lit_jax.training.mesh import BatchLayout, make_mesh, replicated
from lit_jax.training.profile import ProfileWindow
from lit_jax.training.speed import peak_flops
from lit_jax.training.stages import plan_stages, stage_at
from lit_jax.training.state import ema_params
from lit_jax.training.telemetry import Diverged, Reporter, StepMetrics, read_lines
from lit_jax.training.text_conditioning import caption_examples

LOG = logging.getLogger('lit_jax')
WATCH_SECONDS = 30   # without a step, before the watchdog says so
_LESS_MEMORY = ('Less memory: mesh.fsdp=-1 (shards weights and optimizer), train.remat=dots or full, '
                'train.accumulate=2, a smaller train.batch_size, or more devices. train.py --plan=v5e:16x16 '
                'estimates what a slice needs (docs/run/plans.md).')
STAGE_NAMES = {'align': "alignment of the mixers with the teacher's attention", 'train': 'training'}


def run(config: ConfigDict, workdir, *, profile: tuple[int, int] | None = None) -> int:
    """`train` for the command line; returns an exit status: 0, 1, or PREEMPTED."""
    try:
        outcome = train(config, workdir, profile=profile)
    except Diverged as error:
        LOG.error('error: %s', error)
        return 1
    return PREEMPTED if outcome == 'preempted' else 0


def train(config: ConfigDict, workdir, *, profile: tuple[int, int] | None = None) -> str:
    """Trains a recipe in `workdir` (local or gs://...), from its newest whole checkpoint if there is one.
    profile: (first, last) step to trace. Returns 'done', or 'preempted' after SIGTERM (the state was saved).
    Raises UserError for anything that can be known before the first step, and Diverged if a loss becomes NaN
    or infinite."""
    # 1. Devices and recipe
    workdir = as_path(workdir)
    config = peers.together(lambda: finalize(complete(config), jax.device_count()))
    cluster.check_same({'recipe': config.to_dict(), 'workdir': str(workdir), **cluster.code_facts()})
    mesh = make_mesh(config.mesh.to_dict())

    # 2. Data
    peers.together(lambda: setup.check_inputs(config))
    source = peers.together(lambda: setup.build_source(config))
    cluster.check_same({'data': getattr(source, 'identity', {})})

    # 3. The workdir
    with claim.claimed(workdir, inside=True):
        about = setup.describe(config, source.class_names)
        inputs = peers.from_lead(lambda: identify_inputs(config, source, read_inputs(workdir)))
        check_workdir(workdir, config.to_dict(), inputs, about['classes'])
        return _train(config, workdir, mesh, source, about, inputs, profile)


def _train(config, workdir, mesh, source, about, inputs, profile) -> str:
    """`train` in a workdir that this run has claimed."""
    # 4. Model, teacher, step
    network = setup.build_network(config)
    stages = plan_stages(config, network, peers.together(lambda: setup.read_teacher_arch(config)))
    frozen = setup.load_frozen(config, mesh, source, inputs.get('teacher', {}).get('step'))
    vae, teacher = frozen.vae, frozen.teacher
    evaluation = None
    if config.eval.every or config.eval.full_every:
        from lit_jax.training.loop_evaluation import LoopEvaluation
        evaluation = LoopEvaluation(config, network, mesh, vae, workdir, about)
    step_fns = {stage.name: setup.jit_stage(config, network, stage, mesh, *frozen.networks)
                for stage in stages}

    # 5. State: the newest whole checkpoint, else fresh or inherited weights
    with jax.set_mesh(mesh), Checkpoints(workdir, keep_latest=config.checkpoint.keep_latest,
                                         keep_every=config.checkpoint.keep_every) as checkpoints:
        state, pending, start = _restore_or_init(config, network, stages, mesh, checkpoints, workdir, inputs)
        began = claim_workdir(workdir, config.to_dict(), about, frozen.null_text, inputs)
        run = _Run(config, workdir, mesh, network, vae, checkpoints, start, pending, began=began,
                   stages=stages, teacher_network=teacher and teacher.network, profile=profile,
                   evaluation=evaluation,
                   captions=caption_examples(config, source, frozen.text_encoder, frozen.null_text))
        LOG.info('%s: step %s of %s, %s images a step on %d device(s)', config.name or workdir.name,
                 f'{start:,}', f'{stages[-1].last:,}', config.train.batch_size, jax.device_count())

        # 6. Steps
        layout = BatchLayout(mesh, config.train.batch_size)
        pipeline = make_pipeline(source, global_batch=config.train.batch_size, seed=config.seed,
                                 start_step=start, rows=layout.rows, augment=setup.build_augment(config),
                                 threads=setup.reading_threads(config))
        try:
            with explain_out_of_memory('training', _LESS_MEMORY), cluster.peers_watched(run.where):
                return run.steps(state, step_fns, frozen.params, pipeline, layout)
        finally:
            run.close()
            pipeline.close()
            _report_bad_images(source)


def _restore_or_init(config, network, stages, mesh, checkpoints, workdir, inputs):
    """(state, metrics of the unfinished log interval, steps done)."""
    def abstract(step: int) -> dict:
        if step > stages[-1].last:
            fewest = step - stages[-1].first + 1
            raise UserError(f'{workdir} has reached step {step:,}, but this recipe ends with step '
                            f'{stages[-1].last:,}. Give --config.train.steps={fewest} or more to train '
                            'on, or another --workdir')
        return stage_at(stages, step).abstract(network, mesh)

    restored = checkpoints.restore_latest(abstract)
    if restored is not None:
        state, meta, step = restored
        LOG.info('resumed from step %s', f'{step:,}')
        return state, meta['pending_metrics'], step
    params, report = setup.init_params(config, network, mesh, inputs.get('inherit', {}).get('step'))
    if report is not None:
        from lit_jax.training.inherit import format_report
        LOG.info('inheritance from %s\n%s', config.inherit.path, format_report(report))
        if peers.is_lead():
            workdir.mkdir(parents=True, exist_ok=True)
            write_text_atomic(workdir / 'inheritance.json', json.dumps(report, indent=1))
    return stages[0].begin(params, network, mesh), [], 0


def _report_bad_images(source) -> None:
    if bad := getattr(source, 'bad', {}):
        first = '; '.join(f'{name}: {reason}' for name, reason in list(bad.items())[:3])
        LOG.warning('%d damaged image(s) were replaced by the next good one (%s%s); --config.data.strict '
                    'stops at the first', len(bad), first, '; ...' if len(bad) > 3 else '')


class _Run:
    """One call of `train`: when to log, save, sample, evaluate and stop."""

    def __init__(self, config, workdir, mesh, network, vae, checkpoints, start, pending, *, began, stages,
                 teacher_network, profile, evaluation, captions):
        self.config, self.workdir, self.mesh, self.network, self.vae = config, workdir, mesh, network, vae
        self.checkpoints, self.start, self.total = checkpoints, start, stages[-1].last
        self.stages, self.teacher_network = stages, teacher_network
        self.evaluation, self.captions = evaluation, captions
        self.metrics = StepMetrics([], pending)
        sinks = [name for name in ('tensorboard', 'wandb') if config.log[name]]
        self.reporter = Reporter(workdir, step=start, total_steps=self.total, sinks=sinks, began=began,
                                 recipe=config.to_dict(), batch_size=config.train.batch_size,
                                 device_count=jax.device_count(),
                                 peak_flops=peak_flops(jax.devices(), config.log.peak_tflops))
        self.profile = ProfileWindow(workdir / 'profile', profile, paused=self.reporter.paused)
        self.stop_asked = threading.Event()
        self.watchdog = cluster.Watchdog(WATCH_SECONDS, self.where)
        self._draw = None
        self._signals = contextlib.ExitStack()

    def where(self) -> str:
        """Where a restart resumes, for messages."""
        kept = self.checkpoints.steps()
        return f'it resumes from step {kept[-1]:,}' if kept else 'no checkpoint yet, so it starts from step 0'

    def steps(self, state, step_fns, frozen, pipeline, layout) -> str:
        key, config = setup.run_key(self.config, self.mesh), self.config
        batches, began = iter(pipeline), time.perf_counter()
        if self.start and peers.from_lead(lambda: self.reporter.owes_scores(self.start)):
            self._evaluate(self.start, state)
        for step in range(self.start + 1, self.total + 1):
            stage = stage_at(self.stages, step)
            if step in (self.start + 1, stage.first):
                state = self._enter(stage, step, state)
            waiting = time.perf_counter()
            batch = next(batches)
            self.reporter.waited(time.perf_counter() - waiting)
            batch = layout.place(batch)
            self.profile.before(step)
            with jax.transfer_guard('disallow'):     # a transfer in the middle of a step would wait for it
                state, metrics = step_fns[stage.name](state, frozen, batch, key)
            self.metrics.add(step, metrics)
            self.reporter.tick()
            self.profile.after(step, metrics)
            self.watchdog.beat()
            if step == self.start + 1:      # compiled and taken: now there is something to save
                self._signals.enter_context(save_first(self.stop_asked.set, jax.process_count() == 1))
            stopping = self.stop_asked.is_set() or cluster.asked_to_stop(step)
            if step % config.log.every == 0 or step == stage.last:
                self._fetch()
                self.reporter.interval(step, self.metrics.summarise())
            if step % config.checkpoint.every == 0 or step == stage.last or stopping:
                self._save(step, state)
            if config.sample.every and (step % config.sample.every == 0 or step == self.total):
                self._sample(step, ema_params(state))
            if not stopping:     # otherwise the next call does it
                self._evaluate(step, state)
            if stopping and step < self.total:
                self.checkpoints.wait()
                LOG.warning('asked to stop: saved step %s; run the same command again to resume', f'{step:,}')
                return 'preempted'
        self.checkpoints.wait()
        if jax.process_index() == 0:
            from lit_jax.training.next_steps import next_commands
            following = next_commands(self.workdir, config.to_dict())
            self._report(following)
        LOG.info('done: %s steps, this call took %s', f'{self.total:,}',
                 format_seconds(time.perf_counter() - began))
        if jax.process_index() == 0 and following:
            LOG.info('next:\n  %s', '\n  '.join(following))
        return 'done'

    def _report(self, following: list[str]) -> None:
        from lit_jax.report.html import write_run_report
        from lit_jax.sampling.labels import class_names, spread_labels
        about, labels = read_workdir(self.workdir), []
        if self.captions is None:
            labels = spread_labels(self.config.sample.count, self.config.data.num_classes)
        write_run_report(self.workdir, read_lines(self.workdir / 'metrics.jsonl'), about,
                         shown=class_names(about, labels), following=following)

    def _enter(self, stage, step: int, state: dict) -> dict:
        """The state before `step` of a stage, which begins with it or goes on."""
        if len(self.stages) > 1:
            LOG.info('%s: steps %s to %s', STAGE_NAMES[stage.name], f'{stage.first:,}', f'{stage.last:,}')
        if step == stage.first > 1:
            state = stage.begin(state['params'], self.network, self.mesh)
        self.metrics.leaf_names = list(named_leaves(state['ema']))
        macs = stage_macs(stage.name, self.network, self.teacher_network, self.config.train.batch_size)
        self.reporter.flops_per_step = 2 * macs
        return state

    def _fetch(self) -> None:
        claim.check()     # process 0 has it: before it writes into a log that belongs to another run now
        try:
            self.metrics.fetch()
        except Diverged as error:
            self.checkpoints.wait()
            kept = self.checkpoints.steps()
            where = f'the last good checkpoint is step {kept[-1]:,}' if kept else 'there is no checkpoint'
            raise Diverged(f'{error}. Stopped; {where} in {self.workdir}. Lower train.learning_rate, set '
                           f'train.clip_norm, or look at the data of that step.') from None

    def _save(self, step: int, state: dict) -> None:
        self._fetch()  # a state with a non-finite last step must not become the newest checkpoint
        self.watchdog.rest()
        began = time.perf_counter()
        meta = {'pending_metrics': self.metrics.pending, 'images_seen': step * self.config.train.batch_size}
        self.reporter.flush()     # also in a bucket, a checkpoint's metrics are written before it
        self.checkpoints.save(step, state, meta)
        self.reporter.paused(time.perf_counter() - began)

    def _sample(self, step: int, ema: dict) -> None:
        """A grid from the EMA weights, of fixed noise and evenly spread classes (or the first captions)."""
        began, count = time.perf_counter(), self.config.sample.count
        self.watchdog.rest()
        if self._draw is None:
            self._draw = self._make_draw(count)
        images = self._draw(ema, self.vae and self.vae.params)
        if jax.process_index() == 0:
            from lit_jax.report.grids import make_grid, save_png, viewable
            scale = max(1, 32 // images.shape[1])
            grid = make_grid(viewable(np.asarray(images)), columns=min(8, count), scale=scale)
            save_png(self.workdir / 'samples' / f'{step:09d}.png', grid)
            self.reporter.drawn(step, grid)
        self.reporter.paused(time.perf_counter() - began)

    def _evaluate(self, step: int, state: dict) -> None:
        """Scores samples of the EMA weights where they are due after `step`, and keeps the best weights."""
        count = self.evaluation.samples_due(step) if self.evaluation else 0
        if not count:
            return
        self.watchdog.rest()
        began, ema = time.perf_counter(), ema_params(state)
        scores = self.evaluation.scores(step, ema, count)
        seconds = time.perf_counter() - began
        self.evaluation.keep_best(step, ema, scores)
        self.reporter.scored(step, scores, seconds)
        self.reporter.paused(time.perf_counter() - began)

    def _make_draw(self, count: int):
        """draw(ema, vae_params) -> images (without a VAE latents) [count, H, W, C] on every process."""
        from lit_jax.diffusion.settings import CLASSES
        from lit_jax.sampling.labels import spread_labels
        from lit_jax.sampling.program import build_draw
        config, network = self.config, self.network
        if self.captions is None:
            cond = {'label': np.array(spread_labels(count, config.data.num_classes))}
        else:
            cond = {name: np.resize(one, (count, *one.shape[1:])) for name, one in self.captions.items()}
        rows = {'seed': np.full(count, config.seed, np.uint32), 'number': np.arange(count), 'cond': cond}
        draw = build_draw(network, CLASSES.updated(config.sample), config, vae=self.vae)
        return jax.jit(lambda ema, vae_params: draw((ema, vae_params), rows),
                       out_shardings=replicated(self.mesh), compiler_options=network.inference_options())

    def close(self) -> None:
        self.watchdog.close()
        self.profile.close()
        self.reporter.close()
        self._signals.close()
