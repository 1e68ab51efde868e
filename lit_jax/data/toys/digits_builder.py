"""tfds builder of scikit-learn's bundled handwritten digits (UCI optical digits, test part).

A module of its own, as tfds requires. Pixels are the original uint8 counts 0..16, which are exact;
`lit_jax.data.toys.digits` turns them into floats."""
import numpy as np
import tensorflow_datasets as tfds

SIZE, CLASSES, COUNT, HELD_OUT_COUNT = 8, 10, 1797, 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """Splits 'train' (1437) and 'held_out' (360), drawn once with a fixed permutation."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'Pixels as uint8 counts 0..16, original number of each image.'}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description='1797 handwritten digits of 8x8 pixels, values 0..16, as bundled with scikit-learn.',
            homepage='https://archive.ics.uci.edu/dataset/80',
            features=tfds.features.FeaturesDict({
                # Tensor, not Image: tfds encodes raw images through TensorFlow, which is not needed here.
                'image': tfds.features.Tensor(shape=(SIZE, SIZE, 1), dtype=np.uint8),
                'label': tfds.features.ClassLabel(num_classes=CLASSES),
                'number': tfds.features.Scalar(dtype=np.int64),
            }))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        held_out, train = split_numbers()
        return {'train': self._generate_examples(train), 'held_out': self._generate_examples(held_out)}

    def _generate_examples(self, numbers: np.ndarray):
        # Takes a second, which only the run that writes should pay.
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        for number in numbers.tolist():
            yield number, {'image': images[number].reshape(SIZE, SIZE, 1).astype(np.uint8),
                           'label': int(labels[number]), 'number': number}


def split_numbers() -> tuple[np.ndarray, np.ndarray]:
    """(held out, train): the original numbers of the images of each split, sorted."""
    order = np.random.default_rng(0).permutation(COUNT)
    return np.sort(order[:HELD_OUT_COUNT]), np.sort(order[HELD_OUT_COUNT:])
