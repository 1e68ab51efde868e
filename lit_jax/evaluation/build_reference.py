"""Makes a reference of your own images, in ADM's layout (`evaluate.py reference`).

The data set is divided into parts of consecutive images, and the missing parts among the processes. For each
part, OUT.npz.parts/ gets count, mean and scatter of the features, and the images that OUT.npz will contain.
So interrupted runs resume, and the file has the same bytes as that of an uninterrupted run.
"""
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping

import numpy as np

from lit_jax.data import crop
from lit_jax.data.images import BadImage, ImageSource, as_told, load_or_bad
from lit_jax.data.sources import Source, open_source
from lit_jax.data.subset import LISTS, class_list
from lit_jax.evaluation.evaluate_options import ReferenceOptions
from lit_jax.evaluation.reference import FORMAT, STORED, read_meta
from lit_jax.evaluation.scores import few_images
from lit_jax.evaluation.sets import IMAGES
from lit_jax.evaluation.spaces import FeatureSpace, open_space
from lit_jax.metrics.frechet import RunningStatistics
from lit_jax.report.grids import to_uint8
from lit_jax.runtime import cluster, peers, storage
from lit_jax.runtime.claim import claimed
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import plain, read_json, sealed, unsealed
from lit_jax.runtime.npz_file import write_npz
from lit_jax.runtime.npz_reader import Npz
from lit_jax.runtime.parts import Parts, make_missing
from lit_jax.runtime.paths import (
    as_path,
    check_folder,
    explain_unwritable,
    files_under,
    is_remote,
    make_folder,
    remove_tree,
    write_bytes_atomic,
    write_text_atomic,
)
from lit_jax.runtime.read_ahead import read_ahead
from lit_jax.sampling.labels import class_names, find_classes, parse_classes

LOG = logging.getLogger('lit_jax')
_BLOCK = 512                 # about how many images are in the feature extractor at a time
_MIN_PART, _MAX_PARTS = 1024, 64
GREY = ('digits', 'mnist')
_SUMS = ('count', 'mean', 'scatter')


def build_reference(request: ReferenceOptions) -> str:
    """Writes a reference; returns a line for people. All processes call it together."""
    _check_request(request)
    check_folder(as_path(request.out).parent, f'--out={request.out}')
    space = open_space(request.features, inception=request.inception, precision=request.precision)
    source = peers.together(lambda: open_source(
        request.data, split=request.split, image_size=request.image_size, data_dir=request.data_dir,
        channels=None if request.data in GREY else 3, path=request.path, strict=request.strict))
    builder = peers.together(lambda: _Builder(request, source, space))
    cluster.check_same({'plan': builder.plan, 'out': str(request.out), **cluster.code_facts()})
    with claimed(builder.out):
        if not peers.from_lead(builder.begin):
            return f'{builder.out} is there already, made from the same images'
        make_missing(builder, lambda mine: map(builder.make, mine), 'images', seconds=30)
        if isinstance(source, ImageSource):
            source.say_ignored()
        return peers.from_lead(builder.finish)


