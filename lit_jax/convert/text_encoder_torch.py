"""Converts T5 encoders of Hugging Face transformers (config.json, weights, tokenizer) to text encoder
folders, and back.

Of a T5 with a decoder only the encoder is used. Weights are read one tensor at a time and stored in the
requested dtype, so that a T5-XXL is never held in float32: memory is that of the result and one tensor. No
code in a file is run (`lit_jax.convert.torch_files`), and one error lists all tensors that are missing,
unexpected, misshaped, of a wrong dtype or not finite."""
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_jax.checkpoint import text_encoder_folder as folders
from lit_jax.checkpoint.arrays import load_arrays
from lit_jax.checkpoint.model_folder import ARRAYS
from lit_jax.convert.torch_files import Source, hub_parts, open_weights
from lit_jax.convert.torch_hub import folder_id, hub_digests, read_hub_config, refuse_flags
from lit_jax.convert.torch_import import tool_name
from lit_jax.models.t5 import NORM_EPS, WEIGHTS, T5Network, check_t5_arch
from lit_jax.runtime.claim import claims_out
from lit_jax.runtime.errors import UserError, check_known, human_bytes, listed, shown, shown_name
from lit_jax.runtime.json_file import read_json
from lit_jax.runtime.leaves import named_leaves, tree_bytes, unflatten
from lit_jax.runtime.paths import explain_unwritable, prepare_folder
from lit_jax.text.tokenizer import FILES, Tokenizer, missing_tokenizer

OWN_ID = 'lit_jax_id'             # in config.json of our exports: the id, for the way back
MODEL_TYPES = ('t5', 'mt5')      # their encoders are the same network

# Our field <- transformers' field and its default there.
_FIELDS = {'vocab': ('vocab_size', 32128), 'width': ('d_model', 512), 'layers': ('num_layers', 6),
           'heads': ('num_heads', 8), 'head_dim': ('d_kv', 64), 'ffn': ('d_ff', 2048),
           'buckets': ('relative_attention_num_buckets', 32),
           'max_distance': ('relative_attention_max_distance', 128)}
_ATTENTION, _MLP = 'encoder.block.{i}.layer.0.', 'encoder.block.{i}.layer.1.'
# Our leaf <- its tensors, {i} for each layer; several are stacked along an axis of their own.
NAMES = {
    'embed/table': ('shared.weight',),
    'position_bias/table': ('encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',),
    'blocks/attn/norm_gain': (_ATTENTION + 'layer_norm.weight',),
    'blocks/attn/qkv/kernel': tuple(f'{_ATTENTION}SelfAttention.{part}.weight' for part in 'qkv'),
    'blocks/attn/proj/kernel': (_ATTENTION + 'SelfAttention.o.weight',),
    'blocks/mlp/norm_gain': (_MLP + 'layer_norm.weight',),
    'blocks/mlp/gate/kernel': (_MLP + 'DenseReluDense.wi_0.weight', _MLP + 'DenseReluDense.wi_1.weight'),
    'blocks/mlp/down/kernel': (_MLP + 'DenseReluDense.wo.weight',),
    'final_norm/gain': ('encoder.final_layer_norm.weight',),
}
_EMBEDDINGS = ('shared.weight', 'encoder.embed_tokens.weight')      # one table under two names
_OTHER_HALF = ('decoder.', 'lm_head.')


@dataclass(frozen=True)
class ConvertedTextEncoder:
    """The result of a conversion, for the summary."""
    source: str
    config: dict
    parameters: int
    bytes: int
    out: Path


def is_hub_text_encoder(path, *, any_model: bool = True) -> bool:
    """Whether `path` is a transformers folder of a T5, or with any_model of any language model."""
    content = read_hub_config(path)
    known = 'model_type' in content and (any_model or content['model_type'] in MODEL_TYPES)
    return known and not {'kind', '_class_name'} & content.keys()


