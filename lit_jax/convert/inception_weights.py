"""Weights of FID-Inception: found, checked, read and converted.

Looked for in this order: the given path, the environment variable LIT_JAX_INCEPTION, the cache folder
($LIT_JAX_CACHE, else ~/.cache/lit_jax), the cache of torch.hub, and the release page of pytorch-fid, from
which the file is downloaded if the network allows. Three files are read, told apart by their content:

    pt_inception-2015-12-05-6726825d.pth    of pytorch-fid; its name ends with the start of its sha256
    inception_v3_weights_fid.pickle         of jax-fid, the same weights
    inception.safetensors                   ours, written by `convert_torch_ckpt.py`; may be in a bucket

PyTorch is not needed, and no code in a file is run (`lit_jax.convert.array_pickles`)."""
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from lit_jax.convert.array_pickles import flat_names, read_arrays
from lit_jax.convert.inception_download import PUBLISHED_NAME, download
from lit_jax.convert.torch_import import tool_name
from lit_jax.models.inception import InceptionNetwork, fold_batch_norm
from lit_jax.runtime import paths
from lit_jax.runtime.claim import claims_out
from lit_jax.runtime.errors import UserError, listed, reason_of, shown, shown_name
from lit_jax.runtime.json_file import check_shape, parse_json
from lit_jax.runtime.leaves import named_leaves, params_sha256, unflatten

VARIABLE = 'LIT_JAX_INCEPTION'
FILE = 'inception.safetensors'
FORMAT = 1
# sha256 of the files that hold the published weights: of the first, the digits that its name gives.
PUBLISHED = ('6726825d', '4e030efa5bccac3222d975f658d1884f9e00fab24f2812082884539220b90d77')
_NAMES = (FILE, PUBLISHED_NAME, 'inception_v3_weights_fid.pickle')
_METADATA = 'lit_jax_inception'
_NAME_DIGEST = re.compile(r'-([0-9a-f]{8,64})\.pth?$')

# Names of a batch norm's gain, shift, mean and variance.
_TORCH_NORM = ('weight', 'bias', 'running_mean', 'running_var')
_FLAX_NORM = ('scale', 'bias', 'mean', 'var')
_NOT_NEEDED = re.compile(r'(\.num_batches_tracked$|^AuxLogits\.)')


@dataclass(frozen=True)
class Inception:
    """FID-Inception: its weights (float32 numpy), and sha256 and name (source) of their published file."""
    network: InceptionNetwork
    params: dict
    sha256: str
    source: str

    @property
    def published(self) -> bool:
        """Whether published scores are computed with these weights."""
        return self.sha256.startswith(PUBLISHED)

    def describe(self) -> dict:
        """The part of a score card that describes the network, JSON-able."""
        return {'network': 'FID-Inception of 2015-12-05', 'weights': self.source, 'sha256': self.sha256,
                'published': self.published, 'precision': self.network.precision,
                'resize': 'TensorFlow 1 bilinear to 299 x 299'}


def load_inception(path='', precision: str = 'highest', *, sha256: str = '') -> Inception:
    """The network with its weights from `path` (file or folder), or from the first place of the list above
    that has them.

    precision: see `InceptionNetwork`. sha256: the first digits, at least eight, of the expected sum; default:
    those in the file's name, else those of the published files. Raises UserError: no weights, or a file that
    is damaged, unknown, or not the one that its name says."""
    network = InceptionNetwork(precision)
    file = find_inception(path)
    with paths.explain_unreadable(file), file.open('rb') as opened:
        ours = opened.read(9)[8:] == b'{' or file.suffix == '.safetensors'
    if ours:
        if sha256:
            raise UserError(f'{file} carries the sha256 of its weights itself; leave sha256 out')
        return Inception(network, *_read_ours(file, network))
    digest = _checked_digest(paths.local_path(file), sha256)
    params = read_inception_params(read_arrays(file), str(file), network)
    return Inception(network, params, digest, file.name)


