"""Stores a large set of images in parts that survive an interruption: an ADM .npz, or a folder of PNG files.

    OUT.npz              arr_0 uint8 [N, H, W, 3], arr_1 int64 [N] (labels), as ADM's evaluator reads it
    OUT.json             the recipe card
    OUT.npz.parts/       while it is drawn: card.json and one .npy a part; gone when the set is whole

A part is whole or absent, and made again where its checksum (of a PNG file: those in it) says that it was
damaged later. The bytes of the finished file depend on the images alone, so a run that was interrupted,
however often, ends with the same bytes as one that was not."""
import json
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np

from lit_jax.report.grids import png_mark, save_png
from lit_jax.runtime import storage
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.json_file import SEAL, parse_json, read_lines, sealed
from lit_jax.runtime.npz_file import write_npz
from lit_jax.runtime.npz_reader import Npz, shown_names
from lit_jax.runtime.parts import PartFolder, Parts
from lit_jax.runtime.paths import (
    as_path,
    explain_unreadable,
    explain_unwritable,
    files_under,
    is_remote,
    make_folder,
    remove_tree,
    write_text_atomic,
)
from lit_jax.runtime.read_ahead import read_all
from lit_jax.sampling.card import card_text, check_same_card, read_card

LOG = logging.getLogger('lit_jax')
CARD, LIST = 'card.json', 'prompts.jsonl'
PART = 128               # images of a part, about: the most that an interruption costs each host
_THREADS = 16


def part_size(group: int) -> int:
    """Images of a part: whole groups."""
    return group * math.ceil(PART / group)


class NpzStore(PartFolder):
    """See the module. `shape` is (H, W) of the images."""

    def __init__(self, out, card: dict, labels: np.ndarray, shape: tuple[int, int], size: int):
        self.out, self.card, self.labels, self.shape = as_path(out), card, labels, tuple(shape)
        self.card_path = self.out.with_suffix('.json')
        super().__init__(self.out.with_name(self.out.name + '.parts'), len(labels), size, (*self.shape, 3),
                         np.uint8)

    def begin(self) -> int | None:
        """Checks the place and returns how many images are missing; None: the set is whole.
        Raises UserError where another set is in the way, or the disk is too small for parts and set."""
        if self.out.exists():
            self._check_finished()
            remove_tree(self.folder)
            return None
        if (begun := read_card(self.folder / CARD)) is not None:
            check_same_card(begun, self.card, self.folder)
        elif self.card_path.exists():
            raise UserError(f'{self.card_path} is in the way: the recipe card goes there. Give another '
                            f'--out, or move it.')
        done = sum(files_under(self.folder).values())
        storage.check_free_space(self.out, 2 * self.bytes(self.count) - done)
        make_folder(self.folder)
        write_text_atomic(self.folder / CARD, card_text(self.card))
        return sum(len(self.span(part)) for part in self.missing())

    def write(self, part: int, images: np.ndarray) -> None:
        """Images uint8 [n, H, W, 1 or 3] of a part."""
        super().write(part, np.broadcast_to(images, (*images.shape[:3], 3)))   # grey: evaluators take RGB

    def finish(self) -> None:
        """Joins the parts, with one at a time in memory."""
        write_text_atomic(self.card_path, card_text(self.card))
        with explain_unwritable(self.out, self.bytes(self.count)):
            write_npz(self.out, {'arr_0': ((len(self.labels), *self.shape, 3), np.uint8, self._blocks()),
                                 'arr_1': np.asarray(self.labels, np.int64)})
        remove_tree(self.folder)

    def describe(self) -> str:
        return (f'{self.out}: arr_0 uint8 [{len(self.labels)}, {self.shape[0]}, {self.shape[1]}, 3], recipe '
                f'in {self.card_path.name}')

    def _blocks(self) -> Iterator[bytes]:
        for part in self.parts:
            yield from self.blocks(part)

    def _check_finished(self) -> None:
        card = read_card(self.card_path)
        if card is None:
            raise UserError(f'{self.out} exists, and no recipe card {self.card_path.name} says what it is. '
                            f'It is not overwritten: give another --out.')
        check_same_card(card, self.card, self.out)
        try:
            self._check_content()
        except UserError as error:
            raise UserError(f'{self.out} is damaged: {error}. Delete it and run the same command '
                            f'again.') from error

    def _check_content(self) -> None:
        """Everything but the pixels of a set in a bucket, which keeps checksums itself."""
        with Npz(self.out) as file:
            if sorted(file.names) != ['arr_0', 'arr_1']:
                raise UserError(f'it has {shown_names(file.names)}, not arr_0 and arr_1')
            images, wanted = file.header('arr_0'), (self.count, *self.row)
            if (images.shape, images.dtype) != (wanted, np.uint8):
                raise UserError(f'arr_0 is {images.dtype} {shown(list(images.shape))}, expected uint8 '
                                f'{list(wanted)}')
            if not np.array_equal(file.array('arr_1'), self.labels):
                raise UserError('arr_1 has other labels than its recipe')
            if not is_remote(self.out):
                file.check('arr_0')


