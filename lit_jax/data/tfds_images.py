"""Any image data set prepared by tfds as ArrayRecord, read from its files alone, without TensorFlow.

Images are decoded here (`lit_jax.data.images`), as tfds' decoders differ between back ends."""
import hashlib
import os
import re

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from lit_jax.data.base import Spec
from lit_jax.data.images import ImageSource, check_asked
from lit_jax.runtime.errors import UserError, reason_of, shown
from lit_jax.runtime.paths import absolute, is_remote

# The first existing one is used.
SPLITS = {'train': ('train',), 'held_out': ('held_out', 'validation', 'val', 'test')}
_NAME = re.compile(r'^(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?$')
_VERSION = re.compile(r'^(\d+)\.(\d+)\.(\d+)$')
_FILE_NAMES = ('file_name', 'filename')  # features with the image's name
_READ_ERRORS = (OSError, ValueError, LookupError, RuntimeError, AssertionError, DecodeError,
                json_format.ParseError)


class TfdsSource(ImageSource):
    """Opened by `open_tfds`."""

    def __init__(self, builder, split: str, keys: dict[str, str | None], spec: Spec, *, strict: bool = False):
        super().__init__(spec, strict=strict)
        self._builder, self.split, self._keys = builder, split, keys
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw)
        # Only these are parsed: a record may also have boxes, masks and texts.
        self._features = tfds.features.FeaturesDict(
            {key: builder.info.features[key] for key in keys.values() if key is not None})
        self._decoders = {keys['image']: tfds.decode.SkipDecoding()}

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[bytes, int, str]:
        name = f'example {index} of {self._builder.info.full_name} {self.split}'
        try:
            record = self._records[index]
            if not record:  # array_record's answer for a truncated file
                raise ValueError('no record')
            example = self._features.deserialize_example_np(record, decoders=self._decoders)
        except _READ_ERRORS as error:
            raise UserError(f'{name} cannot be read: {reason_of(error)}. A file in '
                            f'{self._builder.data_path} is damaged; prepare the data set again') from error
        if self._keys['name'] is not None:
            name += f' ({example[self._keys["name"]].decode(errors="replace")})'
        label = 0 if self._keys['label'] is None else int(example[self._keys['label']])
        return example[self._keys['image']], label, name

    @property
    def identity(self) -> dict:
        info = self._builder.info.splits[self.split]
        text = repr((self.spec.class_names, list(info.shard_lengths), int(info.num_bytes)))
        return {'name': self._builder.info.full_name, 'split': self.split, 'count': len(self),
                'classes': self.spec.num_classes, 'sha256': hashlib.sha256(text.encode()).hexdigest()}


def open_tfds(name: str, *, split: str = 'train', data_dir, asked: dict, strict: bool = False) -> TfdsSource:
    """A prepared data set `NAME`, `NAME/CONFIG` or `NAME/CONFIG:VERSION` (default: the newest) in `data_dir`.

    data_dir: may also be the folder of one version (.../imagenet2012/5.1.0). asked: image_size, channels and
    num_classes of a recipe, None for any. Raises UserError if it is missing, incomplete, no ArrayRecord, or
    has no images."""
    if split not in SPLITS:
        raise UserError(f'tfds data sets have no split {shown(split)} here; known: {", ".join(SPLITS)}')
    folder = _find(name, data_dir)
    try:
        builder = tfds.builder_from_directory(os.fspath(folder))
    except _READ_ERRORS as error:
        raise UserError(f'{folder} is no complete tfds data set: {reason_of(error)}. Delete it '
                        'and prepare it again') from error
    info = builder.info
    if info.file_format is None or info.file_format.value != 'array_record':
        kind = info.file_format.value if info.file_format else 'an unknown format'
        raise UserError(f'{folder} is stored as {kind}; random access needs ArrayRecord. Prepare it again, '
                        f'into another folder: {prepare_command(name, "FOLDER")}')
    chosen = _choose_split(info, split)
    keys = _choose_features(info)
    names = _class_names(info, keys['label'], asked['num_classes'])
    size = check_asked(info.full_name, asked, len(names))
    return TfdsSource(builder, chosen, keys, Spec(size, 3, len(names), names), strict=strict)


def prepare_command(name: str, data_dir) -> str:
    """The command that prepares a data set as ArrayRecord."""
    if _is_imagenet(name):
        return f'python -m lit_jax.data.prepare_imagenet --archives=FOLDER_OF_THE_TARS --data_dir={data_dir}'
    return ('python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{data_dir}', "
            f"file_format='array_record').download_and_prepare()\"")


