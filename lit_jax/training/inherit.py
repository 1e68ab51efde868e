"""Weight inheritance (LiT §3.3): a student starts with all weights of a trained teacher but its attention.

Each leaf of the student outside `attn` that the teacher has under the same path in the same shape is copied,
whatever the mixer, ffn and family; the table lists every leaf. Blocks are matched by their number, so runs of
unlike blocks do not matter. The paper's ablations (table 3) also copy parts of the attention: `q`, `k` and
`v` are thirds of DiT's fused qkv, `o` is the output projection. Heads may differ: the flat width, head after
head, is the same axis in both. `all` copies the whole attention, from a teacher with the student's own, to
continue training, for instance at another resolution. A block that has its teacher's own mixer, with the same
options (some blocks of a hybrid), inherits the whole attention, whatever `copy` says.

What students of a DiT inherit: LiT, EDiT, MoH-DiT, compressed keys: all but the attention. Sana, DyDi-LiT,
DiG: that without the mlp, which is another network. MoH-DiT and compressed keys with copy 'q,k,v,o': all but
routers and compressors (MoH-DiT where heads x head_dim is the teacher's width). U-DiG, with widths and blocks
of its own: embedders and final layer where they fit, usually nothing. LiT-0.6B of a PixArt-Σ: all but the
self-attention."""
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.convert.torch_arch import size_name
from lit_jax.convert.torch_keys import number_blocks, split_run
from lit_jax.models.arch import conditioning, mixers_of
from lit_jax.models.mixers import find_mixer, whole_mixer
from lit_jax.models.network import count_fixed
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves, unflatten

ALL = ('all',)
OWN_SIZES = ('udig',)      # families with blocks unlike DiT's: from others they inherit nothing in the blocks


def inherit_params(teacher_params: Mapping, teacher_arch: Mapping, student_params: Mapping,
                   student_arch: Mapping, copy: str | Iterable[str] = ()) -> tuple[dict, dict]:
    """The student's parameters with the teacher's where it inherits.

    Args:
        teacher_params, student_params: trees of arrays (numpy or jax), unchanged. Inherited leaves are
            copies, so donating the student leaves the teacher's memory alone.
        copy: parts of the attention to copy as well: any of q, k, v, o, together or apart ('q,k,v',
            ['kv', 'o']); or 'all', everything of a teacher with the same attention.

    Returns (params, report); the report (`format_report`) is JSON-able: 'rows' (path, shape, count, status
    'inherited' or 'fresh', source), 'totals', 'fixed' (numbers of the position table), 'notes', 'copy'.
    Raises UserError for a teacher of other size, leaves of other shapes in a model of the same kind, an
    unknown `copy`, or 'all' with another attention."""
    parts = parse_copy(copy)
    _check_size(teacher_arch, student_arch)
    teacher, student = _Blocks(teacher_params, teacher_arch), _Blocks(student_params, student_arch)
    unlike = _unlike(teacher_arch, student_arch)
    same_ffn = teacher_arch.get('ffn', 'mlp') == student_arch.get('ffn', 'mlp')
    alike = set() if unlike else _alike(teacher, student)
    flat, rows, misfits, lacking = {}, [], [], []
    for path, leaf in student.flat.items():
        pattern, run = split_run(path)
        attention = 'attn' in path.split('/')
        foreign = (attention and parts != ALL and run not in alike
                   or pattern.startswith('blocks/mlp/') and not same_ffn or unlike and run is not None)
        found = None if foreign else teacher.find(pattern, student.blocks.get(run))
        fits = found is not None and found.shape == leaf.shape
        if found and not fits and not (attention and parts == ALL):
            misfits.append(f'{path}: {_shape_text(found.shape)} in the teacher, {_shape_text(leaf.shape)} in '
                           f'the student')
        elif not fits:
            lacking.append(path)
        flat[path] = _copy_like(found.read(), leaf) if fits else leaf
        rows.append(_row(path, leaf.shape, found.source if fits else None))
    if lacking and parts == ALL:
        raise UserError(f'inherit.copy=all needs a teacher with everything of the student, this one lacks '
                        f'{", ".join(lacking[:5])}; leave it out, or name the parts of the attention to '
                        f'copy: any of q, k, v, o')
    notes = _misfit_notes(misfits, teacher_arch, student_arch)
    if unlike:
        notes.append(f'blocks of the families {teacher_arch["family"]} and {student_arch["family"]} have '
                     f'nothing in common')
    else:
        notes += _copy_attention(flat, rows, teacher, student, () if parts == ALL else parts, alike)
    notes += _size_notes(teacher_arch, student_arch)
    return unflatten(flat), _report(rows, notes, parts, count_fixed(student_arch))


