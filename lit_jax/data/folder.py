"""A folder of images as a source.

    images/cat/a.jpg, images/cat/more/b.png, images/dog/c.jpg     classes cat and dog, with deeper folders
    images/a.jpg, images/b.png                                    no classes: label 0, name ''
    images/train/cat/a.jpg, images/held_out/cat/b.jpg             splits (or validation, val, test)

Classes are the subfolders sorted by name, examples the files sorted by class and path, as in torchvision's
ImageFolder. Files without an image suffix are logged and ignored; hidden ones and `__MACOSX` are skipped. The
folder may be in a bucket (gs://), at one request per image."""
import collections
import hashlib
import logging
import os
from collections.abc import Iterator

import numpy as np

from lit_jax.data.base import Spec
from lit_jax.data.images import ImageSource, check_asked
from lit_jax.data.same_names import match_names
from lit_jax.runtime import paths
from lit_jax.runtime.errors import UserError, reason_of, shown, shown_name

LOG = logging.getLogger('lit_jax')
SUFFIXES = frozenset('.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif'.split())
SPLITS = {'train': ('train',), 'held_out': ('held_out', 'validation', 'val', 'test')}


def read_image(path) -> bytes:
    """The bytes of a file of an open folder. UserError where it is gone or cannot be read."""
    with paths.explain_unreadable(path, '. A folder of images must not change while it is in use, and every '
                                        'file in it must be readable'):
        return path.read_bytes()


class FolderSource(ImageSource):
    """Opened by `open_folder`; `files` are relative to `root`, `labels` int32 of the same length."""

    def __init__(self, root, files: list[str], labels: np.ndarray, spec: Spec, *, strict: bool = False):
        super().__init__(spec, strict=strict)
        self.root, self.files, self.labels = root, files, labels

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int, str]:
        path = self.root / self.files[index]
        return read_image(path), int(self.labels[index]), os.fspath(path)

    def all_labels(self) -> np.ndarray:
        return self.labels

    @property
    def identity(self) -> dict:
        text = '\n'.join((*self.spec.class_names, *self.files))
        return {'name': 'folder', 'count': len(self.files), 'classes': self.spec.num_classes,
                'sha256': hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()}


def open_folder(path, *, split: str = 'train', asked: dict, strict: bool = False) -> FolderSource:
    """The images below a folder. `asked`: image_size, channels and num_classes of a recipe, or None.

    Raises UserError if the folder or split is missing, a class is empty, classes are mixed with
    loose images, or the recipe's numbers differ."""
    if split not in SPLITS:
        raise UserError(f'folder has no split {shown(split)}; known: {", ".join(SPLITS)}')
    if not os.fspath(path):
        raise UserError('data.name=folder needs the folder of the images: --config.data.path=FOLDER')
    root = paths.absolute(path)
    base = split_folder(root, split)
    train = base if split == 'train' else split_folder(root, 'train')
    found = _list_images(base)
    names = _class_names(found if base == train else _list_images(train), train)
    own = match_names(names, found)
    if foreign := [name for name in _class_names(found, base) if name not in own.values()]:
        raise UserError(f'{base} has classes that {train} has not: '
                        f'{", ".join(shown_name(name) or "loose images" for name in foreign)}. Remove them')
    size = check_asked(f'the folder {base}', asked, len(names))
    listed = [found.get(own.get(name, name), ()) for name in names]
    files, counts = [file for some in listed for file in some], [len(some) for some in listed]
    labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
    return FolderSource(base, files, labels, Spec(size, 3, len(names), tuple(names)), strict=strict)


def split_folder(root, split: str, *, needed: bool = True):
    """The folder of a split. A folder has splits if all of its subfolders have names of splits.
    needed: whether a missing one is an error; else None is returned."""
    known = {name for names in SPLITS.values() for name in names}
    names = _subfolders(root)
    if 'train' not in names or not known & (names - {'train'}) and names != {'train'}:
        names = set()
    elif names - known:
        raise UserError(f'{root} has splits ({", ".join(sorted(names & known))}) and other folders '
                        f'({", ".join(map(shown_name, sorted(names - known)))}). Give the folder of the '
                        'training images itself, or move the others away')
    if not names and split == 'train':
        return root
    found = next((name for name in SPLITS[split] if name in names), None)
    if found is None and not needed:
        return None
    if found is None:
        raise UserError(f'{root} has no held-out images. Put the training images into {root / "train"} and '
                        f'the others, with the same classes if any, into {root / "held_out"}')
    return root / found


