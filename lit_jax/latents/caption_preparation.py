"""The parts of `prepare` that only images with captions need."""

import numpy as np

from lit_jax.checkpoint.text_encoder_folder import load_text_encoder
from lit_jax.data import buckets, caption_latents, crop, latent_shards, text_features
from lit_jax.data.images import ImageSource
from lit_jax.data.latents import FORMAT, METADATA
from lit_jax.data.sources import CAPTIONED, Source, has_captions
from lit_jax.latents.encoding import CaptionEncoder
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import read_json, unsealed
from lit_jax.text.tokenizer import Tokenizer

_SAMPLED = 256  # examples from whose captions the size of a record is estimated
_TEXT_DTYPES = ('bfloat16', 'float32', 'int8')
_TEXT_BATCH = 8  # captions per device


def check_text_request(request) -> None:
    """Raises UserError if the flags for captions do not fit the data set."""
    if not has_captions(request.data):
        if request.text_encoder or request.buckets:
            raise UserError(f'--data={request.data} has labels, but --text_encoder and --buckets are for '
                            f'images with captions: --data={", ".join(CAPTIONED)}')
        return
    if not request.text_encoder:
        raise UserError(f'--data={request.data} has captions: give a text encoder, --text_encoder=FOLDER '
                        f'(made by python convert_torch_ckpt.py PIPELINE/text_encoder --out FOLDER)')
    if request.text_dtype not in _TEXT_DTYPES:
        raise UserError(f'unknown --text_dtype={request.text_dtype}; known: {", ".join(_TEXT_DTYPES)}')
    if request.classes or request.num_classes:
        raise UserError(f'--data={request.data} has captions, no classes: leave --classes and --num_classes '
                        'out')


def make_caption_plan(request, images_plan: dict, text_config: dict, source: Source) -> dict:
    """The plan of a data set with captions, JSON-able: everything that the meaning of its records depends on.

    request: `PrepareOptions`. images_plan: VAE and sizes. text_config: of the text encoder folder."""
    size, images = source.spec.image_size, isinstance(source, ImageSource)
    shapes, counts = source.buckets or ((size, size),), [len(source)]
    if source.bucket_of is not None:
        counts = np.bincount(source.bucket_of, minlength=len(shapes)).tolist()
    identity = source.content() if images else {'name': request.data, 'count': len(source)}
    text = {'encoder': text_config['id'], 'sha256': text_config['provenance']['sha256'],
            'tokens': request.caption_tokens, 'width': text_config['text_encoder']['width'],
            'dtype': text_features.DTYPE, 'weights': text_config['weights'],
            'computed_in': request.text_dtype}
    rule = (buckets.RULE if source.buckets else crop.RULE) if images else 'none'
    return {'format': FORMAT, 'kind': caption_latents.KIND, **images_plan, 'text': text,
            'crop': rule, 'buckets': [list(shape) for shape in shapes], 'bucket_counts': counts,
            'classes': [], 'source': {**identity, 'split': request.split}, 'dtype': request.dtype,
            'shard_size': request.shard_size or latent_shards.default_shard_size(len(source))}


def caption_record_size(plan: dict, source: Source, tokenizer: Tokenizer) -> float:
    """The mean bytes of a record, estimated from the captions of some evenly spaced examples."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int))
    captions = [caption for index in indices for caption in source.captions(int(index))]
    tokens = int(tokenizer.encode(captions, plan['text']['tokens']).mask.sum()) / len(indices)
    sizes = [caption_latents.record_bytes(plan, bucket, tokens) for bucket in range(len(plan['buckets']))]
    return float(np.average(sizes, weights=plan['bucket_counts']))


def caption_encoder(request) -> CaptionEncoder:
    """Loads the text encoder of a request."""
    encoder = load_text_encoder(request.text_encoder, request.text_dtype)
    return CaptionEncoder(encoder, request.caption_tokens, _TEXT_BATCH)


def needs_null(out, plan: dict) -> bool:
    """Whether the features of the empty caption are missing or invalid; metadata.json is then deleted."""
    if 'text' not in plan:
        return False
    try:
        shape = {'text': {'tokens': int, 'width': int, 'null?': {'sha256': str}}}
        text = unsealed(read_json(out / METADATA, shape), out / METADATA)['text']
    except UserError:
        text = plan['text']
    try:
        text_features.read_null(out, text)
    except UserError:
        (out / METADATA).unlink(missing_ok=True)
        return True
    return False


def make_null(out, encode: CaptionEncoder) -> None:
    """Writes the features of the empty caption."""
    parts, mask, _ = encode([''])
    text_features.write_null(out, np.asarray(parts[0])[0], mask[0])


def text_facts(notes: list[dict], null: bytes) -> dict:
    """The statistics of the captions in metadata.json. null: the file of the empty caption's features."""
    tokens = np.array([pair for note in notes for pair in note['tokens']], np.int64).reshape(-1, 2)
    return {'captions': int((tokens > 0).sum()), 'truncated': sum(sum(note['cut']) for note in notes),
            'mean_tokens': float(tokens.sum() / max(1, (tokens > 0).sum())),
            'null': {'file': text_features.NULL, 'sha256': text_features.null_digest(null)}}
