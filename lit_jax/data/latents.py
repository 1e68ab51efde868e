"""Cached VAE latents of a data set, made by prepare_latents.py.

    latents/metadata.json                sources, shards with checksums, statistics; written last
    latents/preparation.json             the part of it that is known at the start, and the command to resume
    latents/shards/00000.array_record    the examples
    latents/shards/00000.json            count, checksum, labels and statistics of the shard
    latents/bad_pictures.txt             images that could not be decoded and are left out, if any

A record of latents with labels: the moments of an image and of its mirror image, [2, h, w, 2C], mean before
log-variance, not scaled, as little-endian float32 or float16; then the label as int32. Of an exact set
(format 2, drawn by a teacher: lit_jax/latents/teacher_draws.py): latents or pixels [1, h, w, C], without
mirror image and variance; of one that LightningDiT's code made (format 3: lit_jax/latents/official_shards.py)
[2, h, w, C]. Latents with text features: lit_jax/data/caption_latents.py."""
import hashlib
import logging
import os
import shlex
from abc import abstractmethod
from dataclasses import asdict, dataclass

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from lit_jax.data.base import Source, Spec, check_index
from lit_jax.data.label_index import read_labels
from lit_jax.data.latent_space import LatentSpace
from lit_jax.runtime import cluster
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError, human_bytes, reason_of, shown, shown_name
from lit_jax.runtime.json_file import check_shape, read_json, unsealed
from lit_jax.runtime.kept import keep_facts
from lit_jax.runtime.paths import absolute, file_sha256, files_under, is_remote
from lit_jax.runtime.read_ahead import read_all

FORMAT, EXACT_FORMAT, MIRRORED_FORMAT, KIND = 1, 2, 3, 'latents'
FORMATS = FORMAT, EXACT_FORMAT, MIRRORED_FORMAT
EXACT = -60.0      # log-variance of what is exact: the noise of its posterior is lost in rounding
METADATA, PREPARATION, BAD, SHARDS = 'metadata.json', 'preparation.json', 'bad_pictures.txt', 'shards'
DTYPES = {'float32': np.dtype('<f4'), 'float16': np.dtype('<f2')}  # of the moments on disk
_COMMAND = 'are made by: python prepare_latents.py --vae=VAE_FOLDER --image_size=PIXELS'
_MADE_BY = {KIND: f'VAE latents of ImageNet {_COMMAND} --data=imagenet2012',
            'caption_latents': f'VAE latents and text features {_COMMAND} --data=captions --path=IMAGES '
                               f'--text_encoder=ENCODER_FOLDER'}
_LABEL = np.dtype('<i4')
LOG = logging.getLogger('lit_jax')
_SAID, _THREADS = 1 << 30, 8
_ABSENT = object()
# What readers need of metadata.json.
_SHAPE = {'count': int, 'latent_size': int, 'image_size': int, 'dtype': str, 'classes': [str],
          'source': {'split': str},
          'vae': {'channels': int, 'downscale': int, 'scale': float, 'shift?': float},
          'shards': [{'name': str, 'count': int, 'bytes': int, 'sha256': str}],
          'text?': {'tokens': int, 'width': int}, 'buckets?': [[int]], 'space?': str, 'exact?': bool,
          'mirrored?': bool,
          'teacher?': {'name': str, 'sha256': str}}
_NOTE = {'count': int, 'sha256': str, 'labels?': [int], 'buckets?': [int]}


