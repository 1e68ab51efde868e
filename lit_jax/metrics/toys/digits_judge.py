"""A small classifier of real digits, 8x8 or 28x28: it classifies samples, and its features measure them.

Three 3x3 convolutions (32, 64, 64 channels; the last two halve the grid) and a layer of 48 units, whose GELU
outputs are the features for the Fréchet distance, scaled so that the training split has mean variance 1. A
linear layer gives the class. Trained on the real training split with shifts, noise and dropout, so that
held-out digits get similar features; equal images and seed give the same judge on the same machine.

Images are float32 [N, S, S, 1] in [-1, 1], S of the images that the judge was trained on, a multiple of 4.
The judge of MNIST ships, so that distances of several machines compare: assets/mnist_judge.npz, made by

    python -m lit_jax.metrics.toys.digits_judge --out assets/mnist_judge.npz
"""
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lit_jax.data.toys.mnist import open_mnist
from lit_jax.metrics.frechet import frechet_distance, statistics
from lit_jax.metrics.kernel import kernel_distance
from lit_jax.runtime import cli
from lit_jax.runtime.errors import UserError, reason_of
from lit_jax.runtime.npz_reader import Npz
from lit_jax.runtime.options import option, parse_options
from lit_jax.runtime.shipped import find_asset

Array = jax.Array
IMAGE = (8, 8, 1)      # of the smaller digits
CLASSES = 10
CHANNELS, FEATURES = 64, 48
MNIST = 'mnist_judge.npz'
_NONE = np.eye(2, FEATURES, dtype=np.float32)      # no features yet

STEPS = 600
BATCH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
NOISE = 0.1           # standard deviation added to training images, whose range is 2
DROPOUT = 0.2         # of the features, before the last layer
CHUNK = 500           # images per call of the jitted network


class Judge:
    """A trained classifier."""

    def __init__(self, params: dict, feature_scale: float, reference: np.ndarray):
        """`reference`: features [N, 48] of the real training split, for comparison."""
        self.params, self.feature_scale, self.reference = params, float(feature_scale), reference
        self._statistics = statistics(reference)

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of its images."""
        return _image_of(self.params['dense'].shape[0])

    def features(self, images) -> np.ndarray:
        """[N, S, S, 1] -> float32 [N, 48], scaled."""
        return self._run(images)[0] * np.float32(self.feature_scale)

    def predict(self, images) -> np.ndarray:
        """[N, S, S, 1] -> class indices, int32 [N]."""
        return self._run(images)[1].argmax(-1).astype(np.int32)

    def accuracy(self, images, labels) -> float:
        """The share of images whose predicted class is that of `labels` [N]."""
        return float((self.predict(images) == np.asarray(labels)).mean())

    def distance(self, images) -> float:
        """Fréchet distance to the real training split; that of held-out real digits is the lower bound."""
        return frechet_distance(statistics(self.features(images)), self._statistics)

    def kernel_distance(self, images) -> float:
        """KID to the real training split: unlike the Fréchet distance unbiased, whatever the count."""
        return kernel_distance(self.features(images), self.reference)[0]

    def save(self, path: str | Path, reference: bool = True) -> None:
        """Writes one .npz of arrays. reference: False leaves those features out, see `load_judge`."""
        np.savez(path, feature_scale=np.float64(self.feature_scale),
                 **({'reference': self.reference} if reference else {}),
                 **{f'params/{name}': np.asarray(leaf) for name, leaf in self.params.items()})

    def _run(self, images) -> tuple[np.ndarray, np.ndarray]:
        images = _check_images(images, self.image)
        parts = [_jitted_network(self.params, images[i:i + CHUNK]) for i in range(0, len(images), CHUNK)]
        return tuple(np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))


def train_judge(train_images, train_labels, seed: int = 0, steps: int = STEPS) -> Judge:
    """Trains a judge on real images [N, S, S, 1] and labels [N]: ten seconds for 8x8 on two cores, three
    minutes for 28x28."""
    images, labels = _check_images(train_images), np.asarray(train_labels, np.int32)
    if labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UserError(f'labels must be {len(images)} class indices 0..{CLASSES - 1}, one an image; '
                        f'got shape {labels.shape}, values {labels.min()}..{labels.max()}')
    params = _train(_init(seed, images.shape[1:]), jnp.asarray(images), jnp.asarray(labels),
                    jax.random.key(seed), steps)
    params = {name: np.asarray(leaf) for name, leaf in params.items()}
    raw = Judge(params, 1.0, _NONE).features(images)
    scale = 1 / np.sqrt(np.var(raw, axis=0, ddof=1, dtype=np.float64).mean())
    return Judge(params, scale, raw * np.float32(scale))


def open_mnist_judge() -> Judge:
    """The judge of MNIST that ships."""
    return load_judge(find_asset(MNIST), open_mnist('train').images)


def load_judge(path: str | Path, train_images=None) -> Judge:
    """Reads a file of `Judge.save`. UserError if it is missing or something else.

    train_images: real training images, from which features are made that a file was saved without."""
    try:
        with Npz(path) as file:
            arrays = {name: file.array(name) for name in file.names}
        params = {name: arrays[f'params/{name}'] for name in _shapes()}
        scale, image = float(arrays['feature_scale']), _image_of(len(params['dense']))
        wrong = {name: leaf.shape for name, leaf in params.items() if leaf.shape != _shapes(image)[name]}
        if 'reference' not in arrays and train_images is not None and not wrong:
            arrays['reference'] = Judge(params, scale, _NONE).features(train_images)
        judge = Judge(params, scale, arrays['reference'])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is not a saved judge ({reason_of(error)}); '
                        'delete it, the next run trains it anew') from error
    if wrong:
        raise UserError(f'{path} has a judge of another shape ({wrong}); delete it, the next run trains it '
                        'anew')
    return judge


def _image_of(inputs: int) -> tuple[int, int, int]:
    """The shape of the images of a judge whose layer `dense` has so many inputs."""
    side = 4 * round((inputs / CHANNELS) ** 0.5)
    return side, side, 1


def _shapes(image: tuple[int, ...] = IMAGE) -> dict[str, tuple[int, ...]]:
    inputs = image[0] // 4 * (image[1] // 4) * CHANNELS
    return {'conv1': (3, 3, 1, 32), 'conv1_bias': (32,), 'conv2': (3, 3, 32, 64), 'conv2_bias': (64,),
            'conv3': (3, 3, 64, CHANNELS), 'conv3_bias': (CHANNELS,), 'dense': (inputs, FEATURES),
            'dense_bias': (FEATURES,), 'head': (FEATURES, CLASSES), 'head_bias': (CLASSES,)}


def _init(seed: int, image: tuple[int, ...]) -> dict:
    """He-normal kernels, zero biases."""
    rng = np.random.default_rng(seed)
    return {name: np.zeros(shape, np.float32) if name.endswith('bias') else
            rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape).astype(np.float32)
            for name, shape in _shapes(image).items()}


def network(params: dict, x_BHWC: Array, keep_BF: Array | None = None) -> tuple[Array, Array]:
    """(features [B, 48] before scaling, logits [B, 10]); `keep_BF` multiplies the input of the head."""
    x = x_BHWC
    for name, stride in (('conv1', 1), ('conv2', 2), ('conv3', 2)):
        x = jax.nn.gelu(_conv3x3(x, params[name], stride) + params[f'{name}_bias'])
    features = jax.nn.gelu(x.reshape(len(x), -1) @ params['dense'] + params['dense_bias'])
    seen = features if keep_BF is None else features * keep_BF
    return features, seen @ params['head'] + params['head_bias']


_jitted_network = jax.jit(network)


def _conv3x3(x_BHWC: Array, kernel: Array, stride: int) -> Array:
    """A 3x3 convolution padded by 1, as a matrix product: 50 times faster than XLA's in a loop on CPU."""
    _, h, w, _ = x_BHWC.shape
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i:i + h:stride, j:j + w:stride] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(taps, axis=-1)
    y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*patches.shape[:3], -1)


