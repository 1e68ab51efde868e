"""Real handwritten digits, 8x8 grey, ten classes: the data of the demo. No download, no TensorFlow.

Written once as a tfds data set (ArrayRecord) into the cache folder, then read into memory (0.5 MB)."""
import contextlib
import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from lit_jax.data.base import ArraySource, Spec
from lit_jax.data.toys.digits_builder import CLASSES, COUNT, HELD_OUT_COUNT, SIZE, Digits
from lit_jax.runtime.errors import UserError, reason_of, shown
from lit_jax.runtime.paths import as_path

LOG = logging.getLogger('lit_jax')
SPLITS = {'train': COUNT - HELD_OUT_COUNT, 'held_out': HELD_OUT_COUNT}
SPEC = Spec(image_size=SIZE, channels=1, num_classes=CLASSES,
            class_names=tuple(str(i) for i in range(CLASSES)))
# sha256 over the uint8 pixels and labels of a split by original number: damage, or another edition of the
# data, would otherwise silently change every result.
DIGESTS = {'train': 'd425623ab28f506ade601d6eb0712d2efd1ac5a1894f671afe05d4a9f2ba48af',
           'held_out': '5be09a53ab566593a242126237dbdaa9e4d28dac0f7831dcd91ace6faa2e8ccc'}


def open_digits(split: str, data_dir: Path) -> ArraySource:
    """Images float32 [8, 8, 1] = pixels / 8 - 1 in [-1, 1], labels 0..9. Writes the cache if needed.

    Several processes may start together: the first to finish renames its files, and the others read these.
    Raises UserError if the folder cannot be written, or has other or damaged files."""
    if split not in SPLITS:
        raise UserError(f'digits has no split {shown(split)}; known: {", ".join(SPLITS)}')
    builder = _prepare(as_path(data_dir))
    pixels, labels = _read(builder, split)
    return ArraySource(SPEC, pixels.astype(np.float32) / 8 - 1, labels)


def _prepare(data_dir: Path) -> Digits:
    """The builder of the data set, which is written if needed."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        builder = Digits(data_dir=data_dir, file_format='array_record')
        if builder.data_path.exists():
            return builder
        LOG.info('writing the digits data set to %s', builder.data_path)
        _write(builder)
    except OSError as error:
        raise UserError(f'cannot write the digits data set into {data_dir}: {reason_of(error)}. It needs a '
                        f'writable '
                        'folder with 1 MB free: name one with --config.data.path=FOLDER or in the '
                        'environment variable LIT_JAX_DATA') from error
    return Digits(data_dir=data_dir, file_format='array_record')  # reads what is on disk, whoever wrote it


def _write(builder: Digits) -> None:
    """Writes the data set, whole or not at all, unless another process does so first."""
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints that it downloads, which it does not
            builder.download_and_prepare(download_config=config)
    except OSError:
        # tfds renames a finished folder, which fails if another process was first; theirs is as good.
        if not builder.data_path.exists():
            raise


def _read(builder: Digits, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, 8, 8, 1], int32 [n]) in the order of the original numbers, checked against the digest."""
    try:
        source = builder.as_data_source(split)
        examples = sorted((source[i] for i in range(len(source))), key=lambda example: example['number'])
        pixels = np.stack([example['image'] for example in examples])
        labels = np.array([example['label'] for example in examples], np.int32)
        digest = digest_of(pixels, labels)
    except (OSError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        raise _damaged(builder, split, reason_of(error)) from error
    if digest != DIGESTS[split]:
        raise _damaged(builder, split, f'{len(labels)} images with sha256 {digest[:12]}, expected '
                                       f'{SPLITS[split]} with {DIGESTS[split][:12]}')
    return pixels, labels


def digest_of(pixels: np.ndarray, labels: np.ndarray) -> str:
    """sha256 of uint8 pixels and labels (as little-endian int32)."""
    return hashlib.sha256(pixels.astype(np.uint8).tobytes() + labels.astype('<i4').tobytes()).hexdigest()


def _damaged(builder: Digits, split: str, found: str) -> UserError:
    return UserError(f'the digits data set in {builder.data_path} is damaged (split {shown(split)}: '
                     f'{found}). '
                     f'Delete it and start again, it is written anew: rm -r {builder.data_path}')
