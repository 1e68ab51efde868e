"""The train state, one nested dict {params, ema, opt, step}; optimizers and learning rate schedules."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from lit_jax.models.network import Network
from lit_jax.runtime.errors import check_known
from lit_jax.training.came import scale_by_came
from lit_jax.training.muon import scale_by_muon_and_adam


def scale_by_adamw() -> optax.GradientTransformation:
    """Adam as DiT trains: betas (0.9, 0.999), eps 1e-8."""
    return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


OPTIMIZERS = {'adamw': lambda arch: scale_by_adamw(), 'came': lambda arch: scale_by_came(arch=arch),
              'muon': lambda arch: scale_by_muon_and_adam(scale_by_adamw(), arch)}


def make_optimizer(*, name: str = 'adamw', learning_rate: float, warmup_steps: int = 0,
                   cooldown_steps: int = 0, steps: int = 0, weight_decay: float = 0.0,
                   clip_norm: float = 0.0, arch: Mapping | None = None) -> optax.GradientTransformation:
    """An optimizer with the rate of `learning_rate_schedule`, clipping of the gradient's global norm and
    decoupled weight decay (times the rate).

    name: 'adamw', as in DiT; 'came', as in PixArt-Σ (rate 2e-5, 1,000 steps of warm-up, clip_norm 0.01, no
    decay); or 'muon'. Raises UserError for others. arch: of the model; 'came' and 'muon' need its mixers."""
    check_known('optimizer', name, OPTIMIZERS)
    rate = learning_rate_schedule(learning_rate, warmup_steps, cooldown_steps, steps)
    update = optax.chain(OPTIMIZERS[name](arch), optax.add_decayed_weights(weight_decay),
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


def new_state(params: dict, optimizer: optax.GradientTransformation) -> dict:
    """The state before the first step; the EMA starts as a copy of the parameters."""
    return {'params': params, 'ema': jax.tree.map(jnp.copy, params), 'opt': optimizer.init(params),
            'step': jnp.zeros((), jnp.int32)}


def abstract_state(network: Network, optimizer: optax.GradientTransformation) -> dict:
    """The state as ShapeDtypeStructs."""
    return jax.eval_shape(lambda params: new_state(params, optimizer), network.abstract())


def update_ema(ema: dict, params: dict, step: jax.Array, *, decay: float, warmup: bool) -> dict:
    """ema ← d·ema + (1 − d)·params; `warmup`: d = min(decay, (1 + step)/(10 + step)), for short runs."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay
    return jax.tree.map(lambda e, p: d * e + (1.0 - d) * p, ema, params)
