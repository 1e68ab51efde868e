"""Trains the tiny text encoder of the rendered shapes: a T5 that fills in hidden words of captions.

    python -m examples.shapes.encoder --out models/shapes_t5        # a minute on two cores

A quarter of the words of a caption is replaced by <unk>; the features at their positions, times the token
embedding, must predict the words. So features describe the context of a word, such as the colour of a square.
"""
import logging
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from lit_jax.checkpoint.text_encoder_folder import save_text_encoder_folder
from lit_jax.data.toys.shapes_words import all_captions, make_tokenizer
from lit_jax.models.t5 import T5Network
from lit_jax.runtime import cli
from lit_jax.runtime.options import option, parse_options
from lit_jax.text.tokenizer import UNKNOWN, Tokenizer

LOG = logging.getLogger('lit_jax')
ID = 'lit_jax/shapes_t5'
TOKENS = 12                  # the longest caption has 8 words and the end token
SIZES = {'width': 64, 'layers': 2, 'heads': 4, 'head_dim': 16, 'ffn': 128}
STEPS, BATCH, RATE, HIDDEN = 1_500, 128, 2e-3, 0.25


def train_encoder(out: Path, steps: int = STEPS, seed: int = 0) -> float:
    """Trains the encoder and writes its folder; returns the last loss, in nats per hidden word."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = out.with_name(f'.{out.name}.words')
    words.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(Path(make_tokenizer(words)).parent)
    tokens = tokenizer.encode(all_captions(), TOKENS)
    network = T5Network({'vocab': tokenizer.size, **SIZES})
    params = network.init(jax.random.key(seed))
    optimizer = optax.adam(RATE)
    state = optimizer.init(params)
    step = _make_step(network, optimizer, jnp.asarray(tokens.ids), jnp.asarray(tokens.mask))
    for number in range(1, steps + 1):
        params, state, loss = step(params, state, jax.random.fold_in(jax.random.key(seed + 1), number))
        if number % 100 == 0 or number == steps:
            LOG.info('text encoder: step %s of %s, %.3f nats per hidden word', f'{number:,}', f'{steps:,}',
                     float(loss))
    config = {'text_encoder': network.arch, 'id': ID,
              'provenance': {'source': 'trained on captions of shapes'}}
    save_text_encoder_folder(out, config, params, tokenizer, overwrite=True)
    for file in words.iterdir():
        file.unlink()
    words.rmdir()
    return float(loss)


def _make_step(network: T5Network, optimizer: optax.GradientTransformation, ids_NL: jax.Array,
               mask_NL: jax.Array):
    """step(params, state, key) -> (params, state, loss) on a random batch of captions."""
    def loss(params, ids, mask, hidden):
        features = network.apply(params, jnp.where(hidden, UNKNOWN, ids), mask)
        logits = features @ params['embed']['table'].T / network.width ** 0.5
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return (nats * hidden).sum() / jnp.maximum(hidden.sum(), 1)

    @jax.jit
    def step(params, state, key):
        rows_key, hide_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH,), 0, len(ids_NL))
        ids, mask = ids_NL[rows], mask_NL[rows]
        hidden = (jax.random.uniform(hide_key, ids.shape) < HIDDEN) & (ids > UNKNOWN)    # no end, no padding
        value, gradient = jax.value_and_grad(loss)(params, ids, mask, hidden)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    return step


@dataclass(frozen=True)
class EncoderOptions:
    out: Path = option('text encoder folder to write')
    steps: int = option('training steps', default=STEPS)


def main() -> None:
    options = parse_options(EncoderOptions, prog='python -m examples.shapes.encoder', description=__doc__)
    train_encoder(options.out, options.steps)


if __name__ == '__main__':
    cli.run(main)
