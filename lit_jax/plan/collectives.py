"""Finds the communication between the devices of a mesh in the HLO text of a compiled program.

    compiled = jax.jit(step, ...).lower(...).compile()
    print(format_collectives(find_collectives(compiled.as_text(), mesh)))

HLO text differs by platform. The forms of CPU and TPU are supported: synchronous operations, `-start` and
`-done` pairs, async computations, fusions that spread one collective over several steps, and loops.
"""
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from lit_jax.plan.hlo import (
    ARRAY,
    BRANCHES,
    CALLED,
    Instruction,
    Module,
    parse_module,
    shape_bytes,
    split_instruction,
    trip_count,
)

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
         'collective-broadcast', 'ragged-all-to-all')


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: one of KINDS.
        axes: the mesh axes along which it communicates, in the mesh's order.
        bytes: per device and execution: of the result of an all-gather, of the input of all others, which is
            the larger side. The traffic on the links depends on the algorithm and is not counted.
        count: executions per run of the program: the product of the trip counts of the loops around it.
        at_least: a loop around it has an unknown trip count and was counted once.
        group_size: devices that communicate with each other; 2 for a permute.
        shapes: of its inputs in HLO, e.g. ('f32[2,4,16]',).
        name: of the instruction. source: the JAX operation it comes from, '' if unknown.
    """
    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int = 1
    at_least: bool = False
    group_size: int = 0
    shapes: tuple[str, ...] = ()
    name: str = ''
    source: str = ''

    @property
    def total_bytes(self) -> int:
        """Bytes per device of all executions."""
        return self.bytes * self.count


def find_collectives(hlo_text: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a compiled module, in the order of execution.

    hlo_text: `compiled.as_text()` of a program jitted over `mesh`; partition i is device i of
    `mesh.devices.flat`. Groups of one device are left out. All branches of a conditional are counted."""
    module = parse_module(hlo_text)
    return [c for c in _walk(module, module.entry, 1, False, dict(mesh.shape)) if c.axes]


def format_collectives(collectives: Sequence[Collective]) -> str:
    """A table of kind, axes, executions and MiB per device, with one row per kind and set of axes."""
    groups: dict[tuple, list[Collective]] = {}
    for collective in collectives:
        groups.setdefault((collective.kind, collective.axes), []).append(collective)
    rows = sorted(((sum(c.total_bytes for c in group), *key, group) for key, group in groups.items()),
                  key=lambda row: (-row[0], row[1], row[2]))
    lines = [f'{"kind":20} {"mesh axes":18} {"times":>8} {"MiB per device":>15}']
    for total, kind, axes, group in rows:
        count = f'{">=" if any(c.at_least for c in group) else ""}{sum(c.count for c in group):,}'
        lines.append(f'{kind:20} {" ".join(axes):18} {count:>8} {total / 2**20:15,.1f}')
    if len(rows) > 1:
        lines.append(f'{"total":39} {sum(c.count for c in collectives):>8,} '
                     f'{sum(row[0] for row in rows) / 2**20:15,.1f}')
    return '\n'.join(lines) if rows else 'none: the devices do not communicate'


_COLLECTIVE = re.compile(rf'^({"|".join(KINDS)})(-start)?$')
# Only lines with one of these are parsed: a module has tens of thousands of others.
_INTERESTING = re.compile(
    rf' ({"|".join(KINDS)})(-start)?\(|=%?[\w.\-]+.* while\(|calls=|to_apply=|body=|_computations?=')


def _walk(module: Module, computation: str, times: int, at_least: bool,
          mesh: Mapping[str, int]) -> Iterator[Collective]:
    instructions = module.computations.get(computation, {})
    for name, text in instructions.items():
        if not _INTERESTING.search(text):
            continue
        instruction = split_instruction(name, text)
        if match := _COLLECTIVE.match(instruction.opcode):
            if not _continues(instruction, instructions):
                kind = 'reduce-scatter' if computation.startswith('all-reduce-scatter') else match[1]
                yield _collective(kind, instruction, instructions, mesh, times, at_least)
        elif instruction.opcode == 'while':
            trips = trip_count(module, computation, instruction)
            body = re.search(r'\bbody=%?([\w.\-]+)', instruction.attributes)[1]
            yield from _walk(module, body, times * (1 if trips is None else trips), at_least or trips is None,
                             mesh)
        elif instruction.opcode not in ('async-update', 'async-done'):     # these repeat their start's name
            names = [name for names in BRANCHES.findall(instruction.attributes) for name in names.split(',')]
            for called in (*CALLED.findall(instruction.attributes), *names):
                yield from _walk(module, called.strip().lstrip('%'), times, at_least, mesh)