class FolderStore(Parts):
    """A folder of one PNG per image and card.json; for prompts also prompts.jsonl, a list of what each shows.
    names: of the images' files, with folders. size: images of a part, whole groups. lines: of the list, one
        an image. mixed: the folder also holds files of others, which are no images."""

    def __init__(self, out, card: dict, names: Sequence[str], size: int, lines: Sequence[dict] = (),
                 mixed: bool = False):
        super().__init__(len(names), size)
        self.out, self.card, self.names, self.lines, self._mixed = as_path(out), card, names, lines, mixed
        self._recipe = sealed(card)[SEAL]
        self._whole: set[str] = set()     # files that this process wrote, or whose checksums it compared
        self._said: set[str] = set()

    def begin(self) -> int | None:
        """As `NpzStore.begin`."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f'{self.out} is a file; single images go into a folder. Give another --out.')
        there = files_under(self.out) if self.out.exists() else {}
        if (begun := read_card(self.out / CARD)) is not None:
            check_same_card(begun, self.card, self.out)
        elif found := [name for name in there if not self._mixed or name.endswith('.png')]:
            raise UserError(f'{self.out} is not empty ({found[0]}), and no {CARD} says what it is. Give '
                            f'another --out, or empty it.')
        listed = self._list()
        make_folder(self.out)
        write_text_atomic(self.out / CARD, card_text(self.card))
        if self.lines:
            write_text_atomic(self.out / LIST, listed)
        return len(self._lacking()) or None

    def _list(self) -> str:
        """The lines of the list, with those of images that an earlier command drew."""
        if not self.lines:
            return ''
        path = self.out / LIST
        old = [parse_json(line, f'line {number} of {path}', {'file': str})
               for number, line in enumerate(read_lines(path) if path.is_file() else (), 1) if line.strip()]
        lines = {line['file']: line for line in [*old, *self.lines]}
        return ''.join(json.dumps(lines[name], ensure_ascii=False) + '\n' for name in sorted(lines))

    def missing(self) -> list[int]:
        return sorted({i // self.size for i in self._lacking()})

    def _lacking(self) -> list[int]:
        """Numbers of the images that are missing or damaged; in a bucket, which keeps checksums itself, only
        empty files are."""
        sizes, remote = files_under(self.out), is_remote(self.out)
        unknown = [name for name in self.names if sizes.get(name) and name not in self._whole]
        found = [True] * len(unknown) if remote else read_all(
            self._is_whole, unknown, _THREADS)
        self._whole |= {name for name, whole in zip(unknown, found, strict=True) if whole}
        lacking = [i for i, name in enumerate(self.names) if not (sizes.get(name) and name in self._whole)]
        broken = [self.names[i] for i in lacking if self.names[i] in sizes]
        if set(broken) - self._said:
            self._said |= set(broken)
            LOG.warning('%s: %s damaged, will be drawn again', self.out,
                        f'{", ".join(broken[:5])}{f" and {len(broken) - 5} more" * (len(broken) > 5)}')
        return lacking

    def write(self, part: int, images: np.ndarray) -> None:
        for i, image in zip(self.span(part), images, strict=True):
            name = self.names[i]
            if not (name in self._whole or self._is_whole(name)):
                save_png(self.out / name, image, self._mark(name))
            self._whole.add(name)

    def finish(self) -> None:
        pass     # the files are the set

    def describe(self) -> str:
        return f'{self.out}/: {self.count} PNG files, recipe in {CARD}'

    def _mark(self, name: str) -> str:
        """What the file says of itself, so that another image in its place is told."""
        return f'{name} of {self._recipe}'

    def _is_whole(self, name: str) -> bool:
        """Whether a file is there, undamaged, and of this name and set; those of earlier versions do not say
        of which they are."""
        path = self.out / name
        if not path.exists():       # nor does a link to nothing
            return False
        with explain_unreadable(path):
            return png_mark(path.read_bytes()) in ('', self._mark(name))
