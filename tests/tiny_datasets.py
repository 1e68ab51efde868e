"""Writes small tfds data sets of any features, as a test wants them; a module because tfds wants builders in
one."""
import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from image_files import encoded, noise


def image(seed: int, kind: str = 'JPEG', mode: str = 'RGB') -> io.BytesIO:
    return io.BytesIO(encoded(noise(20 + seed, 18, mode, seed), kind))


def build(data_dir, name: str, features: dict, splits: dict[str, list[dict]], *, version: str = '1.0.0',
          config: str = '') -> Path:
    """Writes the examples of each split in their order as data set `name`; the folder of its version."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                         disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    Tiny.name = name
    builder = Tiny(data_dir=data_dir, file_format='array_record')
    tfds.disable_progress_bar()
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_path)


def shapes(data_dir, **options) -> Path:
    """Data set `shapes`: circle and square, with boxes and file names; 5 to train, 3 to validate, 2 to
    test."""
    features = {'image': tfds.features.Image(encoding_format='jpeg'),
                'label': tfds.features.ClassLabel(names=['circle', 'square']),
                'file_name': tfds.features.Text(),
                'boxes': tfds.features.Sequence({'box': tfds.features.BBoxFeature()})}
    box = {'box': tfds.features.BBox(0.0, 0.0, 1.0, 1.0)}

    def examples(start, count):
        return [{'image': image(i), 'label': i % 2, 'file_name': f'{i}.jpg', 'boxes': [box] * (i % 3)}
                for i in range(start, start + count)]

    splits = {'train': examples(0, 5), 'test': examples(20, 2), 'validation': examples(10, 3)}
    return build(data_dir, 'shapes', features, splits, **options)


def numbered(label: int) -> list[dict]:
    return [{'image': image(1, 'PNG'), 'label': np.int64(label)}]