def find_inception(path=''):
    """The file of the weights, downloaded if it is nowhere. UserError if that fails."""
    if told := path or os.environ.get(VARIABLE, ''):
        what = '' if path else f' (from {VARIABLE})'
        told = paths.as_path(told)
        with paths.explain_unreachable(told):
            if told.is_dir():
                if found := [told / name for name in _NAMES if (told / name).exists()]:
                    return found[0]
                raise UserError(f'{told}{what} holds no weights of Inception: none of {", ".join(_NAMES)}')
            if told.exists():
                return told
        raise UserError(f'{told}{what} does not exist. Give the file {PUBLISHED_NAME} or its folder')
    hub = Path(os.environ.get('TORCH_HOME') or '~/.cache/torch').expanduser() / 'hub' / 'checkpoints'
    for file in (*(paths.cache_folder() / name for name in _NAMES), hub / PUBLISHED_NAME):
        if file.is_file():
            return paths.as_path(file)
    return paths.as_path(download(f'--inception FILE or the environment variable {VARIABLE}'))


def is_inception_file(path) -> bool:
    """Whether a file is one of Inception's weights, by its name."""
    return 'inception' in Path(path).name.lower() and Path(path).is_file()


@claims_out
def convert_inception(src, out, *, sha256: str = '', overwrite: bool = False,
                      asked: Iterable[str] = ()) -> tuple[Inception, Path]:
    """Writes published weights as our own file, `out` or FILE in it. asked: flags given by mistake."""
    if asked := ', '.join(asked):
        raise UserError(f'{src} is taken for weights of Inception, by its name; {asked} is for diffusion '
                        f'models. Leave it out, or rename the file')
    out = Path(paths.local_path(out))
    file = out if out.suffix == '.safetensors' else out / FILE
    if file.exists() and not overwrite:
        raise UserError(f'{file} exists already. Choose another --out, or --overwrite it')
    if file.parent.exists() and not file.parent.is_dir():
        raise UserError(f'cannot write {file}: {file.parent} is a file. Choose another --out')
    inception = load_inception(paths.local_path(src), sha256=sha256)
    save_inception(file, inception)
    return inception, file


def describe_inception(done: tuple[Inception, Path]) -> str:
    """The summary that the script prints."""
    inception, file = done
    count = sum(leaf.size for leaf in named_leaves(inception.params).values())
    differ = '' if inception.published else 'NOT '
    kind = f'{differ}the published weights' + (': scores are not comparable' if differ else '')
    return '\n'.join([f'read     {inception.source} (FID-Inception, {kind})', f'sha256   {inception.sha256}',
                      f'numbers  {count:,} parameters, batch norms folded into kernels', f'written  {file}',
                      f'next     export {VARIABLE}={file}'])


def save_inception(file, inception: Inception) -> None:
    """Writes our own file, whole or not at all, in a folder that is made."""
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(inception.params).items()}
    told = {'format': FORMAT, 'sha256': inception.sha256, 'source': inception.source, 'tool': tool_name(),
            'params_sha256': params_sha256(inception.params)}
    paths.as_path(file).parent.mkdir(parents=True, exist_ok=True)
    paths.write_bytes_atomic(file, safetensors.numpy.save(leaves, {_METADATA: json.dumps(told)}))


def read_inception_params(arrays: Mapping, where: str, network: InceptionNetwork) -> dict:
    """The parameter tree from published arrays, PyTorch's or Flax's, or one UserError with all problems."""
    found = _Published({name: x for name, x in flat_names(arrays).items() if not _NOT_NEEDED.search(name)})
    flat = {}
    for path, leaf in named_leaves(network.abstract()).items():
        unit, _, part = path.replace('/', '.').rpartition('.')
        if unit == 'fc':
            flat[path] = found.linear(part, leaf.shape)
        elif part == 'kernel':
            flat[path], flat[path.removesuffix('kernel') + 'bias'] = found.unit(unit, leaf.shape)
    problems = found.problems + [f'unexpected: {shown_name(name)}' for name in found.arrays
                                 if name not in found.used]
    if problems:
        raise UserError(f'{where} does not hold the weights of FID-Inception (1008 classes, no auxiliary '
                        f'head):{listed(problems, 20)}\nThe file to get is {PUBLISHED_NAME}')
    return unflatten(flat)


