"""Weight inheritance (LiT §3.3): a student starts with everything of a trained teacher but its attention.

The rule is general: each leaf of the student outside `attn` that the teacher has under the same path is taken over, so
it also serves students with other mixers. The paper's ablations (table 3) additionally copy parts of the attention:
`q`, `k` and `v` are thirds of DiT's fused qkv, `o` is the output projection. Heads may differ: the flat width, head
after head, is the same axis in both.
"""
import json
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.checkpoint.leaves import named_leaves
from lit_jax.checkpoint.torch_arch import size_name
from lit_jax.checkpoint.torch_keys import unflatten
from lit_jax.errors import UserError

# Where each part of the attention lies: (projection, index on the axis of its parts or None).
PARTS = {
    'softmax': {'q': ('qkv', 0), 'k': ('qkv', 1), 'v': ('qkv', 2), 'o': ('proj', None)},
    'linear': {'q': ('q', None), 'k': ('kv', 0), 'v': ('kv', 1), 'o': ('proj', None)},
}


def inherit_params(teacher_params: Mapping, teacher_arch: Mapping, student_params: Mapping, student_arch: Mapping,
                   copy: str | Iterable[str] = ()) -> tuple[dict, dict]:
    """The student's parameters with the teacher's where it inherits.

    Args:
        teacher_params, student_params: trees of arrays (numpy or jax); neither is changed. Inherited leaves are
            copies, so a donated student does not take the teacher's memory with it.
        copy: parts of the attention to take over as well: any of q, k, v, o, together or apart ('q,k,v', ['kv', 'o']).

    Returns:
        (params, report); the report is JSON-able: 'rows' (path, shape, count, status 'inherited' or 'fresh', source),
        'totals', 'notes', 'copy'. `format_report` prints it.

    Raises:
        UserError: another size than the student's, leaves of other shapes, or an unknown `copy`.
    """
    parts = parse_copy(copy)
    _check_size(teacher_arch, student_arch)
    teacher, student = named_leaves(teacher_params), named_leaves(student_params)
    _check_shapes(teacher, student)
    flat, rows = {}, []
    for path, leaf in student.items():
        if _in_attention(path):
            flat[path], more = leaf, [_row(path, leaf.shape, None)]
        elif path in teacher:
            flat[path], more = _copy_like(teacher[path], leaf), [_row(path, leaf.shape, path)]
        else:
            flat[path], more = leaf, [_row(path, leaf.shape, None)]
        rows += more
    notes = _copy_attention(flat, rows, teacher, teacher_arch, student_arch, parts)
    notes += _size_notes(teacher_arch, student_arch)
    return unflatten(flat), _report(rows, notes, parts)


def parse_copy(copy: str | Iterable[str]) -> tuple[str, ...]:
    """'q,kv' or ['q', 'kv'] -> ('q', 'k', 'v'), in this order."""
    words = copy.split(',') if isinstance(copy, str) else copy
    letters = {letter for word in words for letter in word.strip()}
    if unknown := letters - set('qkvo'):
        raise UserError(f'unknown parts to copy: {", ".join(sorted(unknown))}; expected any of q, k, v, o, '
                        'such as "q,k,v"')
    return tuple(letter for letter in 'qkvo' if letter in letters)


def format_report(report: Mapping) -> str:
    """The table of a report as text: leaf, shape, count, inherited or fresh, and from where."""
    rows = report['rows']
    width = max([len(row['path']) for row in rows] + [len('leaf')])
    sides = max([len(_shape_text(row['shape'])) for row in rows] + [len('shape')])
    line = f'{{:{width}}}  {{:{sides}}}  {{:>13}}  {{:9}}  {{}}'
    lines = [line.format('leaf', 'shape', 'count', 'status', 'from').rstrip()]
    for row in rows:
        source = '' if row['source'] in (None, row['path']) else row['source']
        lines.append(line.format(row['path'], _shape_text(row['shape']), f'{row["count"]:,}', row['status'],
                                 source).rstrip())
    totals = report['totals']
    share = 100 * totals['inherited'] / max(1, totals['parameters'])
    lines += ['', f'inherited {totals["inherited"]:,} of {totals["parameters"]:,} parameters ({share:.1f} %), '
                  f'fresh {totals["fresh"]:,}']
    return '\n'.join(lines + [f'note: {note}' for note in report['notes']])


def _in_attention(path: str) -> bool:
    return 'attn' in path.split('/')


def _row(path: str, shape, source: str | None) -> dict:
    return {'path': path, 'shape': [int(side) for side in shape], 'count': int(np.prod(shape, dtype=np.int64)),
            'status': 'fresh' if source is None else 'inherited', 'source': source}


def _report(rows: list[dict], notes: list[str], parts: tuple[str, ...]) -> dict:
    inherited = sum(row['count'] for row in rows if row['status'] == 'inherited')
    parameters = sum(row['count'] for row in rows)
    report = {'rows': rows, 'notes': notes, 'copy': ','.join(parts),
              'totals': {'parameters': parameters, 'inherited': inherited, 'fresh': parameters - inherited}}
    json.dumps(report)     # it is saved beside the run
    return report


def _shape_text(shape) -> str:
    return 'x'.join(map(str, shape))