def parse_copy(copy: str | Iterable[str]) -> tuple[str, ...]:
    """'q,kv' or ['q', 'kv'] -> ('q', 'k', 'v'), in this order; 'all' -> ALL."""
    words = [word.strip() for word in (copy.split(',') if isinstance(copy, str) else copy) if word.strip()]
    if words == [*ALL]:
        return ALL
    letters = {letter for word in words for letter in word}
    if unknown := letters - set('qkvo'):
        raise UserError(f'unknown parts to copy: {", ".join(sorted(unknown))}; expected any of q, k, v, o, '
                        'such as "q,k,v", or "all"')
    return tuple(letter for letter in 'qkvo' if letter in letters)


def format_report(report: Mapping) -> str:
    """A report as a text table: leaf, shape, count, inherited or fresh, and from where."""
    rows = [('leaf', 'shape', 'count', 'status', 'from')]
    for row in report['rows']:
        source = '' if row['source'] in (None, row['path']) else row['source']
        rows.append((row['path'], _shape_text(row['shape']), f'{row["count"]:,}', row['status'], source))
    width, sides = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f'{leaf:{width}}  {shape:{sides}}  {count:>13}  {status:9}  {source}'.rstrip()
             for leaf, shape, count, status, source in rows]
    totals = report['totals']
    share = 100 * totals['inherited'] / max(1, totals['parameters'])
    lines += ['', f'inherited {totals["inherited"]:,} of {totals["parameters"]:,} parameters '
                  f'({share:.1f} %), fresh {totals["fresh"]:,}']
    if fixed := report.get('fixed'):
        lines.append(f'{fixed:,} more are the fixed position table: '
                     f'{totals["parameters"] + fixed:,} in all')
    return '\n'.join(lines + [f'note: {note}' for note in report['notes']])


def _row(path: str, shape, source: str | None) -> dict:
    return {'path': path, 'shape': [int(side) for side in shape], 'count': math.prod(map(int, shape)),
            'status': 'fresh' if source is None else 'inherited', 'source': source}


def _report(rows: list[dict], notes: list[str], parts: tuple[str, ...], fixed: int) -> dict:
    inherited = sum(row['count'] for row in rows if row['status'] == 'inherited')
    parameters = sum(row['count'] for row in rows)
    return {'rows': rows, 'notes': notes, 'copy': ','.join(parts), 'fixed': fixed,
            'totals': {'parameters': parameters, 'inherited': inherited, 'fresh': parameters - inherited}}


def _shape_text(shape) -> str:
    return 'x'.join(map(str, shape))


def _check_size(teacher_arch: Mapping, student_arch: Mapping) -> None:
    if _unlike(teacher_arch, student_arch):
        return
    if any(teacher_arch[name] != student_arch[name] for name in ('depth', 'width')):
        raise UserError(f'a student inherits only from a teacher of its own size: the teacher has '
                        f'{size_name(teacher_arch)}, the student {size_name(student_arch)}. Inherit '
                        'from one of the student\'s size; distillation (teacher.path) takes a teacher of any '
                        'size')


def _unlike(*archs: Mapping) -> bool:
    families = {arch.get('family', 'dit') for arch in archs}
    return len(families) > 1 and bool(families & {*OWN_SIZES})


def _misfit_notes(misfits: list[str], teacher_arch: Mapping, student_arch: Mapping) -> list[str]:
    if misfits and not _unlike(teacher_arch, student_arch):
        told = 'the same number of classes' if conditioning(student_arch) == 'label' else \
            'the same text encoder (width of the captions\' features), heads of the cross-attention'
        raise UserError('the teacher\'s weights do not fit the student:\n  ' + '\n  '.join(misfits) +
                        f'\nBoth need {told}, patch, channels and mlp ratio')
    return [f'fresh, because it is of another shape: {misfit}' for misfit in misfits]


def _copy_like(value, like):
    """A copy of `value` of the kind, dtype and placement of `like`."""
    if isinstance(like, jax.Array):
        return jax.device_put(jnp.array(value, dtype=like.dtype, copy=True), like.sharding)
    return np.array(value, dtype=like.dtype)