@dataclass(frozen=True)
class _Shard:
    """A file as ArrayRecordDataSource takes it, which then need not open each one to count."""
    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class CachedLatents(Source):
    """Records in shards; `metadata` is the content of metadata.json. Threads may share it."""

    def __init__(self, folder, metadata: dict, spec: Spec):
        super().__init__(spec)
        self.folder, self.metadata = folder, metadata
        shards = [_Shard(os.fspath(folder / shard['name']), shard['count'], shard['count'])
                  for shard in metadata['shards']]
        no_read_ahead = {'max_parallelism': '0'}
        self._records = ArrayRecordDataSource(shards, reader_options=no_read_ahead)

    def __len__(self) -> int:
        return self.metadata['count']

    @property
    def identity(self) -> dict:
        """JSON-able, equal for equal examples in equal order, wherever they are stored."""
        sums = ' '.join(shard['sha256'] for shard in self.metadata['shards'])
        return {'name': self.metadata['kind'], 'split': self.metadata['source']['split'], 'count': len(self),
                'classes': self.spec.num_classes, 'sha256': hashlib.sha256(sums.encode()).hexdigest()}

    def notes(self) -> list[dict]:
        """The .json of each shard."""
        return [self._note(shard) for shard in self.metadata['shards']]

    def _note(self, shard: dict) -> dict:
        path = (self.folder / shard['name']).with_suffix('.json')
        note = unsealed(read_json(path, _NOTE), path)
        if (note['count'], note['sha256']) != (shard['count'], shard['sha256']):
            raise UserError(f'{path} is the note of another shard. Copy it again, or make the shard again: '
                            f'{continue_command(self.folder)}')
        return note

    @abstractmethod
    def _fits(self, record: bytes) -> bool:
        """Whether a record has the size that it should."""

    def _read(self, index: int) -> bytes:
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise self._damaged(index, reason_of(error)) from error
        if not self._fits(record):
            raise self._damaged(index, f'its {len(record)} bytes are not what was written')
        return record

    def _damaged(self, index: int, why: str) -> UserError:
        return UserError(f'latents {index} of {self.folder} cannot be read: {why}. This command checks all '
                         f'shards and makes damaged ones again: {continue_command(self.folder)}')


class LatentSource(CachedLatents):
    """Elements {'moments': float32 [2, h, w, 2C], 'label': int32}, of an exact set without mirror images
    [1, h, w, 2C]; `spec` has image_size h and channels C."""

    def __init__(self, folder, metadata: dict):
        size, channels = metadata['latent_size'], metadata['vae']['channels']
        names = tuple(metadata['classes'])
        super().__init__(folder, metadata, Spec(size, channels, len(names), names))
        self._exact, self._dtype = metadata.get('exact', False), DTYPES[metadata['dtype']]
        self._shape = views(metadata), size, size, channels * (1 if self._exact else 2)
        self._values, self._bytes = int(np.prod(self._shape)), record_bytes(metadata)

    def __getitem__(self, index: int) -> dict:
        record = self._read(check_index(int(index), len(self)))
        return {'moments': self._moments(record).astype(np.float32), 'label': self._label(record)}

    def take(self, indices) -> dict[str, np.ndarray]:
        shape = (*self._shape[:3], 2 * self.spec.channels)
        moments = np.empty((len(indices), *shape), np.float32)
        labels = np.empty(len(indices), np.int32)
        for row, index in enumerate(indices):
            # One by one: a list of records is no faster, and its memory is new each time.
            record = self._read(check_index(int(index), len(self)))
            moments[row], labels[row] = self._moments(record), self._label(record)
        return {'moments': moments, 'label': labels}

    def all_labels(self) -> np.ndarray:
        """From the notes of the shards; if an earlier version wrote them, from the records, once."""
        notes = self.notes()
        if all('labels' in note for note in notes):
            return np.array([label for note in notes for label in note['labels']], np.int32)
        return read_labels(self.identity, len(self), lambda index: int(self._label(self._read(index))))

    def _fits(self, record: bytes) -> bool:
        return len(record) == self._bytes

    def _moments(self, record: bytes) -> np.ndarray:
        values = np.frombuffer(record, self._dtype, self._values).reshape(self._shape)
        return exact_moments(values) if self._exact else values

    def _label(self, record: bytes) -> np.int32:
        return np.frombuffer(record, _LABEL, 1, len(record) - _LABEL.itemsize)[0]


def choose_mirror(element: dict, rng: np.random.Generator) -> dict:
    """Augmentation: the image or, half of the time, its mirror image if there is one; 'moments' becomes
    [h, w, 2C]. Uses the same raw bit of the generator as `lit_jax.data.augment.random_flip`."""
    views = element['moments']
    return {**element, 'moments': views[int(rng.bit_generator.random_raw() >> 63) % len(views)]}


