"""The train state, one nested dict {params, ema, opt, step}; optimizers and learning rate schedules.

What is not trained has no entry in `ema` and `opt`: the leaves of `ema` say what is."""
import fnmatch
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from lit_jax.models.low_rank import merge_stored
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError, check_known, listed, shown
from lit_jax.runtime.leaves import named_leaves, overlaid, pick
from lit_jax.training.came import scale_by_came
from lit_jax.training.matrices import matrix_axes
from lit_jax.training.muon import is_for_muon, scale_by_muon_and_adam


def scale_by_adamw(beta2: float = 0.999) -> optax.GradientTransformation:
    """Adam as DiT trains: betas (0.9, 0.999), eps 1e-8."""
    return optax.scale_by_adam(b1=0.9, b2=beta2, eps=1e-8)


SHORT_FORMS = {'all': '*', 'mixers': 'blocks*/attn/*'}     # of train.trainable
OPTIMIZERS = {'adamw': lambda arch, beta2: scale_by_adamw(beta2),
              'came': lambda arch, _: scale_by_came(arch=arch),
              'muon': lambda arch, beta2: scale_by_muon_and_adam(scale_by_adamw(beta2), arch)}


def make_optimizer(*, name: str = 'adamw', learning_rate: float, warmup_steps: int = 0,
                   cooldown_steps: int = 0, steps: int = 0, weight_decay: float = 0.0,
                   clip_norm: float = 0.0, beta2: float = 0.999,
                   arch: Mapping | None = None) -> optax.GradientTransformation:
    """An optimizer with the rate of `learning_rate_schedule`, clipping of the gradient's global norm and
    decoupled weight decay (times the rate).

    name: 'adamw', as in DiT; 'came', as in PixArt-Σ (rate 2e-5, 1,000 steps of warm-up, clip_norm 0.01, no
    decay); or 'muon'. Raises UserError for others. beta2: of Adam, not of 'came'. arch: of the model; 'came'
    and 'muon' need its mixers."""
    check_known('optimizer', name, OPTIMIZERS)
    rate = learning_rate_schedule(learning_rate, warmup_steps, cooldown_steps, steps)
    update = optax.chain(OPTIMIZERS[name](arch, beta2), optax.add_decayed_weights(weight_decay),
                         optax.scale_by_learning_rate(rate))
    return optax.chain(optax.clip_by_global_norm(clip_norm), update) if clip_norm else update


def learning_rate_schedule(learning_rate: float, warmup_steps: int = 0, cooldown_steps: int = 0,
                           steps: int = 0) -> float | optax.Schedule:
    """The rate of each update: linearly up over `warmup_steps` and down over the last `cooldown_steps` of
    `steps`, with 1/n of it at the outer ends; constant between. A number if it never changes."""
    rate = learning_rate
    if warmup_steps:
        rate = optax.schedules.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    if not cooldown_steps:
        return rate
    down = optax.schedules.linear_schedule(learning_rate, learning_rate / cooldown_steps, cooldown_steps - 1)
    up = rate if warmup_steps else optax.schedules.constant_schedule(rate)
    return optax.schedules.join_schedules([up, down], [steps - cooldown_steps])


def trainable_leaves(trainable: str, params: Mapping) -> tuple[str, ...]:
    """Names of the leaves that are trained.

    trainable: 'all', 'mixers' (the attention of every block), or patterns with commas between them
        ('blocks*/attn/*,final_layer/*'). Raises UserError for a pattern that no leaf has."""
    names = tuple(named_leaves(params))
    if not trainable.strip(' ,'):
        raise UserError('train.trainable is empty, which freezes everything: give all, mixers, or patterns '
                        'such as blocks*/attn/*,final_layer/*')
    chosen: set[str] = set()
    for pattern in (one.strip() for one in SHORT_FORMS.get(trainable, trainable).split(',')):
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(f'train.trainable {shown(trainable)}: no parameter is named {shown(pattern)}; '
                            f'there are: '
                            f'{listed(list(names), 20)}')
        chosen.update(found)
    return tuple(name for name in names if name in chosen)


def updated_kernels(trainable: str, trained: Sequence[str], params: Mapping, arch: Mapping,
                    rank: int) -> dict[str, tuple[int, int]]:
    """{name: (axes that count matrices, axes of inputs)} of the kernels with low-rank updates: the frozen
    projections of the blocks. UserError where there is none."""
    frozen = {name: leaf for name, leaf in named_leaves(params).items() if name not in set(trained)}
    axes = {name: matrix_axes(name, len(leaf.shape), arch) for name, leaf in frozen.items()
            if is_for_muon(name, len(leaf.shape), arch)}
    if not axes:
        raise UserError(f'train.lora_rank {rank}: train.trainable {shown(trainable)} leaves no projection of '
                        f'the blocks frozen, so there is nothing to update; set train.lora_rank=0, or train '
                        f'less: --config.train.trainable=mixers')
    return {name: (len(own.layers), len(own.rows)) for name, own in axes.items()}


def new_state(params: dict, optimizer: optax.GradientTransformation,
              trained: Sequence[str] | None = None) -> dict:
    """The state before the first step: all parameters, and of the trained ones (None: all) the EMA, which
    starts as a copy, and the optimizer's memory."""
    own = params if trained is None else pick(params, trained)
    return {'params': params, 'ema': jax.tree.map(jnp.copy, own), 'opt': optimizer.init(own),
            'step': jnp.zeros((), jnp.int32)}


def abstract_state(network: Network, optimizer: optax.GradientTransformation,
                   trained: Sequence[str] | None = None, extend: Callable[[dict], dict] = dict) -> dict:
    """The state as ShapeDtypeStructs. extend: adds parameters to those of the network."""
    return jax.eval_shape(lambda params: new_state(extend(params), optimizer, trained), network.abstract())


def ema_params(state: Mapping) -> dict:
    """The EMA weights of a state, with the parameters that are not trained; low-rank updates are merged."""
    return merge_stored(overlaid(state['params'], state['ema']))


def update_ema(ema: dict, params: dict, step: jax.Array, *, decay: float, warmup: bool) -> dict:
    """ema ← d·ema + (1 − d)·params; `warmup`: d = min(decay, (1 + step)/(10 + step)), for short runs."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay
    return jax.tree.map(lambda e, p: d * e + (1.0 - d) * p, ema, params)