def _augment(key: Array, images: Array) -> Array:
    """Each image shifted by -1, 0 or 1 pixel each way (background moves in), plus Gaussian noise."""
    shift_key, noise_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    offsets = jax.random.randint(shift_key, (len(images), 2), 0, 3)
    cut = jax.vmap(lambda image, o: jax.lax.dynamic_slice(image, (o[0], o[1], 0), images.shape[1:]))
    shifted = cut(padded, offsets)
    return shifted + NOISE * jax.random.normal(noise_key, images.shape)


@jax.jit
def _train(params: dict, images: Array, labels: Array, key: Array, steps: Array) -> dict:
    """AdamW with a cosine schedule from LEARNING_RATE to 0, random batches, in one loop on the device."""
    optimizer = optax.adamw(lambda count: LEARNING_RATE * (1 + jnp.cos(jnp.pi * count / steps)) / 2,
                            weight_decay=WEIGHT_DECAY)

    def loss(params, key):
        pick_key, augment_key, dropout_key = jax.random.split(key, 3)
        pick = jax.random.randint(pick_key, (BATCH,), 0, len(images))
        keep = jax.random.bernoulli(dropout_key, 1 - DROPOUT, (BATCH, FEATURES)) / (1 - DROPOUT)
        logits = network(params, _augment(augment_key, images[pick]), keep)[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[pick]).mean()

    def step(i, carry):
        params, opt = carry
        updates, opt = optimizer.update(jax.grad(loss)(params, jax.random.fold_in(key, i)), opt, params)
        return optax.apply_updates(params, updates), opt

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]


def _check_images(images, image: tuple[int, ...] | None = None) -> np.ndarray:
    images = np.asarray(images, np.float32)
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[1] % 4 == 0
    if not (square and len(images) and images.shape[1:] == (image or (*images.shape[1:3], 1))):
        expected = '[N, {0}, {0}, 1]'.format(image[0]) if image else '[N, S, S, 1], S a multiple of 4,'
        raise UserError(f'the judge takes images {expected} in [-1, 1] (NHWC), got shape {images.shape}')
    return images


@dataclass(frozen=True)
class _Options:
    out: Path = option('file to write')


def main() -> None:
    """Trains the judge of MNIST."""
    options = parse_options(_Options, prog='python -m lit_jax.metrics.toys.digits_judge', description=__doc__)
    train, held_out = open_mnist('train'), open_mnist('held_out')
    judge = train_judge(train.images, train.labels)
    judge.save(options.out, reference=False)
    print(f'accuracy on {len(held_out):,} held-out digits: '
          f'{judge.accuracy(held_out.images, held_out.labels):.4f}')


if __name__ == '__main__':
    cli.run(main)
