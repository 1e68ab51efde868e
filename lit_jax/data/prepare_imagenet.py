"""Writes ImageNet 2012 as a tfds data set in ArrayRecord from the two tar files of image-net.org.

    python -m lit_jax.data.prepare_imagenet --archives=FOLDER_OF_THE_TARS --data_dir=FOLDER

Needs no TensorFlow, unlike tfds' own builder. Same name, features, labels and splits as tfds' `imagenet2012`
5.1.0, but examples keep the order of the archives, and images their original bytes (tfds re-encodes 22 CMYK
images and one PNG). Free space needed in FOLDER: 156 GB. Unfinished data is removed by the next run.
"""
import io
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds

from lit_jax.data.sources import default_data_dir
from lit_jax.runtime import cli
from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.options import option, parse_options

ARCHIVES = {'train': 'ILSVRC2012_img_train.tar', 'validation': 'ILSVRC2012_img_val.tar'}
COUNTS = {'train': 1_281_167, 'validation': 50_000}
VERSION = '5.1.0'
_SHARD = 1252  # examples per file: 1024 files of 140 MB for the training split
_LABELS = 'datasets/imagenet2012/labels.txt'  # synsets in label order; both files are part of tfds
_VALIDATION_LABELS = 'datasets/imagenet2012/validation_labels.txt'  # sorted by file name


def prepare_imagenet(archives: Path, data_dir: Path, counts: dict[str, int] = COUNTS) -> Path:
    """Writes the data set unless it exists. UserError for bad archives or too little space."""
    folder = data_dir / 'imagenet2012' / VERSION
    if folder.exists():
        print(f'{folder} already exists')
        return folder
    _check_archives(archives)
    unfinished = folder.with_name(f'{VERSION}.incomplete')
    shutil.rmtree(unfinished, ignore_errors=True)
    _check_space(archives, data_dir)
    unfinished.mkdir(parents=True)
    try:
        found = _write(archives, unfinished, counts)
    except (tarfile.TarError, LookupError) as error:
        raise UserError(f'an archive in {archives} is incomplete: {reason_of(error)}. Download it '
                        'again') from error
    if found != counts:
        raise UserError(f'the archives in {archives} have {found} images, expected {counts}. Download them '
                        'again')
    os.replace(unfinished, folder)
    return folder


def synsets() -> list[str]:
    """The 1000 class names in label order: 'n01440764', ..."""
    return _lines(_LABELS)


def _check_archives(archives: Path) -> None:
    if missing := [name for name in ARCHIVES.values() if not (archives / name).is_file()]:
        raise UserError(f'{archives} lacks {" and ".join(missing)}. Register at https://image-net.org, '
                        'download the archives of ILSVRC 2012 for tasks 1 and 2, and give their folder with '
                        '--archives=FOLDER; do not unpack them')


def _check_space(archives: Path, data_dir: Path) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data_dir).free
    needed = sum((archives / name).stat().st_size for name in ARCHIVES.values())
    if free < needed:
        raise UserError(f'{data_dir} has {free / 1e9:.1f} GB free and needs {needed / 1e9:.1f}. Free some, '
                        'or name another place with --data_dir=FOLDER')


def _write(archives: Path, folder: Path, counts: dict[str, int]) -> dict[str, int]:
    """Writes both splits into `folder`; returns their numbers of examples."""
    features = tfds.features.FeaturesDict({
        'image': tfds.features.Image(encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(names=synsets()),
        'file_name': tfds.features.Text()})
    identity = tfds.core.DatasetIdentity(name='imagenet2012', version=tfds.core.Version(VERSION),
                                         data_dir=str(folder), module_name=__name__)
    info = tfds.core.DatasetInfo(builder=identity, features=features, homepage='https://image-net.org/',
                                 description='ILSVRC 2012 from its archives, with the original image bytes.')
    writer = tfds.core.SequentialWriter(info, _SHARD, file_format='array_record')
    writer.initialize_splits(list(ARCHIVES))
    found = dict.fromkeys(ARCHIVES, 0)
    start = time.monotonic()
    for split, blocks in (('train', _train_blocks), ('validation', _validation_blocks)):
        for block in blocks(archives / ARCHIVES[split]):
            writer.add_examples({split: block})
            found[split] += len(block)
            _show_progress(sum(found.values()), sum(counts.values()), time.monotonic() - start)
    writer.close_all()
    print(f'{sum(found.values()):,} images written in {(time.monotonic() - start) / 60:.0f} min')
    return found


def _train_blocks(path: Path) -> Iterator[list[dict]]:
    """The examples of each synset; the archive has an archive for each, with its name."""
    for synset_tar, data in _members(path):
        yield [_example(name, image, Path(synset_tar).stem) for name, image in _members(io.BytesIO(data))]


def _validation_blocks(path: Path) -> Iterator[list[dict]]:
    with tarfile.open(path, 'r:') as archive:
        names = sorted(Path(member.name).name for member in archive if member.isfile())
    labels = dict(zip(names, _lines(_VALIDATION_LABELS), strict=False))
    block = []
    for name, image in _members(path):
        block.append(_example(name, image, labels[name]))
        if len(block) == 1000:
            yield block
            block = []
    yield block


def _example(name: str, image: bytes, synset: str) -> dict:
    return {'image': io.BytesIO(image), 'label': synset, 'file_name': name}


def _lines(resource: str) -> list[str]:
    return tfds.core.tfds_path(resource).read_text().split()


def _members(archive: Path | io.BytesIO) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of an uncompressed tar in order, read once."""
    opened = {'name': archive} if isinstance(archive, Path) else {'fileobj': archive}
    with tarfile.open(mode='r|', **opened) as tar:
        for member in tar:
            if member.isfile():
                yield Path(member.name).name, tar.extractfile(member).read()


def _show_progress(done: int, count: int, seconds: float) -> None:
    if not sys.stdout.isatty():
        return
    left = seconds / done * max(count - done, 0)
    rate = done / max(seconds, 1e-9)
    print(f'{done:,} of {count:,} images, {rate:,.0f} a second, {left / 60:.0f} min left  ',
          end='\r' if done < count else '\n', flush=True)


@dataclass(frozen=True)
class ImagenetOptions:
    archives: Path = option('folder of the two tar files')
    data_dir: Path | None = option('folder of the data sets (default: $LIT_JAX_DATA, else '
                                    '~/.cache/lit_jax/datasets)', default=None)


def main() -> int:
    options = parse_options(ImagenetOptions, prog='python -m lit_jax.data.prepare_imagenet',
                            description=__doc__)
    folder = options.data_dir or default_data_dir()
    print(f'{prepare_imagenet(options.archives.expanduser(), folder.expanduser())} is ready')
    return 0


if __name__ == '__main__':
    cli.run(main)