class _Published:
    """Arrays in PyTorch's or Flax's layout, by their published names; notes what is wrong with them."""

    def __init__(self, arrays: Mapping):
        self.arrays, self.problems, self.used = arrays, [], set()
        self._torch = 'fc.weight' in arrays

    def unit(self, name: str, shape: tuple[int, ...]) -> tuple:
        """(kernel, bias) of a unit with a kernel of shape HWIO; (None, None) if something is wrong."""
        rows, columns, width_in, width_out = shape
        if self._torch:
            kernel = self._take(f'{name}.conv.weight', (width_out, width_in, rows, columns))
            kernel = None if kernel is None else kernel.transpose(2, 3, 1, 0)
        else:
            kernel = self._take(f'{name}.conv.kernel', shape)
        parts = _TORCH_NORM if self._torch else _FLAX_NORM
        values = [kernel, *(self._take(f'{name}.bn.{part}', shape[-1:]) for part in parts)]
        return (None, None) if any(value is None for value in values) else fold_batch_norm(*values)

    def linear(self, part: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The head's kernel [in, out] or bias."""
        turned = self._torch and part == 'kernel'
        value = self._take('fc.weight' if turned else f'fc.{part}', shape[::-1] if turned else shape)
        return None if value is None else np.ascontiguousarray(value.T if turned else value, np.float32)

    def _take(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        self.used.add(name)
        value = self.arrays.get(name)
        if value is None:
            self.problems.append(f'missing: {shown_name(name)} {list(shape)}')
        elif value.shape != shape:
            self.problems.append(f'misshaped: {name} has {list(value.shape)}, expected {list(shape)}')
        elif not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            self.problems.append(f'not finite floats: {name} ({value.dtype})')
        else:
            return value
        return None


def _checked_digest(file: Path, sha256: str) -> str:
    digest = paths.file_sha256(file)
    in_name = _NAME_DIGEST.search(file.name)
    if sha256 and not re.fullmatch(r'[0-9a-f]{8,64}', sha256.lower()):
        raise UserError('give 8 to 64 hexadecimal digits of the sha256, from the first on; got '
                        f'{shown(sha256)}')
    expected = (sha256.lower(),) if sha256 else (in_name[1],) if in_name else PUBLISHED
    if not digest.startswith(expected):
        said = 'was asked for' if sha256 else 'its name says' if in_name else 'the published files have'
        raise UserError(f'{file} has the sha256 {digest}, but {said} {" or ".join(expected)}...: it is '
                        f'damaged, incomplete, or another file. Get {PUBLISHED_NAME}, or give its sha256')
    return digest


def _read_ours(file, network: InceptionNetwork) -> tuple[dict, str, str]:
    """(parameters, sha256, source) of our own file."""
    with paths.explain_unreadable(file):
        data = file.read_bytes()
    try:
        flat = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise UserError(f'{file} is truncated or damaged ({reason_of(error)}); copy or convert it '
                        f'again') from error
    header = parse_json(data[8:8 + int.from_bytes(data[:8], 'little')], file,
                        {'__metadata__?': {f'{_METADATA}?': str}})
    told = parse_json((header.get('__metadata__') or {}).get(_METADATA) or '{}', file, {
        'format?': int, 'params_sha256?': str, 'sha256?': str, 'source?': str})
    if told.get('format') != FORMAT:
        raise UserError(f'{file} is no file of Inception weights that this lit_jax wrote. Convert the '
                        f'original: python convert_torch_ckpt.py {PUBLISHED_NAME} --out models/inception')
    check_shape(told, {'sha256': str, 'source': str}, file)
    expected, found = ({name: leaf.shape for name, leaf in leaves.items()}
                       for leaves in (named_leaves(network.abstract()), flat))
    params = unflatten(flat)
    if found != expected or params_sha256(params) != told.get('params_sha256'):
        raise UserError(f'{file} is damaged: its values have changed; copy or convert it again')
    return params, told.get('sha256') or '', told.get('source') or file.name