class _Blocks:
    """The leaves of a model; blocks are numbered through the whole model."""

    def __init__(self, params: Mapping, arch: Mapping):
        self.flat = named_leaves(params)
        self.blocks = number_blocks({path: np.shape(leaf) for path, leaf in self.flat.items()})
        mixers = mixers_of(arch)       # one per run, or one for all groups of a U-DiG
        self.mixers = {run: mixers[i % len(mixers)] for i, run in enumerate(sorted(self.blocks))}

    def paths(self, pattern: str) -> dict[int, str]:
        """{run: path} of the runs that have the leaf 'blocks/...'."""
        return {run: path for path in self.flat for own, run in [split_run(path)] if own == pattern
                and run is not None}

    def find(self, pattern: str, blocks: range | None) -> '_Pieces | None':
        """The leaf's layers in these blocks (None: outside the blocks); None unless all of them have it."""
        if blocks is None:
            return _Pieces(((pattern, None),), self.flat) if pattern in self.flat else None
        pieces = []
        for run, path in sorted(self.paths(pattern).items()):
            own = self.blocks[run]
            start, stop = max(blocks.start, own.start), min(blocks.stop, own.stop)
            if start < stop:
                pieces.append((path, slice(start - own.start, stop - own.start)))
        shapes = {np.shape(self.flat[path])[1:] for path, _ in pieces}
        complete = sum(part.stop - part.start for _, part in pieces) == len(blocks)
        return _Pieces(tuple(pieces), self.flat) if complete and len(shapes) == 1 else None


@dataclass(frozen=True)
class _Pieces:
    """Layers of one or several leaves of a model, one after the other."""
    pieces: tuple[tuple[str, slice | None], ...]
    flat: Mapping

    def _whole(self) -> bool:
        (path, part), *others = self.pieces
        return not others and (part is None or part == slice(0, len(self.flat[path])))

    @property
    def shape(self) -> tuple[int, ...]:
        path, part = self.pieces[0]
        shape = np.shape(self.flat[path])
        return shape if part is None else (sum(one.stop - one.start for _, one in self.pieces), *shape[1:])

    @property
    def source(self) -> str:
        if self._whole():
            return self.pieces[0][0]
        return ', '.join(f'{path} [{part.start}:{part.stop}]' for path, part in self.pieces)

    def read(self):
        if self._whole():
            return self.flat[self.pieces[0][0]]
        parts = [self.flat[path][part] for path, part in self.pieces]
        return _library(*parts).concatenate(parts)


def _library(*arrays):
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _alike(teacher: _Blocks, student: _Blocks) -> set[int]:
    """The student's runs of blocks that have the mixer of the teacher's blocks of the same numbers."""
    def theirs(blocks: range) -> list[dict]:
        return [whole_mixer(teacher.mixers[run]) for run, own in teacher.blocks.items()
                if max(own.start, blocks.start) < min(own.stop, blocks.stop)]

    return {run for run, mixer in student.mixers.items()
            if all(whole_mixer(mixer) == other for other in theirs(student.blocks[run]))}


def _copy_attention(flat: dict, rows: list[dict], teacher: _Blocks, student: _Blocks,
                    parts: tuple[str, ...], alike: set[int]) -> list[str]:
    """Copies the parts into `flat`, but for the runs that are `alike`, and marks them in `rows`; returns
    notes on what has no counterpart."""
    if not parts:
        return []
    mixers = {mixer['name'] for model in (teacher, student) for mixer in model.mixers.values()}
    if unsaid := sorted(name for name in mixers if not {*parts} <= {*find_mixer(name).parts}):
        raise UserError(f'{", ".join(parts)} of the attention cannot be copied: the mixer {unsaid[0]} does '
                        f'not say where they lie (`parts` of its class)')
    notes: dict[str, None] = {}
    for run, mixer in student.mixers.items():
        if run in alike:
            continue
        taken: dict[str, list[tuple[str, int | None, str]]] = {}
        for part in parts:
            name, index = find_mixer(mixer['name']).parts[part]
            for kind in ('kernel', 'bias'):
                path = student.paths(f'blocks/attn/{name}/{kind}').get(run)
                found = _find_part(teacher, part, kind, student.blocks[run])
                if path and found:
                    value, source = found
                    replaced = _set_part(flat[path], value, kind, part, index)
                    if replaced is None:
                        notes[f'{path}: {part} stays fresh, its sides are not the teacher\'s'] = None
                        continue
                    flat[path] = replaced
                    taken.setdefault(path, []).append((part, index, source))
                elif found:
                    option = ' (mixer.qkv_bias)' if kind == 'bias' and part != 'o' else ''
                    left_out = f'the teacher\'s {part} {_KIND[kind]} is left out'
                    notes[f'{left_out}: the student has none{option}'] = None
                elif path:
                    notes[f'the student\'s {part} {_KIND[kind]} stays fresh: the teacher has none'] = None
        for path, copies in taken.items():
            position = next(i for i, row in enumerate(rows) if row['path'] == path)
            rows[position:position + 1] = _part_rows(rows[position], copies, mixer['name'], path)
    return list(notes)


