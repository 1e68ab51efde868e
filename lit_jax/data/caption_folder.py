"""A folder of images with captions as a source.

    images/a.jpg, images/a.txt, images/more/b.png, images/more/b.txt    captions beside the images
    images/captions.jsonl                                               or all captions in one file
    images/train/..., images/held_out/...                               two splits, each as above

A line of captions.jsonl is {"image": "more/b.png", "short": "...", "long": "..."}, or has one "caption";
Hugging Face's metadata.jsonl with "file_name" and "text" works too. All captions are read when the folder is
opened; for many thousand images tar shards open faster (lit_jax/data/tar_shards.py)."""
import hashlib
import json
import os

from lit_jax.data.captions import CaptionedImages, check_pairs, record_captions
from lit_jax.data.folder import SUFFIXES, read_image, suffix_of, visible_files
from lit_jax.data.image_sizes import keep_known, read_sizes
from lit_jax.data.same_names import match_names
from lit_jax.runtime.errors import UserError, reason_of, shown, shown_name
from lit_jax.runtime.json_file import parse_json, read_lines
from lit_jax.runtime.paths import explain_unreadable
from lit_jax.runtime.read_ahead import read_all

LISTS = ('captions.jsonl', 'metadata.jsonl')
IMAGE_FIELDS = ('image', 'file_name')
_THREADS = 16


class CaptionFolder(CaptionedImages):
    """Opened by `open_caption_folder`; `files` are relative to `root`, `texts` their captions."""

    def __init__(self, root, files: list[str], texts: list[tuple[str, ...]], image_size: int, **options):
        super().__init__(image_size, **options)
        self.root, self.files, self.texts = root, files, texts

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self.root / self.files[index]
        return read_image(path), index, os.fspath(path)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.texts[index]

    @property
    def identity(self) -> dict:
        text = json.dumps([self.files, self.texts])
        return {'name': 'captions', 'count': len(self.files),
                'sha256': hashlib.sha256(text.encode()).hexdigest()}


def open_caption_folder(root, *, image_size: int, table: tuple = (), strict: bool = False) -> CaptionFolder:
    """The images with captions below a folder. Arguments as of `CaptionedImages`.

    Raises UserError for a broken line of captions.jsonl, an image listed twice, two images with one caption
    file, and if no pair is left; with `strict` also for images and captions that have no partner."""
    files = list(visible_files(root))
    images = sorted(file for file in files if suffix_of(file) in SUFFIXES)
    lists = [name for name in LISTS if name in files]
    if len(lists) > 1:
        raise UserError(f'{root} has both {" and ".join(lists)}; keep one of them')
    if lists:
        listed = _read_list(root / lists[0])
        pairs = match_names(images, listed)
        captions = {image: listed[name] for image, name in pairs.items()}
        orphans = sorted(listed.keys() - set(pairs.values()))
    else:
        captions, orphans = _read_files(root, images, files)
    kept = [file for file in images if captions.get(file)]
    check_pairs(root, len(kept), alone=[file for file in images if file not in captions], orphans=orphans,
                empty=[file for file in images if captions.get(file) == ()], strict=strict)
    sizes = None
    if table:
        sizes = read_sizes(root, kept)
        known = keep_known(sizes, kept.__getitem__, root, strict)
        kept, sizes = [kept[i] for i in known], sizes[known]
    return CaptionFolder(root, kept, [captions[file] for file in kept], image_size, sizes=sizes, table=table,
                         strict=strict)


def _read_list(path) -> dict[str, tuple[str, ...]]:
    """{image: its captions} of a captions.jsonl."""
    captions, lines = {}, {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        place = f'line {number} of {path}'
        record = parse_json(line, place)
        fields = record if isinstance(record, dict) else {}
        image = next((fields[name] for name in IMAGE_FIELDS if name in fields), None)
        if not isinstance(image, str):
            raise UserError(f'{place} does not say which image it is of; expected {{"image": "a.jpg", '
                            f'"caption": "..."}}: {shown(line)}')
        image = image.replace('\\', '/').removeprefix('./')
        if image in lines:
            raise UserError(f'lines {lines[image]} and {number} of {path} are both of {shown_name(image)}; '
                            'give an image one line, with a "short" and a "long" caption')
        lines[image] = number
        try:
            captions[image] = record_captions(record)
        except ValueError as error:
            raise UserError(f'{place}: {reason_of(error)}') from error
    return captions


def _read_files(root, images: list[str], files: list[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """({image: its captions}, caption files without an image) where each image has a .txt beside it."""
    texts = {file[:-4]: file for file in files if suffix_of(file) == '.txt'}
    of: dict[str, str] = {}
    for image in images:
        stem = image[:-len(suffix_of(image))]
        if stem in of and stem in texts:
            raise UserError(f'{root}: {shown_name(of[stem])} and {shown_name(image)} share one caption file; '
                            'rename one of them and give each its own')
        of[stem] = image
    pairs = match_names(of, texts)
    found = read_all(lambda stem: _read_text(root / texts[stem]).strip(), pairs.values(), _THREADS)
    captions = {of[stem]: (text,) if text else () for stem, text in zip(pairs, found, strict=True)}
    return captions, sorted(texts[stem] for stem in texts.keys() - set(pairs.values()))


def _read_text(path) -> str:
    with explain_unreadable(path):
        data = path.read_bytes()
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not text in UTF-8 (byte {error.start}); convert it') from error
