"""One training step: noise, teacher and student on the same inputs, losses, update, EMA. One jitted function.

LiT §3.4: L = L_simple + λ1·mse(noise) + λ2·mse(variance), where L_simple is DiT's own objective (mse + vb).
Of a flow: its own loss + λ1·mse(velocity), or whatever it predicts (`lit_jax.diffusion.kinds`).
"""
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from lit_jax.diffusion.alignment import block_losses, projection_loss
from lit_jax.diffusion.distillation import total_loss
from lit_jax.diffusion.flow_paths import PREDICTIONS
from lit_jax.diffusion.kinds import Diffusion
from lit_jax.diffusion.own_terms import Seen, Term
from lit_jax.models.layers import BLOCK_OUTPUT
from lit_jax.models.low_rank import merge_updates
from lit_jax.models.network import Network
from lit_jax.models.t5 import T5Network
from lit_jax.models.vae import VaeNetwork, sample_posterior
from lit_jax.runtime.leaves import named_leaves, overlaid, pick
from lit_jax.training.frozen_features import Features
from lit_jax.training.state import update_ema

Array = jax.Array
POSTERIOR = 3      # folded into a step's key for the posterior's noise; splits give t, noise and label drop


@dataclass(frozen=True)
class Objective:
    """What a step minimises, and its hyperparameters."""
    diffusion: Diffusion
    scale: float = 1.0                # x0 = scale · batch['image']
    label_dropout: float = 0.1
    lambda_noise: float = 0.5         # λ1, of the teacher's noise, or velocity
    lambda_variance: float = 0.05     # λ2, of the teacher's variance
    lambda_blocks: float = 0.0        # of what each of the teacher's blocks returns
    losses: tuple[Term, ...] = ()     # of the recipe's own
    features: Features | None = None  # of another network, which the tokens learn (REPA)
    balance_weight: float = 0.01      # of the losses of mixers, averaged over the layers (MoH)
    ema_decay: float = 0.9999         # see `update_ema`
    ema_warmup: bool = False
    accumulate: int = 1               # micro-batches per step

    @property
    def weights(self) -> dict[str, float]:
        """Of each term in the total."""
        return {'mse': 1.0, 'vb': 1.0, 'cosine': 1.0,
                **{f'distill_{name}': self.lambda_noise for name in PREDICTIONS},
                'distill_variance': self.lambda_variance, 'distill_blocks': self.lambda_blocks,
                **({'features': self.features.weight} if self.features else {}),
                **{term.name: term.weight for term in self.losses}}


def clean_inputs(batch: Mapping[str, Array], key: Array, objective: Objective,
                 encode: Callable | None = None) -> Array:
    """x0 [B, H, W, C] of a batch, scaled.
    Sampled anew in each step from the VAE's posterior, mean + exp(logvar / 2)·noise, whose moments are cached
    [B, H, W, 2C] or come from `encode`; without either, the pixels."""
    if 'moments' in batch:
        mean, logvar = jnp.split(batch['moments'], 2, axis=-1)
    elif encode is not None:
        mean, logvar = encode(batch['image'])
    else:
        return objective.scale * batch['image']
    return objective.scale * sample_posterior(mean, logvar, jax.random.fold_in(key, POSTERIOR))


def draw_inputs(batch: Mapping[str, Array], key: Array, objective: Objective, network: Network,
                encode: Callable | None = None, encode_text: Callable | None = None,
                null_text: Array | None = None) -> dict:
    """x0, x_t, t, noise and the condition, partly dropped: a function of (batch, key) on any device count.
    encode: images -> (mean, logvar). encode_text: (tokens, mask) -> features, if the batch holds captions as
    tokens. null_text: [L, C], the features in place of dropped captions."""
    t_key, noise_key, drop_key = jax.random.split(key, 3)
    x0 = clean_inputs(batch, key, objective, encode)
    size = x0.shape[:1]
    t = objective.diffusion.draw_times(t_key, size)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    dropped = jax.random.bernoulli(drop_key, objective.label_dropout, size)
    return {'x0': x0, 'x_t': objective.diffusion.add_noise(x0, t, noise), 't': t, 'noise': noise,
            'cond': _condition(batch, dropped, network, encode_text, null_text)}


def _condition(batch: Mapping[str, Array], dropped: Array, network: Network,
               encode_text: Callable | None, null_text: Array | None) -> dict[str, Array]:
    """The model's `cond`: labels, or features of captions; a dropped caption keeps its mask (PixArt)."""
    if network.conditioning == 'label':
        return {'label': jnp.where(dropped, network.null_label, batch['label'])}
    mask = batch['text_mask']
    text = batch['text'] if 'text' in batch else jax.lax.stop_gradient(encode_text(batch['tokens'], mask))
    text = jnp.where(dropped[:, None, None], null_text.astype(text.dtype), text)
    return {'text': text, 'text_mask': mask}


