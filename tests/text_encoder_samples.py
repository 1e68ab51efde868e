"""Tiny T5 encoders: a tokenizer in both its forms, random weights under transformers' names, folders of both
kinds."""
import functools
import io
import json

import numpy as np
from safetensors.numpy import save_file

from lit_jax.checkpoint.text_encoder_folder import save_text_encoder_folder
from lit_jax.models.t5 import T5Network
from lit_jax.runtime.leaves import named_leaves, unflatten
from lit_jax.text.tokenizer import Tokenizer

VOCAB = 120
ARCH = {'vocab': VOCAB + 8, 'width': 16, 'layers': 2, 'heads': 2, 'head_dim': 6, 'ffn': 24, 'buckets': 8,
        'max_distance': 16}
HUB = {'architectures': ['T5EncoderModel'], 'model_type': 't5', 'vocab_size': VOCAB + 8, 'd_model': 16,
       'num_layers': 2,
       'num_heads': 2, 'd_kv': 6, 'd_ff': 24, 'relative_attention_num_buckets': 8,
       'relative_attention_max_distance': 16, 'feed_forward_proj': 'gated-gelu', 'layer_norm_epsilon': 1e-6,
       'tie_word_embeddings': False}
TEXT = [f'{count} {colour} {shape} {place} the {other} one, on a plain background.'
        for count in ('a', 'two', 'three', 'four')
        for colour in ('red', 'green', 'blue', 'yellow') for shape in ('circle', 'squares', 'triangle')
        for place, other in (('left of', 'small'), ('above', 'large'), ('below', 'grey'))]


@functools.cache
def sentencepiece_model() -> bytes:
    """A unigram model of TEXT with the special ids of T5."""
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=VOCAB, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, pad_piece='<pad>', minloglevel=2, num_threads=1, hard_vocab_limit=False)
    return model.getvalue()


@functools.cache
def tokenizer_json() -> bytes:
    """The same tokenizer in the form of the tokenizers library."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sentencepiece_model())
    library = Library(models.Unigram([(piece.piece, piece.score) for piece in model.pieces], unk_id=2,
                                     byte_fallback=False))
    library.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement='▁', prepend_scheme='always')])
    library.post_processor = processors.TemplateProcessing(single=['$A', '</s>'],
                                                           special_tokens=[('</s>', 1)])
    library.add_special_tokens([AddedToken(name, normalized=False) for name in ('<pad>', '</s>', '<unk>')])
    # As some published files have it; the tokenizer must not take its lengths from there.
    library.enable_truncation(5)
    library.enable_padding(length=7, pad_id=0, pad_token='<pad>')
    return library.to_str().encode()


def tokenizer(file='tokenizer.json') -> Tokenizer:
    return Tokenizer(file, tokenizer_json() if file == 'tokenizer.json' else sentencepiece_model())


def random_state(seed=0, hub=HUB) -> dict[str, np.ndarray]:
    """The state dict of a T5EncoderModel (facts of the published files), of the order that keeps activations
    in range."""
    width, inner, ffn = hub['d_model'], hub['num_heads'] * hub['d_kv'], hub['d_ff']
    shapes = {'shared.weight': (hub['vocab_size'], width), 'encoder.final_layer_norm.weight': (width,),
              'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight':
              (hub['relative_attention_num_buckets'],
               hub['num_heads'])}
    for i in range(hub['num_layers']):
        attention, mlp = f'encoder.block.{i}.layer.0.', f'encoder.block.{i}.layer.1.'
        shapes |= {f'{attention}SelfAttention.{part}.weight': (inner, width) for part in 'qkv'}
        shapes |= {f'{attention}SelfAttention.o.weight': (width, inner),
                   f'{attention}layer_norm.weight': (width,),
                   f'{mlp}DenseReluDense.wi_0.weight': (ffn, width),
                   f'{mlp}DenseReluDense.wi_1.weight': (ffn, width),
                   f'{mlp}DenseReluDense.wo.weight': (width, ffn), f'{mlp}layer_norm.weight': (width,)}
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if 'norm' in name:
            return rng.normal(1, 0.2, shape)
        return rng.normal(0, 1 if 'shared' in name or 'bias' in name else 0.7 * shape[1] ** -0.5, shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}


def write_hub_folder(folder, state=None, config=HUB, file='model.safetensors', tokenizer='tokenizer.json'):
    """A transformers folder; returns its path. file, tokenizer: None leaves them out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    if file:
        save_file(random_state() if state is None else state, folder / file, metadata={'format': 'pt'})
    if tokenizer:
        (folder / tokenizer).write_bytes(tokenizer_json() if tokenizer == 'tokenizer.json'
                                         else sentencepiece_model())
    return folder


def random_params(arch=ARCH, seed=0) -> dict:
    """A float32 parameter tree of `arch` from numpy, of the order that keeps activations in range."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        if 'kernel' not in name:
            return rng.normal('gain' in name, 0.2 if 'gain' in name else 1, leaf.shape).astype(np.float32)
        inputs = np.prod(leaf.shape[1:3]) if 'proj' in name else leaf.shape[1]
        return rng.normal(0, 0.7 * inputs ** -0.5, leaf.shape).astype(np.float32)

    return unflatten({name: draw(name, leaf)
                      for name, leaf in named_leaves(T5Network(arch).abstract()).items()})


def write_text_encoder(folder, arch=ARCH, params=None, **config):
    """A text encoder folder with random weights; returns its path."""
    save_text_encoder_folder(folder, {'text_encoder': arch, 'id': 'tiny-t5', **config},
                             random_params(arch) if params is None else params, tokenizer())
    return folder


def same_trees(a, b) -> bool:
    a, b = named_leaves(a), named_leaves(b)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name])
                                        for name in a)
