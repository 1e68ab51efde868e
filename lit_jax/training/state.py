"""The train state: one nested dict {params, ema, opt, step}, nothing else is remembered between steps."""
import jax
import jax.numpy as jnp
import optax

from lit_jax.models.network import Network


def make_optimizer(*, learning_rate: float, warmup_steps: int = 0, weight_decay: float = 0.0,
                   clip_norm: float = 0.0) -> optax.GradientTransformation:
    """AdamW as DiT trains: betas (0.9, 0.999), eps 1e-8, constant rate; linear warm-up and clipping are options."""
    rate = learning_rate
    if warmup_steps:
        rate = optax.schedules.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def new_state(params: dict, optimizer: optax.GradientTransformation) -> dict:
    """The state before the first step: EMA starts as a copy of the parameters, the optimizer fresh."""
    return {'params': params, 'ema': jax.tree.map(jnp.copy, params), 'opt': optimizer.init(params),
            'step': jnp.zeros((), jnp.int32)}


def abstract_state(network: Network, optimizer: optax.GradientTransformation) -> dict:
    """The state as ShapeDtypeStructs."""
    return jax.eval_shape(lambda params: new_state(params, optimizer), network.abstract())


def update_ema(ema: dict, params: dict, step: jax.Array, *, decay: float, warmup: bool) -> dict:
    """ema ← d·ema + (1 − d)·params; with `warmup`, d = min(decay, (1 + step)/(10 + step)) so that short runs forget
    their start."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step)) if warmup else decay
    return jax.tree.map(lambda e, p: d * e + (1.0 - d) * p, ema, params)
