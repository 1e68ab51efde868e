"""Measures images per second from disk to batches, and the cores that feed one accelerator.

    python -m benchmarks.input                                    # about a minute
    python -m benchmarks.input --step_ms 120 --markdown input.md
    python -m benchmarks.input --folder my/images --threads 1,8,16

JPEG: a folder, or scikit-learn's photographs cropped to 500x375 pixels and encoded to about 110 kB, like
ImageNet's; read, decoded, cropped to 256, mirrored at random and batched by the pipeline of training.
Latents: a set as of prepare_latents.py (float32 moments of image and mirror image, 66 kB at 256 pixels), one
of the two chosen at random. All files fit into the page cache: this measures the processor, not the disk.
"""
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import make_parser
from lit_jax.data import latent_shards, latents
from lit_jax.data.augment import random_flip
from lit_jax.data.base import Source
from lit_jax.data.crop import center_crop
from lit_jax.data.images import decode, to_float
from lit_jax.data.pipeline import make_pipeline
from lit_jax.data.sources import open_source
from lit_jax.latents.prepare import make_metadata

QUALITY = 97  # gives files of about 100 kB


def parse_arguments():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    parser = make_parser(__doc__)
    parser.add_argument('--folder', default='', help='images to read instead of those made here')
    parser.add_argument('--image_size', type=int, default=256)
    parser.add_argument('--batch', type=int, default=64, help='images per batch')
    parser.add_argument('--threads', type=numbers, default=sorted({1, cores}),
                        help='of the pipeline (default: 1 and all cores)')
    parser.add_argument('--seconds', type=float, default=5.0, help='length of one measurement')
    parser.add_argument('--turns', type=int, default=3,
                        help='measurements of each line; the fastest is shown')
    parser.add_argument('--step_ms', type=numbers, default=[50, 100, 200, 400],
                        help='step times for the table of needs')
    parser.add_argument('--markdown', default='', help='also write the tables to this file')
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(',')]


def write_jpegs(folder: Path, count: int = 128) -> None:
    """Writes photographs of ImageNet's usual size: random crops of the two in scikit-learn."""
    from sklearn.datasets import load_sample_images
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(photos[number % len(photos)])
        left, top = int(rng.integers(0, image.width - 500)), int(rng.integers(0, image.height - 375))
        path = folder / f'class_{number % 4}' / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + 500, top + 375)).save(path, quality=QUALITY)