def first_of_both(element: dict, rng: np.random.Generator | None = None) -> dict:
    """The image, never its mirror image (for held-out images): 'moments' becomes [h, w, 2C]."""
    return {**element, 'moments': element['moments'][0]}


def exact_moments(values: np.ndarray) -> np.ndarray:
    """Moments [..., 2C] of latents or pixels [..., C] that are known exactly."""
    return np.concatenate([values, np.full_like(values, EXACT)], axis=-1)


def pack(moments: np.ndarray, label: int, dtype: str) -> bytes:
    """One record from float32 [2, h, w, 2C] (of an exact set [1 or 2, h, w, C]) and a label."""
    return moments.astype(DTYPES[dtype]).tobytes() + np.asarray(label, _LABEL).tobytes()


def views(plan: dict) -> int:
    """1, or 2 with the mirror image."""
    return 2 if plan.get('mirrored', not plan.get('exact')) else 1


def record_bytes(plan: dict) -> int:
    """Bytes of a record. plan: or metadata."""
    parts = 1 if plan.get('exact') else 2
    values = views(plan) * plan['latent_size'] ** 2 * parts * plan['vae']['channels']
    return values * DTYPES[plan['dtype']].itemsize + _LABEL.itemsize


def open_latents(folder, *, split: str = 'train', asked: dict | None = None) -> LatentSource:
    """The latents in a folder. asked: image_size and channels (of the latents), num_classes; None: any.
    Raises UserError unless the folder holds a whole data set of that split and those numbers."""
    folder, metadata = open_cached(folder, split, KIND)
    own = {'image_size': metadata['latent_size'], 'channels': metadata['vae']['channels'],
           'num_classes': len(metadata['classes'])}
    check_asked(folder, own, asked or {})
    return LatentSource(folder, metadata)


def open_cached(folder, split: str, kind: str) -> tuple[epath.Path, dict]:
    """(the folder, its metadata) of a whole data set of a split and kind; UserError for any other."""
    if not os.fspath(folder):      # else it would be the current folder
        raise UserError(f'data.name={kind} needs the folder of its latents: --config.data.path=FOLDER. '
                        f'{_MADE_BY[kind]} --out=FOLDER')
    folder = absolute(folder)
    if is_remote(folder):
        raise UserError(f'{folder}: ArrayRecord files are read from a disk. Copy the latents to every host '
                        f'(gcloud storage cp -r), or mount the bucket (gcsfuse) and name that folder')
    metadata = read_metadata(folder, kind)
    _check_files(folder, metadata)
    _check_sums(folder, metadata)
    if metadata['source']['split'] != split:
        raise UserError(f'{folder} holds latents of the split {shown(metadata["source"]["split"])}, asked '
                        f'for is '
                        f'{shown(split)}. Make those into another folder: python prepare_latents.py '
                        f'--split={split} ...')
    return folder, metadata


def check_asked(folder, own: dict, asked: dict) -> None:
    """Raises UserError if a recipe asks for other numbers than a data set has; None is not compared."""
    check_alike(own, {name: asked.get(name) for name in own}, 'in the data set', 'in the recipe',
                f'the latents in {folder} do not fit (sizes in latent pixels)',
                'Correct the recipe, or make latents that fit with prepare_latents.py', none_fits=True)


