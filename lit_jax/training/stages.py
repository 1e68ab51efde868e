"""The stages of a run: alignment of the mixers, if the recipe asks for it, then training.

Steps are numbered through all stages; a checkpoint holds the state of the stage that its step belongs to, and
the next stage begins with the parameters alone. So a run resumes exactly on both sides of the border."""
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lit_jax.models.dit import stage_mixers
from lit_jax.models.low_rank import factor_names, with_updates
from lit_jax.models.mixers import whole_mixer
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves, placed
from lit_jax.training.mesh import state_shardings
from lit_jax.training.state import (
    OPTIMIZERS,
    abstract_state,
    make_optimizer,
    new_state,
    trainable_leaves,
    updated_kernels,
)


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `last` with one loss, one optimizer and one set of trained parameters.

    Attributes:
        name: 'align' or 'train'. trained: names of the leaves that are trained; None: all.
        extend: adds to the network's parameters what is trained beside them (low-rank updates)."""
    name: str
    first: int
    last: int
    optimizer: optax.GradientTransformation
    trained: tuple[str, ...] | None = None
    extend: Callable[[dict], dict] = dict

    def abstract(self, network: Network, mesh) -> dict:
        """Its state as ShapeDtypeStructs with shardings, to restore a checkpoint into."""
        state = abstract_state(network, self.optimizer, self.trained, self.extend)
        return placed(state, state_shardings(state, mesh, network.arch))

    def begin(self, params: dict, network: Network, mesh) -> dict:
        """Its first state, from these parameters."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract(network, mesh))

        def make(params):
            return new_state(self.extend(params), self.optimizer, self.trained) | {
                'step': jnp.int32(self.first - 1)}

        return jax.jit(make, out_shardings=shardings)(params)


def plan_stages(config: ConfigDict, network: Network,
                teacher_arch: Mapping | None = None) -> tuple[Stage, ...]:
    """The stages of a finalized recipe, without their steps. teacher_arch: of the recipe's teacher."""
    border, train = config.align.steps, config.train
    names = 'learning_rate', 'warmup_steps', 'cooldown_steps', 'steps', 'weight_decay', 'clip_norm', 'beta2'
    optimizer = make_optimizer(name=train.optimizer, **{name: train[name] for name in names},
                               arch=network.arch)
    trained = None if train.trainable == 'all' else trainable_leaves(train.trainable, network.abstract())
    training = Stage('train', border + 1, border + train.steps, optimizer, trained)
    if config.teacher.lambda_blocks and teacher_arch is not None:
        from lit_jax.training.align import check_alignable
        check_alignable(teacher_arch, network.arch, config.teacher.path, 'teacher.lambda_blocks')
    if train.lora_rank:
        training = _with_low_rank(training, config, network)
    if not border:
        return (training,)
    if teacher_arch is None:
        raise UserError(f'align.steps {border} needs a teacher: give --config.teacher.path=MODEL, or set '
                        'align.steps=0')
    from lit_jax.training.align import check_alignable
    check_alignable(teacher_arch, network.arch, config.teacher.path)
    mixers = new_mixers(network, teacher_arch)
    return (Stage('align', 1, border, align_optimizer(config, network.arch), mixers), training)


def _with_low_rank(stage: Stage, config: ConfigDict, network: Network) -> Stage:
    """The stage with low-rank updates of the projections that it leaves frozen."""
    train = config.train
    kernels = updated_kernels(train.trainable, stage.trained, network.abstract(), network.arch,
                              train.lora_rank)
    extend = functools.partial(with_updates, kernels=kernels, rank=train.lora_rank, seed=config.seed)
    return replace(stage, trained=(*stage.trained, *factor_names(kernels)), extend=extend)


def align_optimizer(config: ConfigDict, arch: Mapping | None = None) -> optax.GradientTransformation:
    """`align.optimizer` with a rate that falls to 0 by a cosine, and clipping. arch: of the model."""
    align = config.align
    rate = optax.schedules.cosine_decay_schedule(align.learning_rate, align.steps)
    clip = [optax.clip_by_global_norm(align.clip_norm)] if align.clip_norm else []
    return optax.chain(*clip, OPTIMIZERS[align.optimizer](arch, 0.999), optax.scale_by_learning_rate(rate))


def new_mixers(network: Network, teacher_arch: Mapping) -> tuple[str, ...]:
    """Leaves of the mixers that differ from the teacher's in their block. UserError where there is none."""
    teacher = [mixer for depth, mixer in _runs(teacher_arch) for _ in range(depth)]
    runs, chosen, first = _runs(network.arch), [], 0
    for i, (depth, mixer) in enumerate(runs):
        if any(other != mixer for other in teacher[first:first + depth]):
            chosen.append(f'blocks{i if len(runs) > 1 else ""}/attn/')
        first += depth
    if not chosen:
        raise UserError("align.steps: all mixers are the teacher's, there is nothing to align; give "
                        '--config.model.mixer.name=linear, or set align.steps=0')
    return tuple(name for name in named_leaves(network.abstract()) if name.startswith(tuple(chosen)))


def _runs(arch: Mapping) -> list[tuple[int, dict]]:
    """[(blocks, mixer with all its options)] of each run of equal blocks."""
    return [(depth, whole_mixer(mixer))
            for depth, mixer in stage_mixers(arch['depth'], arch['mixer'], arch.get('stages', ()))]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that makes step `step` (1 is the first)."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])