def _check_size(teacher_arch: Mapping, student_arch: Mapping) -> None:
    if any(teacher_arch[name] != student_arch[name] for name in ('depth', 'width')):
        raise UserError(f'a student inherits only from a teacher of its own size: the teacher has '
                        f'{size_name(teacher_arch)}, the student {size_name(student_arch)}. Inherit '
                        'from one of the student\'s size; distillation (teacher.path) takes a teacher of any size')


def _check_shapes(teacher: Mapping, student: Mapping) -> None:
    wrong = [f'{path}: {_shape_text(teacher[path].shape)} in the teacher, {_shape_text(leaf.shape)} in the student'
             for path, leaf in student.items()
             if not _in_attention(path) and path in teacher and teacher[path].shape != leaf.shape]
    if wrong:
        raise UserError('the teacher\'s weights do not fit the student:\n  ' + '\n  '.join(wrong) + '\nBoth need '
                        'the same number of classes, patch, channels and mlp ratio')


def _copy_like(value, like):
    """A copy of `value` of the kind, dtype and placement of `like`."""
    if isinstance(like, jax.Array):
        return jax.device_put(jnp.array(value, dtype=like.dtype, copy=True), like.sharding)
    return np.array(value, dtype=like.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the attention


def _copy_attention(flat: dict, rows: list[dict], teacher: Mapping, teacher_arch: Mapping, student_arch: Mapping,
                    parts: tuple[str, ...]) -> list[str]:
    """Copies the chosen parts into `flat` and marks them in `rows`; returns notes on biases without counterpart."""
    notes, names = [], (teacher_arch['mixer']['name'], student_arch['mixer']['name'])
    if unknown := [name for name in names if parts and name not in PARTS]:
        raise UserError(f'parts of the attention can be copied between {", ".join(PARTS)} mixers, not with '
                        f'{unknown[0]}')
    taken: dict[str, list[tuple[str, int, str]]] = {}
    for part in parts:
        (their_name, their_index), (our_name, our_index) = (PARTS[name][part] for name in names)
        for kind in ('kernel', 'bias'):
            theirs, ours = f'blocks/attn/{their_name}/{kind}', f'blocks/attn/{our_name}/{kind}'
            if theirs in teacher and ours in flat:
                value = _get_part(np.asarray(teacher[theirs]), kind, part, their_index)
                flat[ours] = _set_part(flat[ours], value, kind, part, our_index)
                source = theirs if their_index is None else f'{theirs} ({part})'
                taken.setdefault(ours, []).append((part, our_index, source))
            elif theirs in teacher:
                notes.append(f'the teacher\'s {part} bias is left out: the student has none (mixer.qkv_bias)')
            elif ours in flat:
                notes.append(f'the student\'s {part} bias stays fresh: the teacher has none')
    for path, copies in taken.items():
        position = next(i for i, row in enumerate(rows) if row['path'] == path)
        rows[position:position + 1] = _part_rows(rows[position], copies, names[1], path)
    return notes


def _part_rows(row: dict, copies: list[tuple[str, int | None, str]], mixer: str, path: str) -> list[dict]:
    """The rows of a leaf of which some parts were copied: one for a leaf of one part, else one for each part."""
    if copies[0][1] is None:
        return [_row(path, row['shape'], copies[0][2])]
    axis = _part_axis(path)
    shape = row['shape'][:axis] + row['shape'][axis + 1:]
    sources = {part: source for part, _, source in copies}
    projection = path.split('/')[-2]
    return [_row(f'{path} ({part})', shape, sources.get(part))
            for part, (name, _) in PARTS[mixer].items() if name == projection]


def _part_axis(path: str) -> int:
    """Which axis of a stacked fused leaf holds its parts: kernels (L, D, parts, K, E), biases (L, parts, K, E)."""
    return 2 if path.endswith('kernel') else 1


def _get_part(leaf: np.ndarray, kind: str, part: str, index: int | None) -> np.ndarray:
    """One part as flat matrices (L, D, D) or vectors (L, D): heads and head dims are one axis."""
    if index is not None:
        leaf = np.take(leaf, index, axis=_part_axis(kind))
    if kind == 'bias':
        return leaf.reshape(leaf.shape[0], -1)
    return leaf.reshape(leaf.shape[0], -1, leaf.shape[-1]) if part == 'o' else leaf.reshape(*leaf.shape[:2], -1)


def _set_part(leaf, value: np.ndarray, kind: str, part: str, index: int | None):
    """A copy of `leaf` with one part replaced; heads are cut as the student's."""
    new = np.array(leaf)
    if index is None:
        new[...] = value.reshape(new.shape)
    else:
        target = np.moveaxis(new, _part_axis(kind), 0)[index]
        target[...] = value.reshape(target.shape)
    return _copy_like(new, leaf)


def _size_notes(teacher_arch: Mapping, student_arch: Mapping) -> list[str]:
    sizes = [list(arch['input_size']) for arch in (teacher_arch, student_arch)]
    if sizes[0] == sizes[1]:
        return []
    return ['the teacher was trained at input size {}x{}, the student at {}x{}; positions are computed, nothing is '
            'interpolated'.format(*sizes[0], *sizes[1])]