def loss_terms(params: dict, teacher_params: dict | None, inputs: Mapping[str, Array], network: Network,
               teacher: Network | None, objective: Objective) -> tuple[dict[str, Array], dict[str, Array]]:
    """({term of the loss: float32 [B]}, {name in `network.losses` or `network.statistics`: mean of layers}).
    The teacher sees the same x_t, t and condition."""
    x_t, t, cond = inputs['x_t'], inputs['t'], inputs['cond']
    of_blocks = (BLOCK_OUTPUT,) if objective.features or (teacher and objective.lambda_blocks) else ()
    output, seen = network.observe(params, x_t, t, cond, network.losses + network.statistics + of_blocks)
    blocks = jnp.concatenate(seen.pop(BLOCK_OUTPUT)) if of_blocks else None
    diffusion, clean, noise = objective.diffusion, inputs['x0'], inputs['noise']
    terms = diffusion.losses(output, clean, x_t, t, noise)
    taught = None
    if teacher is not None:
        watched = (BLOCK_OUTPUT,) if objective.lambda_blocks else ()
        with jax.named_scope('teacher'):
            taught, shown = jax.lax.stop_gradient(teacher.observe(teacher_params, x_t, t, cond, watched))
        terms |= diffusion.distillation(output, taught, x_t.shape[-1])
        if watched:
            terms['distill_blocks'] = block_losses(blocks, jnp.concatenate(shown[BLOCK_OUTPUT]))
    if objective.features:
        tokens = blocks[objective.features.block - 1]
        terms['features'] = projection_loss(network.project(params, tokens), inputs['features'])
    if objective.losses:
        what = Seen(diffusion, clean, x_t, t, noise, cond, output, taught)
        terms |= {term.name: term(what) for term in objective.losses}
    return terms, {name: jnp.concatenate(values).mean() for name, values in seen.items() if values}


def make_train_step(network: Network, optimizer: optax.GradientTransformation, objective: Objective,
                    teacher: Network | None = None, vae: VaeNetwork | None = None,
                    text_encoder: T5Network | None = None) -> Callable:
    """train_step(state, frozen, batch, key) -> (state, metrics), to be jitted with `state` donated.

    key: of the run; the step folds state['step'] into it, so no random state is kept.
    frozen: the weights {'teacher', 'vae', 'text_encoder', 'features'} that there are, and for text models
        'null_text' [L, C], the features of the empty caption.
    batch: {'moments' or 'image', and 'label', or 'text' (features) or 'tokens' with 'text_mask'}; `vae`
        encodes images and `text_encoder` tokens in the step.
    metrics: means 'loss/<term>'; 'quarter/<term>' = (sums [4], counts [4]) over the quarters of the timestep
        range; of mixers, losses as 'loss/<name>' and statistics under their own names; and those of
        `gradient_metrics`."""

    def loss(trained, params, teacher_params, inputs):
        params = merge_updates(overlaid(params, trained))
        terms, shown = loss_terms(params, teacher_params, inputs, network, teacher, objective)
        means = {name: value.mean() for name, value in terms.items()}
        total = total_loss(means, objective.weights)
        for name in network.losses:
            if name in shown:      # some models have no routing layer
                means[name] = shown.pop(name)
                total += objective.balance_weight * means[name]
        metrics = {f'loss/{name}': mean for name, mean in means.items()} | {'loss/total': total}
        metrics |= {f'quarter/{name}': objective.diffusion.quarters(value, inputs['t'])
                    for name, value in terms.items()}
        return total, metrics | shown

    gradient = accumulated(jax.grad(loss, has_aux=True), objective.accumulate)

    def train_step(state, frozen, batch, key):
        inputs = step_inputs(state, frozen, batch, key, objective, network, vae, text_encoder)
        trained = pick(state['params'], named_leaves(state['ema']))
        grads, metrics = gradient(trained, state['params'], frozen.get('teacher'), inputs)
        return updated(state, trained, grads, optimizer, objective), metrics | gradient_metrics(grads)

    return train_step


def accumulated(gradient: Callable, parts: int) -> Callable:
    """gradient(*weights, inputs) -> (grads, metrics) as means over `parts` micro-batches of the inputs, one
    after the other; metrics 'quarter/...' as sums."""
    if parts == 1:
        return gradient

    def over_parts(*weights_and_inputs):
        *weights, inputs = weights_and_inputs
        # Example i goes to micro-batch i mod parts: each device keeps its own examples.
        split = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1),
                             inputs)
        first = jax.tree.map(lambda x: x[0], split)
        sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                            jax.eval_shape(gradient, *weights, first))

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradient(*weights, part)), None

        grads, metrics = jax.lax.scan(add, sums, split)[0]
        mean = {name: value if name.startswith('quarter/') else value / parts
                for name, value in metrics.items()}
        return jax.tree.map(lambda g: g / parts, grads), mean

    return over_parts


def step_inputs(state: Mapping, frozen: Mapping, batch: Mapping, key: Array, objective: Objective,
                network: Network, vae: VaeNetwork | None, text_encoder: T5Network | None) -> dict:
    """`draw_inputs` of a step, with the frozen encoders that there are."""
    encode = None if vae is None else functools.partial(vae.encode, frozen['vae'])
    encode_text = None if text_encoder is None else functools.partial(text_encoder.apply,
                                                                      frozen['text_encoder'])
    inputs = draw_inputs(batch, jax.random.fold_in(key, state['step']), objective, network, encode,
                         encode_text, frozen.get('null_text'))
    if objective.features:
        images = batch['image'] if 'image' in batch else inputs['x0']
        inputs['features'] = objective.features(frozen['features'], images.astype(jnp.float32))
    return inputs


@jax.named_scope('optimizer')
def updated(state: dict, trained: dict, grads: dict, optimizer: optax.GradientTransformation,
            objective: Objective) -> dict:
    """The state after a step that found these gradients of its trained parameters."""
    updates, opt = optimizer.update(grads, state['opt'], trained)
    trained = optax.apply_updates(trained, updates)
    ema = update_ema(state['ema'], trained, state['step'], decay=objective.ema_decay,
                     warmup=objective.ema_warmup)
    return {'params': overlaid(state['params'], trained), 'ema': ema, 'opt': opt, 'step': state['step'] + 1}


def gradient_metrics(grads: dict) -> dict[str, Array]:
    """'grad/norm', and 'grad/bad_leaf': index of the first leaf with a non-finite gradient, -1 if none."""
    squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)])
    bad = ~jnp.isfinite(squares)
    return {'grad/norm': jnp.sqrt(squares.sum()),
            'grad/bad_leaf': jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)}