@claims_out
def convert_text_encoder(src, out, *, text_dtype: str = 'bfloat16', text_id: str | None = None,
                         overwrite: bool = False, asked: Iterable[str] = ()) -> ConvertedTextEncoder:
    """Reads the transformers folder `src`, or a file of weights in it, and writes the text encoder folder
    `out`, or raises UserError and writes nothing.

    text_dtype: stored dtype of the weights, 'bfloat16', 'float32' or 'int8'. text_id: its name for models and
    cached features; default: that in a folder that we exported, else the folder's (of the pipeline, or in the
    Hugging Face cache). asked: flags for diffusion models, refused."""
    (src, weights), out = hub_parts(src), Path(out)
    refuse_flags(src, 'a text encoder', asked)
    check_known('text_dtype', text_dtype, WEIGHTS)
    folders.check_text_encoder_target(out, overwrite)
    path = src / 'config.json'
    if not path.is_file():
        raise UserError(f'{path} does not exist; give the whole folder of the text encoder')
    hub = read_json(path, {str: object})
    arch = arch_of(hub, str(path))
    tokenizer = find_tokenizer(src)
    folders.check_vocabulary(tokenizer, arch)
    source = open_weights(weights)
    params = read_text_encoder_params(source, arch, str(src), text_dtype)
    own = hub.get(OWN_ID) if isinstance(hub.get(OWN_ID), str) else None
    name = text_id or own or folder_id(src, r'text_encoder(_\d)?')
    config = {'text_encoder': arch, 'id': name, 'weights': text_dtype,
              'provenance': {'source': src.resolve().name, 'tool': tool_name(), **hub_digests(source.files)}}
    folders.save_text_encoder_folder(out, config, params, tokenizer, overwrite=overwrite)
    count = sum(math.prod(leaf.shape) for leaf in named_leaves(T5Network(arch).abstract()).values())
    config['tokenizer'] = tokenizer.file
    return ConvertedTextEncoder(str(src), config, count, tree_bytes(params), out)


def describe_text_encoder(done: ConvertedTextEncoder) -> str:
    """The summary that the script prints."""
    arch, config = done.config['text_encoder'], done.config
    return '\n'.join([
        f'read     {done.source} (T5 encoder)',
        f'id       {config["id"]}',
        f'model    {arch["layers"]} layers, width {arch["width"]}, {arch["heads"]} heads of '
        f'{arch["head_dim"]}, mlp {arch["ffn"]}, {arch["vocab"]} tokens ({config["tokenizer"]})',
        f'numbers  {done.parameters:,} parameters, {human_bytes(done.bytes)} as {config["weights"]}',
        f'written  {done.out}'])


def arch_of(hub: Mapping, where: str) -> dict:
    """The architecture in a transformers config.json. UserError for what lit_jax does not have."""
    if hub.get('model_type') not in MODEL_TYPES:
        raise UserError(f'{where} describes a model of the type {shown(hub.get("model_type"))}; lit_jax '
                        f'reads the text encoders T5 v1.1, Flan-T5 and mT5 (model_type '
                        f'{" or ".join(MODEL_TYPES)})')
    proj = hub.get('feed_forward_proj', 'relu' if hub['model_type'] == 't5' else 'gated-gelu')
    problems = []
    if proj != 'gated-gelu' or hub.get('dense_act_fn', 'gelu_new') != 'gelu_new':
        problems.append(f'feed_forward_proj is {shown(proj)}, dense_act_fn '
                        f'{shown(hub.get("dense_act_fn", "not given"))}; only "gated-gelu" with "gelu_new" '
                        f'is known: T5 v1.1 and Flan-T5 have it, the first T5 has "relu"')
    if hub.get('layer_norm_epsilon', NORM_EPS) != NORM_EPS:
        problems.append(f'layer_norm_epsilon is {shown(hub["layer_norm_epsilon"])}; only {NORM_EPS} is '
                        'known')
    if problems:
        raise UserError(f'{where} describes a T5 that lit_jax does not have:\n  ' + '\n  '.join(problems))
    try:
        return check_t5_arch({ours: hub.get(theirs, default) for ours, (theirs, default) in _FIELDS.items()})
    except UserError as error:
        names = ', '.join(f'text_encoder.{ours} is {theirs}' for ours, (theirs, _) in _FIELDS.items()
                          if f'text_encoder.{ours} ' in str(error))
        raise UserError(f'{where}: {error} ({names})') from error


def find_tokenizer(src: Path) -> Tokenizer:
    """The tokenizer in the folder of the text encoder, or in a pipeline's tokenizer/ (tokenizer_2/)."""
    beside = src.resolve().parent / src.resolve().name.replace('text_encoder', 'tokenizer')
    places = [src] + [beside] * (beside.name.startswith('tokenizer'))
    for folder in places:
        if any((folder / name).is_file() for name in FILES):
            return Tokenizer.load(folder)
    raise UserError(missing_tokenizer(*places))


def read_text_encoder_params(source: Source, arch: Mapping, name: str, weights: str = 'float32') -> dict:
    """The parameters of `arch` in the dtype `weights`, or one UserError with all that is wrong in `name`."""
    if arch['layers'] > len(source.tensors):      # before tables of so many layers are made
        raise UserError(f'{name} describes {arch["layers"]} layers, but has only {len(source.tensors)} '
                        f'tensors')
    shapes = {path: leaf.shape for path, leaf in named_leaves(T5Network(arch).abstract()).items()}
    _check_tensors(source, shapes, name)
    flat, problems = {}, []

    def read(key: str) -> np.ndarray:
        values = source.read(key)
        if not np.isfinite(values).all():
            problems.append(f'non-finite values in tensor: {shown_name(key)}')
        return values

    for path, shape in shapes.items():
        flat |= folders.pack(path, _parts(path, shape, source, read), shape[0], weights)
        source.release()      # the mapped file, which would be counted beside its copy
    table, other = ((source.read(key) if key in source.tensors else None) for key in _EMBEDDINGS)
    if table is not None and other is not None and not np.array_equal(table, other):
        problems.append(f'{" and ".join(_EMBEDDINGS)} differ; they are one table')
    _raise(problems, name)
    return unflatten(flat)