def _continues(instruction: Instruction, neighbours: Mapping[str, str]) -> bool:
    """Whether this is a later step of a collective that was counted at its start.

    The TPU compiler spreads a collective over several fusions, which all repeat the instruction; the first
    one has a custom call AsyncCollectiveStart."""
    return ('async_collective_fusion_config' in instruction.attributes
            and not any('"AsyncCollectiveStart"' in text for text in neighbours.values()))


def _collective(kind: str, instruction: Instruction, neighbours: Mapping[str, str], mesh: Mapping[str, int],
                times: int, at_least: bool) -> Collective:
    groups = _groups(instruction.attributes, math.prod(mesh.values()))
    shapes = [split_instruction(name, neighbours[name]).shape for name in instruction.operands
              if name in neighbours]
    size = sum(shape_bytes(shape) for shape in shapes)
    group_size = max((len(group) for group in groups), default=0)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind=kind, axes=_axes(groups, mesh), bytes=size * group_size if kind == 'all-gather' else size,
        count=times, at_least=at_least, group_size=group_size, name=instruction.name,
        source=source[1] if source else '',
        shapes=tuple(f'{dtype}[{dims}]' for shape in shapes for dtype, dims in ARRAY.findall(shape)))


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the members of a group differ, over all groups."""
    if not groups:
        return ()
    coordinates = [np.stack(np.unravel_index(np.asarray(group), tuple(mesh.values()))) for group in groups]
    varies = np.any([(c != c[:, :1]).any(axis=1) for c in coordinates], axis=0)
    return tuple(axis for axis, differs in zip(mesh, varies, strict=True) if differs)


_IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of partitions that communicate with each other, from any of XLA's notations."""
    if pairs := re.search(r'source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}', attributes):
        return _lists(pairs[1])
    if iota := re.search(rf'replica_groups=\[([\d,]+)\]<={_IOTA}', attributes):
        return _iota(iota[2], iota[3]).reshape(_integers(iota[1])).tolist()
    if named := re.search(
        r'replica_groups=@?mesh[\[<]([^\]>]*)[\]>](?:,\s*device_ids=\((.*?)\))?\s*\{([^}]*)\}', attributes):
        return _mesh_groups(*named.groups())
    explicit = re.search(r'replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}', attributes)
    return (_lists(explicit[1]) if explicit else []) or [list(range(devices))]     # {} means all of them


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]


def _lists(text: str) -> list[list[int]]:
    return [_integers(part) for part in re.findall(r'\{([^}]*)\}', text)]


def _iota(shape: str, order: str | None) -> np.ndarray:
    """'4,2', '1,0' -> arange(8).reshape(4, 2).transpose(1, 0)."""
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return ids.transpose(_integers(order)) if order else ids


def _mesh_groups(sizes: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """`mesh['a'=2,'b'=8] {'b':(2)4}`: groups along parts of axes; `(p)n` is `[p, n, rest][1]` of its axis."""
    names = [(name.strip(" '"), int(n)) for name, n in (part.split('=') for part in sizes.split(',') if part)]
    total = math.prod(n for _, n in names)
    ids = np.arange(total)
    if device_ids:
        iota = re.match(_IOTA + '?$', device_ids) if device_ids.startswith('[') else None
        ids = _iota(iota[1], iota[2]) if iota else np.array(_integers(device_ids))
    pattern = r"\s*'?([^':]+)'?(?::\((\d+)\)(\d+))?"
    chosen = [re.match(pattern, axis) for axis in axes.split(',') if axis.strip()]
    shape, taken = [], []
    for name, size in names:
        parts = sorted((int(m[2] or 1), int(m[3] or size)) for m in chosen if m[1] == name)
        done = 1
        for before, length in parts:
            shape += [before // done, length]
            taken.append(len(shape) - 1)
            done = before * length
        shape.append(size // done)
    grid = ids.reshape(shape)
    width = math.prod(shape[axis] for axis in taken)
    kept = [axis for axis in range(len(shape)) if axis not in taken]
    return grid.transpose(kept + taken).reshape(-1, width).tolist()