def _find(name: str, data_dir):
    """The folder of the version to read."""
    match = _NAME.match(name)
    if not match:
        raise UserError(f'{shown(name)} names no tfds data set; write tfds:NAME, tfds:NAME/CONFIG or '
                        'tfds:NAME/CONFIG:1.0.0')
    if is_remote(data_dir):
        raise UserError(f'{data_dir}: ArrayRecord files are read from a disk. Copy the data set to every '
                        'host (gcloud storage cp -r), or mount the bucket (gcsfuse) and give that folder')
    root = absolute(data_dir)
    if (root / 'dataset_info.json').is_file():
        if match['name'] not in root.parts:
            raise UserError(f'{root} is a data set, but not {match["name"]}; data.name and data.path differ')
        return root
    base = root / match['name']
    if match['config']:
        base = base / match['config']
    elif not _versions(base) and base.is_dir():
        configs = sorted(path.name for path in base.iterdir() if path.is_dir() and _versions(path))
        if configs:
            raise UserError(f'{name} has these configurations in {base}: {", ".join(configs)}. Name one: '
                            f'--config.data.name=tfds:{match["name"]}/{configs[0]}')
    versions = _versions(base)
    if match['version']:
        versions = [version for version in versions if version == match['version']]
    if not versions:
        raise UserError(_not_prepared(name, base, root))
    return base / versions[-1]


def _versions(base) -> list[str]:
    """Complete versions in a folder, oldest first; tfds gives unfinished ones another name."""
    if not base.is_dir():
        return []
    names = (path.name for path in base.iterdir() if (path / 'dataset_info.json').is_file())
    return sorted(filter(_VERSION.match, names), key=lambda version: tuple(map(int, version.split('.'))))


def _not_prepared(name: str, base, root) -> str:
    start = (f'{name} is not prepared: there is no version of it in {base}. If it is elsewhere: '
             '--config.data.path=FOLDER')
    if _is_imagenet(name):
        return (f'{start}. To prepare it, register at https://image-net.org, download '
                'ILSVRC2012_img_train.tar (148 GB) and ILSVRC2012_img_val.tar (7 GB) into one folder, and '
                f'run, with another 156 GB free in {root}: {prepare_command(name, root)}')
    return (f'{start}. To prepare it: {prepare_command(name, root)} (for data sets above 1 GB, or whose code '
            'asks for it, this step needs TensorFlow, in an environment of its own; reading does not)')


def _is_imagenet(name: str) -> bool:
    return _NAME.match(name)['name'] == 'imagenet2012'


def _choose_split(info, split: str) -> str:
    chosen = next((name for name in SPLITS[split] if name in info.splits and info.splits[name].num_examples),
                  None)
    if chosen is None:
        raise UserError(f'{info.full_name} has no {" or ".join(SPLITS[split])} split for {shown(split)}; '
                        f'it has: '
                        f'{", ".join(info.splits) or "none"}')
    missing = [path for path in info.splits[chosen].filepaths if not os.path.exists(path)]
    if missing:
        raise UserError(f'{info.full_name} is incomplete: {missing[0]} is missing'
                        f'{f", and {len(missing) - 1} more" if len(missing) > 1 else ""}. Copy it again, or '
                        'delete its folder and prepare it again')
    return chosen


def _choose_features(info) -> dict[str, str | None]:
    """The keys of the features: {'image': key, 'label': key or None, 'name': key or None}."""
    is_dict = isinstance(info.features, tfds.features.FeaturesDict)
    features = dict(sorted(info.features.items())) if is_dict else {}
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    image = 'image' if 'image' in images else images[0] if len(images) == 1 else None
    if image is None:
        raise UserError(f'{info.full_name} has {"several images" if images else "no images"} in an example; '
                        f'this needs one, best called image. Its features: {", ".join(features)}')
    if np.dtype(features[image].np_dtype) != np.uint8:
        raise UserError(f'the images of {info.full_name} are {features[image].np_dtype}; expected uint8')
    label = 'label' if _is_label(features.get('label')) else labels[0] if len(labels) == 1 else None
    name = next((key for key in _FILE_NAMES if isinstance(features.get(key), tfds.features.Text)), None)
    return {'image': image, 'label': label, 'name': name}


def _is_label(feature) -> bool:
    return feature is not None and feature.shape == () and np.issubdtype(feature.np_dtype, np.integer)


def _class_names(info, key: str | None, asked: int | None) -> tuple[str, ...]:
    if key is None:
        return ('',)
    feature = info.features[key]
    if isinstance(feature, tfds.features.ClassLabel):
        return tuple(feature.names or map(str, range(feature.num_classes)))
    if asked is None:
        raise UserError(f'{info.full_name} has plain numbers as labels: say how many classes there are, e.g. '
                        '--config.data.num_classes=10')
    return tuple(map(str, range(asked)))