def _parts(path: str, shape, source: Source, read) -> Iterator[np.ndarray]:
    """A kernel's layers one by one, or another leaf whole."""
    stacked = path.startswith('blocks/')
    if path in folders.KERNELS:
        for layer in range(shape[0]):
            matrices = [read(key).T for key in _keys(path, layer, source)]      # torch's are [out, in]
            yield np.stack(matrices, axis=1).reshape(shape[1:])                 # [*in, (parts,) *out]
    elif stacked:
        yield np.stack([read(_keys(path, layer, source)[0]) for layer in range(shape[0])])
    else:
        yield read(_keys(path, 0, source)[0])


def _keys(path: str, layer: int, source: Source | None = None) -> list[str]:
    keys = [name.format(i=layer) for name in NAMES[path]]
    shared, other = _EMBEDDINGS
    only_other = source is not None and shared not in source.tensors and other in source.tensors
    return [other] if only_other and keys == [shared] else keys


def _split(shape, num_in: int, parts: int) -> tuple[int, int, int]:
    """(numbers in, parts, numbers out) of a kernel without its layer axis."""
    inputs = math.prod(shape[:num_in])
    return inputs, parts, math.prod(shape) // inputs // parts


def _check_tensors(source: Source, shapes: Mapping, name: str) -> None:
    """All checks that need no values."""
    problems, used = list(source.problems), set(_EMBEDDINGS)
    for path, shape in shapes.items():
        stacked = path.startswith('blocks/')
        for layer in range(shape[0] if stacked else 1):
            want = shape[1:] if stacked else shape
            if path in folders.KERNELS:
                inputs, _, outputs = _split(want, folders.KERNELS[path], len(NAMES[path]))
                want = (outputs, inputs)
            keys = _keys(path, layer, source)
            used.update(keys)
            problems += [problem for key in keys if (problem := source.problem(key, want))]
    problems += [f'unexpected tensor: {shown_name(key)}' for key in source.tensors if key not in used
                 and not key.startswith(_OTHER_HALF)]
    _raise(problems, name)


def _raise(problems: list[str], name: str) -> None:
    if problems:
        raise UserError(f'{name} does not hold the whole text encoder of its config.json:' + listed(problems))


def to_torch_state(params: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    """(transformers' name, values) of every tensor of a float tree, dtypes unchanged."""
    flat = named_leaves(params)
    for path, leaf in flat.items():
        for layer in range(leaf.shape[0] if path.startswith('blocks/') else 1):
            values = np.asarray(leaf[layer] if path.startswith('blocks/') else leaf)
            keys = _keys(path, layer)
            if path in folders.KERNELS:
                values = values.reshape(_split(values.shape, folders.KERNELS[path], len(keys)))
                yield from ((key, np.ascontiguousarray(values[:, part].T)) for part, key in enumerate(keys))
            else:
                yield keys[0], values


@claims_out
def export_text_encoder(src, out, *, overwrite: bool = False) -> Path:
    """Writes `src` as a transformers folder `out` (T5EncoderModel), tokenizer included."""
    from safetensors.numpy import save_file
    out, config = Path(out), folders.read_text_encoder_config(src)
    if config['weights'] == 'int8':
        raise UserError(f'{src} holds int8 weights, rounded for good; export bfloat16 or float32 weights')
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f'{out} exists already; give another --out, or --overwrite to write into it')
    params, tokenizer = load_arrays(Path(src) / ARRAYS), Tokenizer.load(src)
    hub = {theirs: config['text_encoder'][ours] for ours, (theirs, _) in _FIELDS.items()}
    hub |= {'model_type': 't5', 'architectures': ['T5EncoderModel'], 'feed_forward_proj': 'gated-gelu',
            'pad_token_id': 0, 'layer_norm_epsilon': NORM_EPS, 'eos_token_id': 1,
            'tie_word_embeddings': False, 'torch_dtype': config['weights'], OWN_ID: config['id']}
    prepare_folder(out)
    with explain_unwritable(out, tree_bytes(params) + (1 << 20)):
        save_file(dict(to_torch_state(params)), out / 'model.safetensors', metadata={'format': 'pt'})
        (out / tokenizer.file).write_bytes(tokenizer.content)
        (out / 'config.json').write_text(json.dumps(hub, indent=2) + '\n')
    return out