def _subfolders(root) -> set[str]:
    """Names of the visible subfolders of a folder that must exist."""
    paths.check_reachable(root)
    with paths.explain_unreachable(root):
        if root.is_dir():
            try:
                return {entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry.name)}
            except OSError as error:
                raise UserError(f'the folder {root} cannot be read: {reason_of(error)}') from error
        what = 'is a file' if root.exists() else 'does not exist'
    raise UserError(f'{root} {what}; data.path should be a folder of images, or with one folder per class')


def _list_images(base) -> dict[str, list[str]]:
    """{subfolder: its images, sorted; empty ones too, loose images under ''}; paths relative to `base`."""
    found: dict[str, list[str]] = {name: [] for name in ('', *sorted(_subfolders(base)))}
    ignored: collections.Counter[str] = collections.Counter()
    for path in visible_files(base):
        top, slash, _ = path.partition('/')
        suffix = suffix_of(path) or 'without a suffix'
        if suffix in SUFFIXES:
            found[top if slash else ''].append(path)
        else:
            ignored[suffix] += 1
    listed = ', '.join(f'{count} {shown_name(suffix)}' for suffix, count in ignored.most_common(10))
    if not any(found.values()):
        raise UserError(f'there are no images in {base}{f" (other files: {listed})" if ignored else ""}. '
                        f'Known suffixes: {" ".join(sorted(SUFFIXES))}')
    if ignored:
        LOG.info('%s: ignored %d files that are not images: %s', base, ignored.total(), listed)
    return {name: sorted(files) for name, files in found.items()}


def visible_files(base) -> Iterator[str]:
    """Relative paths of all files below a folder, except hidden ones and those in hidden folders."""
    with paths.explain_unreachable(base):
        found = paths.files_under(base) if paths.is_remote(base) else _walk(os.fspath(base))
    return (path for path in found if not any(map(_hidden, path.split('/'))))


def suffix_of(path: str) -> str:
    """'.jpg' of 'a/b.JPG'; '' where there is none."""
    _, dot, suffix = path.rpartition('.')
    return f'.{suffix.lower()}' if dot and '/' not in suffix else ''


def _walk(base: str) -> Iterator[str]:
    """All files below a local folder; links to folders (often classes) are followed, but not in circles."""
    def refuse(error: OSError):
        raise UserError(f'the folder {error.filename} cannot be read: {reason_of(error)}') from error

    for folder, subfolders, names in os.walk(base, onerror=refuse, followlinks=True):
        here = os.path.realpath(folder)
        subfolders[:] = [name for name in subfolders if not _hidden(name)
                         and not f'{here}/'.startswith(os.path.realpath(os.path.join(folder, name)) + '/')]
        prefix = '' if folder == base else os.path.relpath(folder, base).replace(os.sep, '/') + '/'
        yield from (prefix + name for name in names)


def _class_names(found: dict[str, list[str]], base) -> list[str]:
    """Names of the classes in label order; [''] for loose images."""
    filled = sorted(name for name, files in found.items() if files and name)
    if found['']:
        if filled:
            raise UserError(f'{base} has both loose images ({shown_name(found[""][0])}, ...) and folders '
                            f'with images ({shown_name(filled[0])}, ...). Move every image into the folder '
                            'of its class, or all of them out of the folders to train without classes')
        return ['']
    if empty := sorted(name for name, files in found.items() if name and not files):
        raise UserError(f'these classes of {base} have no images: {", ".join(map(shown_name, empty[:10]))}'
                        f'{f" and {len(empty) - 10} more" if len(empty) > 10 else ""}. Fill or delete their '
                        'folders')
    return filled


def _hidden(name: str) -> bool:
    return name.startswith('.') or name == '__MACOSX'