def read_metadata(folder, kind: str = KIND) -> dict:
    """metadata.json of a folder. UserError if there is none, with the command that makes or resumes it."""
    folder = absolute(folder)
    try:
        metadata = unsealed(read_json(folder / METADATA, absent=_ABSENT), folder / METADATA)
    except UserError as error:
        raise UserError(f'{error}. Delete it; the command that made it checks all shards and writes it '
                        f'again: {continue_command(folder)}') from error
    if metadata is _ABSENT:
        if (folder / PREPARATION).exists():
            raise UserError(f'the latents in {folder} are not finished. This command resumes: '
                            f'{continue_command(folder)}') from None
        found = 'holds no latents' if folder.is_dir() else 'does not exist'
        raise UserError(f'{folder} {found}. {_MADE_BY[kind]} --out={shlex.quote(str(folder))}') from None
    found = metadata.get('kind') if isinstance(metadata, dict) else None
    if found != kind and isinstance(found, str) and found in _MADE_BY:
        raise UserError(f'{folder} holds {found}, not {kind}: take --config.data.name={found}, or another '
                        f'folder')
    if found != kind:
        raise UserError(f'{folder / METADATA} does not describe latents of prepare_latents.py')
    if metadata.get('format') not in FORMATS:
        raise UserError(f'{folder} has format {shown(metadata.get("format"))}, this version of lit_jax reads '
                        f'formats {", ".join(map(str, FORMATS))}. Use the version that wrote it, or make the '
                        f'latents again')
    check_shape(metadata, _SHAPE, folder / METADATA)
    return metadata


def continue_command(folder) -> str:
    """The command that makes the latents in a folder, or those that are missing or damaged."""
    try:
        path = absolute(folder) / PREPARATION
        command = unsealed(read_json(path, {'command': str}), path)['command']
    except UserError:
        command = 'python prepare_latents.py ...'
    return f'{command} --out={shlex.quote(os.fspath(folder))}'


def _check_files(folder, metadata: dict) -> None:
    """Checks sizes first: ArrayRecord reads a truncated file as an empty one."""
    sizes = files_under(folder / SHARDS)
    wrong = [f'{shard["name"]}: {"no file" if size is None else f"{size} bytes"} where {shard["bytes"]} were '
             f'written' for shard in metadata['shards']
             if (size := sizes.get(shard['name'].removeprefix(f'{SHARDS}/'))) != shard['bytes']]
    if wrong:
        raise UserError(f'{folder} is not whole; {len(wrong)} of {len(metadata["shards"])} shards are not as '
                        f'they were written ({wrong[0]}). Copy it again, or make these again: '
                        f'{continue_command(folder)}')


def _check_sums(folder, metadata: dict) -> None:
    """Compares the checksums of the shards, until all were right; processes of a run share the work."""
    first, step = cluster.process()
    mine = metadata['shards'][first::step]

    def find_damaged(_) -> np.ndarray:
        if (size := sum(shard['bytes'] for shard in mine)) > _SAID:
            LOG.info('comparing the checksums of %s of latents in %s, once', human_bytes(size), folder)
        sums = read_all(lambda shard: file_sha256(folder / shard['name']), mine, _THREADS)
        if wrong := [shard['name'] for shard, found in zip(mine, sums, strict=True)
                     if found != shard['sha256']]:
            raise UserError(f'{folder} is damaged: {len(wrong)} shards have not the sha256 that was written '
                            f'({shown_name(wrong[0])}). Copy it again, or make these again: '
                            f'{continue_command(folder)}')
        return np.array(True)

    states = [os.stat(folder / shard['name']) for shard in mine]
    facts = '\n'.join([str(folder), *(f'{shard["name"]} {shard["sha256"]} {state.st_size} {state.st_mtime_ns}'
                                      for shard, state in zip(mine, states, strict=True))])
    keep_facts('latent_sums', facts, '.npy', make=find_damaged, load=np.load, save=np.save,
               fits=lambda found: found.shape == () and bool(found))


def check_latents(source: CachedLatents, space: LatentSpace, *, where: str = 'in the recipe',
                  **asked) -> None:
    """Raises one UserError that names every value of the data set that differs from what it must be.
    asked: image_size (of the images), classes (how many), crop. None is not compared."""
    metadata = source.metadata
    own = {**asdict(LatentSpace.of_latents(metadata)), 'image_size': metadata['image_size'],
           'classes': len(metadata['classes']), 'crop': metadata['crop']}
    check_alike(own, {**asdict(space), **asked}, 'in the latents', where,
                f'the latents in {source.folder} are not those {where}',
                'Make latents that fit with prepare_latents.py, or correct the wrong value',
                rel_tol=1e-6, none_fits=True)