_KIND = {'kernel': 'projection', 'bias': 'bias'}


def _find_part(teacher: _Blocks, part: str, kind: str, blocks: range) -> tuple | None:
    """(a part of these blocks as flat matrices or vectors, its source); None: the teacher lacks it."""
    values, sources = [], []
    for run, mixer in teacher.mixers.items():
        own = teacher.blocks[run]
        inside = range(max(blocks.start, own.start), min(blocks.stop, own.stop))
        if not inside:
            continue
        name, index = find_mixer(mixer['name']).parts[part]
        found = teacher.find(f'blocks/attn/{name}/{kind}', inside)
        if found is None:
            return None
        values.append(_get_part(found.read(), kind, part, index))
        sources.append(found.source if index is None else f'{found.source} ({part})')
    if sum(map(len, values)) != len(blocks) or len({value.shape[1:] for value in values}) > 1:
        return None
    return (values[0] if len(values) == 1 else _library(*values).concatenate(values)), ', '.join(sources)


def _part_rows(row: dict, copies: list[tuple[str, int | None, str]], mixer: str, path: str) -> list[dict]:
    """The rows of a leaf with copied parts: one, or one per part."""
    if copies[0][1] is None:
        return [_row(path, row['shape'], copies[0][2])]
    axis = _part_axis(path)
    shape = row['shape'][:axis] + row['shape'][axis + 1:]
    sources = {part: source for part, _, source in copies}
    projection = path.split('/')[-2]
    return [_row(f'{path} ({part})', shape, sources.get(part))
            for part, (name, _) in find_mixer(mixer).parts.items() if name == projection]


def _part_axis(path: str) -> int:
    """The axis of the parts in a stacked leaf: kernels (L, D, parts, K, E), biases (L, parts, K, E)."""
    return 2 if path.endswith('kernel') else 1


def _get_part(leaf, kind: str, part: str, index: int | None):
    """One part as flat matrices (L, D, D) or vectors (L, D): heads and head dims are one axis."""
    if index is not None:
        leaf = _library(leaf).take(leaf, index, axis=_part_axis(kind))
    if kind == 'bias':
        return leaf.reshape(leaf.shape[0], -1)
    return leaf.reshape(len(leaf), -1, leaf.shape[-1]) if part == 'o' else leaf.reshape(*leaf.shape[:2], -1)


def _set_part(leaf, value, kind: str, part: str, index: int | None):
    """A copy of `leaf` with one part replaced, in the student's heads; None where the flat shapes differ."""
    if _get_part(leaf, kind, part, index).shape != value.shape:
        return None
    if index is None:
        return _copy_like(value.reshape(leaf.shape), leaf)
    axis, library = _part_axis(kind), _library(leaf, value)
    slices = [library.take(leaf, i, axis=axis) for i in range(leaf.shape[axis])]
    slices[index] = library.asarray(value).reshape(slices[index].shape)
    return _copy_like(library.stack(slices, axis), leaf)


def _size_notes(teacher_arch: Mapping, student_arch: Mapping) -> list[str]:
    sizes = [list(arch['input_size']) for arch in (teacher_arch, student_arch)]
    notes = [] if sizes[0] == sizes[1] else [
        'the teacher was trained at input size {}x{}, the student at {}x{}; positions are computed, nothing '
        'is interpolated'.format(*sizes[0], *sizes[1])]
    if 'pe_interpolation' in teacher_arch and 'pe_interpolation' in student_arch:
        ends = [arch['base_size'] / arch['pe_interpolation'] for arch in (teacher_arch, student_arch)]
        if ends[0] != ends[1]:
            notes.append(f'positions run from 0 to {ends[0]:g} in the teacher, to {ends[1]:g} in the '
                         f'student: model.pe_interpolation {student_arch["base_size"] / ends[0]:g} would '
                         f'give the teacher\'s')
    return notes
