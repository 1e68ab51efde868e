"""Folders and tar shards of images with captions, and a tokenizer of letters, for the tests of captions."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from image_files import encoded, noise

from lit_jax.text.tokenizer import Tokens


class Letters:
    """Each letter a token (its code point), then the end token 1."""

    def encode(self, captions, length):
        ids, mask = np.zeros((2, len(captions), length), np.int32)
        for row, caption in enumerate(captions):
            codes = [*map(ord, caption)][:length - 1] + [1]
            ids[row, :len(codes)], mask[row, :len(codes)] = codes, 1
        return Tokens(ids, mask, [row for row, caption in enumerate(captions) if len(caption) >= length])


def spell(ids) -> str:
    """The caption that Letters made tokens of."""
    return ''.join(chr(code) for code in ids if code > 1)


def image(width: int = 12, height: int = 10, seed: int = 0) -> bytes:
    return encoded(noise(width, height, seed=seed))


def write_captions(root: Path, **files: str | bytes) -> Path:
    """write_captions(root, **{'a.png': bytes, 'a.txt': 'a caption'})."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def lines(*records: dict) -> str:
    return ''.join(json.dumps(record) + '\n' for record in records)


def write_tar(path: Path, format: int = tarfile.PAX_FORMAT, **members: str | bytes) -> Path:
    """write_tar(path, **{'0.jpg': bytes, '0.txt': 'a caption'})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=format) as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