def write_latents(folder: Path, image_size: int, count: int = 2048) -> None:
    """Writes a set as prepare_latents.py does for an SD VAE, with random moments."""
    plan = {'format': 1, 'kind': 'latents', 'image_size': image_size, 'latent_size': image_size // 8,
            'dtype': 'float32',
            'vae': {'id': 'random', 'sha256': '', 'scale': 0.18215, 'shift': 0.0, 'downscale': 8,
                    'channels': 4},
            'classes': ['one'], 'source': {'name': 'random', 'count': count, 'split': 'train'},
            'crop': 'none', 'shard_size': latent_shards.default_shard_size(count)}
    (folder / latents.SHARDS).mkdir(parents=True)
    rng, notes = np.random.default_rng(0), []
    for number, indices in enumerate(latent_shards.shard_ranges(plan)):
        with latent_shards.ShardWriter(folder, number, plan) as writer:
            for _ in indices:
                writer.add(rng.standard_normal((2, *[image_size // 8] * 2, 8), np.float32), 0)
            notes.append(writer.commit())
    (folder / latents.METADATA).write_text(json.dumps(make_metadata(plan, notes)))


def images_per_second(source: Source, *, batch: int, threads: int, seconds: float, augment=None) -> float:
    """Throughput of the pipeline, without the batches that were read ahead."""
    pipeline = make_pipeline(source, global_batch=batch, seed=0, augment=augment, threads=threads,
                             prefetch=threads)
    with iter(pipeline) as batches:
        for _ in range(threads + 1):     # read ahead before the start
            next(batches)
        start, count = time.perf_counter(), 0
        while count < threads or time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        return count * batch / (time.perf_counter() - start)


def stages(source, size: int, seconds: float) -> list[tuple[str, float]]:
    """(stage, milliseconds per image) with one thread, without the pipeline."""
    data = [source.read(i)[0] for i in range(min(len(source), 64))]
    images = [decode(item) for item in data]
    pixels = [center_crop(image, size) for image in images]
    steps = [('read', lambda i: source.read(i)), ('decode', lambda i: decode(data[i])),
             ('crop', lambda i: center_crop(images[i], size)), ('to float', lambda i: to_float(pixels[i]))]
    return [(name, 1e3 * shortest_time(call, len(data), seconds / len(steps))) for name, call in steps]


def shortest_time(call, count: int, seconds: float) -> float:
    """Mean seconds per example in the fastest round, which other load on the machine affects least."""
    rounds, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or not rounds:
        start = time.perf_counter()
        for i in range(count):
            call(i)
        rounds.append((time.perf_counter() - start) / count)
    return min(rounds)


def speeds(sources: dict, arguments) -> dict[tuple[str, int], float]:
    """{(name, threads): images per second}; the sources take turns, so other load affects all alike."""
    seen: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.turns):
        for threads in arguments.threads:
            for name, (source, augment) in sources.items():
                seen.setdefault((name, threads), []).append(images_per_second(
                    source, batch=arguments.batch, threads=threads,
                    seconds=arguments.seconds / arguments.turns, augment=augment))
    return {key: max(values) for key, values in seen.items()}


def speed_table(measured: dict[tuple[str, int], float], names: list[str], threads: list[int]) -> list[str]:
    lines = [f'| threads | {" | ".join(f"{name}, images/s" for name in names)} | latents / JPEG |',
             '|---' * (len(names) + 2) + '|']
    for count in threads:
        row = [measured[name, count] for name in names]
        lines.append(f'| {count} | {" | ".join(f"{value:,.0f}" for value in row)} | {row[1] / row[0]:.0f} |')
    return lines


def need_table(one_core: dict[str, float], step_ms: list[int], batch: int = 256) -> list[str]:
    """Cores that feed one accelerator, from the images per second of one core."""
    lines = [f'| step of {batch} images | images/s | {" | ".join(f"cores for {name}" for name in one_core)} '
             '|',
             '|---' * (len(one_core) + 2) + '|']
    for milliseconds in step_ms:
        needed = batch / milliseconds * 1e3
        cores = ' | '.join(f'{needed / speed:.1f}' for speed in one_core.values())
        lines.append(f'| {milliseconds} ms | {needed:,.0f} | {cores} |')
    return lines


def describe(arguments, source) -> str:
    sizes = [len(source.read(i)[0]) for i in range(min(len(source), 64))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    packages = ', '.join(f'{name} {version(name)}' for name in ('pillow', 'numpy', 'grain', 'array_record'))
    return (f'{cores} cores; Python {platform.python_version()}, {packages}. JPEG: {len(source)} images of '
            f'{statistics.mean(sizes) / 1e3:.0f} kB, crop {arguments.image_size}; batches of '
            f'{arguments.batch}; the fastest of {arguments.turns} turns.')


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or f'{temporary}/jpegs')
        if not arguments.folder:
            write_jpegs(folder)
        jpegs = open_source('folder', path=folder, image_size=arguments.image_size)
        write_latents(Path(temporary) / 'latents', arguments.image_size)
        cached = open_source('latents', path=Path(temporary) / 'latents')
        parts = stages(jpegs, arguments.image_size, arguments.seconds)
        measured = speeds({'JPEG': (jpegs, random_flip), 'latents': (cached, latents.choose_mirror)},
                          arguments)
        lines = [describe(arguments, jpegs), '', 'One thread, milliseconds an image: '
                 + ', '.join(f'{name} {value:.2f}' for name, value in parts) + '.', '']
    lines += speed_table(measured, ['JPEG', 'latents'], arguments.threads) + ['']
    fewest = min(arguments.threads)
    lines += need_table({name: measured[name, fewest] / fewest for name in ('JPEG', 'latents')},
                        arguments.step_ms)
    print('\n'.join(lines))
    if arguments.markdown:
        Path(arguments.markdown).write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