class _Builder(Parts):
    """A reference in parts. `plan`: JSON-able, everything that the content of the file depends on."""

    def __init__(self, request: ReferenceOptions, source: Source, space: FeatureSpace):
        self._request, self._source, self._space = request, source, space
        self.out = as_path(request.out)
        self.folder = self.out.with_name(self.out.name + '.parts')
        if space.image_shape is not None and tuple(source.spec.image_shape[:2]) != tuple(space.image_shape):
            raise UserError(f'{request.data} has images of {source.spec.image_size} pixels per side, but '
                            f'{space.facts["flavour"]} takes {space.image_shape[0]}')
        self._examples, names = _choose_classes(source, request.classes)
        count = len(self._examples)
        if count < 2:
            raise UserError(f'a covariance needs at least 2 images, but {request.data} has {count}')
        chosen = np.random.default_rng(request.seed).choice(count, min(request.images, count), replace=False)
        self._shown = np.zeros(count, bool)
        self._shown[chosen] = True
        self._block = space.group * math.ceil(_BLOCK / space.group)
        self._known: set[int] = set()     # parts that this process wrote, or read without finding damage
        super().__init__(count, self._block * math.ceil(max(_MIN_PART, count / _MAX_PARTS) / self._block))
        images = isinstance(source, ImageSource)
        data = source.content() if images else {'name': request.data, 'count': len(source),
                                                'classes': source.spec.num_classes}
        self.plan = {
            'format': FORMAT, 'kind': 'reference', 'features': space.facts,
            'image_size': source.spec.image_size, 'crop': crop.RULE if images else 'none',
            'data': {**data, 'split': request.split}, 'classes': names or 'all', 'pictures': count,
            'part': self.size, 'images': {
                'count': len(chosen), 'seed': request.seed, 'chosen': 'numpy '
                'default_rng(seed).choice(pictures, count, replace=False), in the order of the data set'}}

    def begin(self) -> bool:
        """Claims the folder; False if the file is there already. UserError if it is another reference."""
        if self.out.suffix != '.npz' or self.out.is_dir():
            raise UserError(f'--out={self.out} must name a file that ends with .npz')
        if self.out.exists():
            self._check_finished()
            remove_tree(self.folder)
            return False
        path = self.folder / 'plan.json'
        if (begun := read_json(path, {'data?': {}}, absent=None)) is not None:
            check_alike(unsealed(begun, path), self._plan_as_told(begun), 'there', 'now',
                        f'{self.folder} belongs to another reference',
                        'Give another --out, or delete what is there.')
        images = 3 * int(self._shown.sum()) * math.prod(self._source.spec.image_shape[:2])
        covariances = 8 * (len(self.parts) + 1) * sum(width ** 2 for width in self._space.widths)
        storage.check_free_space(self.out, 2 * images + covariances)
        make_folder(self.folder)
        write_text_atomic(path, json.dumps(sealed(plain(self.plan)), indent=1) + '\n')
        return True

    def missing(self) -> list[int]:
        """Parts whose file is missing or damaged; in a bucket, which keeps checksums itself, only missing."""
        there, remote = files_under(self.folder), is_remote(self.folder)
        self._known &= {part for part in self.parts if self._name(part) in there}
        self._known |= {part for part in self.parts if self._name(part) in there and part not in self._known
                        and (remote or self._is_whole(part))}
        return [part for part in self.parts if part not in self._known]

    def _is_whole(self, part: int) -> bool:
        try:
            self._read(part)
        except UserError as error:
            LOG.warning('%s; it is made again', error)
            return False
        return True

    def make(self, part: int) -> None:
        """Reads the images of one part and writes its file."""
        running, shown, bad, span = self._no_statistics(), [], [], self.span(part)
        blocks = [span[start:start + self._block] for start in range(0, len(span), self._block)]
        loaded = read_ahead(self._image, blocks, self._request.threads or os.cpu_count() or 1)
        for block, images in zip(blocks, loaded, strict=True):
            good = [i for i, image in enumerate(images) if not isinstance(image, BadImage)]
            bad += [image for image in images if isinstance(image, BadImage)]
            if not good:
                continue
            pixels = np.stack([images[i] for i in good])
            features = self._space.extract(pixels)
            for kind, statistics in running.items():
                statistics.add(getattr(features, kind))
            shown.append(pixels[self._shown[block.start:block.stop][good]])
        if bad:
            LOG.warning('left out: %d images of %d that cannot be decoded; the first: %s', len(bad),
                        len(span), bad[0])
        none = np.zeros((0, *self._source.spec.image_shape[:2], 3), np.uint8)
        arrays = {f'{kind}/{name}': np.asarray(getattr(statistics, name))
                  for kind, statistics in running.items() if statistics.count for name in _SUMS}
        file = io.BytesIO()
        np.savez(file, bad=np.asarray(len(bad)), shown=np.concatenate([none, *shown]), **arrays)
        with explain_unwritable(self.folder, file.tell()):
            write_bytes_atomic(self.folder / self._name(part), file.getvalue())
        self._known.add(part)

    def finish(self) -> str:
        """Merges the parts into the file, in their order."""
        running, bad, shown = self._no_statistics(), 0, 0
        for part in self.parts:
            arrays = self._read(part)
            bad, shown = bad + int(arrays['bad']), shown + len(arrays['shown'])
            for kind, statistics in running.items():
                if f'{kind}/count' in arrays:
                    one = RunningStatistics()
                    one.count, one.mean, one.scatter = (arrays[f'{kind}/{name}'] for name in _SUMS)
                    one.count = int(one.count)
                    statistics.merge(one)
        arrays = {name: array for kind, names in STORED.items() if kind in running
                  for name, array in zip(names, running[kind].result()[:2], strict=True)}
        count = len(self._examples) - bad
        for text in few_images(f'a reference of {count} images', running['pool'].result()):
            LOG.warning('%s', text)
        arrays[IMAGES] = ((shown, *self._source.spec.image_shape[:2], 3), np.dtype(np.uint8), self._images())
        arrays['meta'] = np.asarray(json.dumps({**self.plan, 'count': count, 'left_out': bad,
                                                'arrays': list(arrays)}))
        write_npz(self.out, arrays)
        remove_tree(self.folder)
        left_out = f'; {bad} that cannot be decoded are left out' if bad else ''
        return (f'wrote {self.out}: statistics of {count} images, {shown} of them in {IMAGES}, '
                f'{self._space.facts["flavour"]}{left_out}')

    def _no_statistics(self) -> dict[str, RunningStatistics]:
        kinds = zip(STORED, self._space.widths, strict=True)
        return {kind: RunningStatistics() for kind, width in kinds if width}

    def _images(self) -> Iterator[bytes]:
        for part in self.parts:
            yield self._read(part)['shown'].tobytes()

    def _read(self, part: int) -> dict[str, np.ndarray]:
        """UserError if the file is damaged."""
        path = self.folder / self._name(part)
        with Npz(path) as file:
            arrays = {name: file.array(name) for name in file.names}
        kinds = [kind for kind in self._no_statistics() if f'{kind}/count' in arrays]
        images = (len(arrays.get('shown', ())), *self._source.spec.image_shape[:2], 3)
        shapes = {'shown': (images, 'u'), 'bad': ((), 'i'), **{f'{kind}/count': ((), 'i') for kind in kinds}}
        sums = {f'{kind}/{name}' for kind in kinds for name in _SUMS[1:]}
        found = {name: (array.shape, array.dtype.kind) for name, array in arrays.items() if name not in sums}
        if found != shapes or not sums <= set(arrays) or len(kinds) not in (0, len(self._no_statistics())):
            raise UserError(f'{path} is damaged: it is no part of this reference')
        return arrays

    def _image(self, number: int):
        """uint8 [H, W, 3] of a chosen example, or why it cannot be decoded."""
        example = load_or_bad(self._source, int(self._examples[number]), self._request.strict)
        if isinstance(example, BadImage):
            return example
        image = to_uint8(example['image'][None])[0]
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def _check_finished(self) -> None:
        with Npz(self.out) as file:
            meta = read_meta(file) if 'meta' in file.names else {}
        check_alike({key: meta.get(key) for key in self.plan}, self._plan_as_told(meta), 'there', 'now',
                    f'{self.out} exists and is another reference', 'Give another --out, or delete it.')
        with Npz(self.out) as file:
            for name in () if is_remote(self.out) else file.names:
                file.check(name)

    def _plan_as_told(self, there: Mapping) -> dict:
        return plain({**self.plan, 'data': as_told(self.plan['data'], there.get('data'))})

    def _name(self, part: int) -> str:
        return f'{part:05d}.npz'


def _choose_classes(source: Source, text: str) -> tuple[np.ndarray, list[str]]:
    """(indices of the examples of the named classes, names of these classes); without names all and []."""
    if not text:
        return np.arange(len(source)), []
    known = class_names({'classes': source.class_names}, range(source.spec.num_classes))
    where = 'this data set'
    numbers = find_classes(class_list(text), known, where) if text in LISTS or as_path(text).is_file() \
        else parse_classes(text, known, where=where)
    return np.flatnonzero(np.isin(source.all_labels(), numbers)), [known[one] for one in sorted(set(numbers))]


def _check_request(request: ReferenceOptions) -> None:
    if request.data == 'latents':
        raise UserError('--data=latents: a reference needs images; give imagenet2012, tfds:NAME, folder, '
                        'digits or mnist')
    for name in ('images', 'image_size', 'threads'):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f'--{name} must be at least 1, got {value}')
    if request.seed < 0:
        raise UserError(f'--seed must not be negative, got {request.seed}')
