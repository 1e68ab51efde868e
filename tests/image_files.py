"""Makes images, encoded ones, folders of them and damaged ones, for the tests of the sources."""
import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, mode: str = 'RGB', seed: int = 0) -> Image.Image:
    """An image with coarse and fine structure in any mode."""
    rng = np.random.default_rng((seed, width, height))
    coarse = rng.integers(0, 196, (5, 7, 3), dtype=np.uint8)
    coarse = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
    image = Image.fromarray(coarse + rng.integers(0, 60, (height, width, 3), dtype=np.uint8))
    if mode == 'RGB':
        return image
    if mode == 'RGBA':
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(root: Path, **files: bytes | None) -> Path:
    """write_folder(root, **{'cat/a.png': bytes}); the content None writes a small image of its own."""
    for seed, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(12, 10, seed=seed)) if content is None else content)
    return root
