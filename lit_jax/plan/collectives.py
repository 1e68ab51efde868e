"""Finds the communication between the devices of a mesh in the HLO text of a compiled program.

    compiled = jax.jit(step, ...).lower(...).compile()
    print(format_collectives(find_collectives(compiled.as_text(), mesh)))

HLO text differs by platform. The forms of CPU and TPU are supported: synchronous operations, `-start` and
`-done` pairs, async computations, fusions that spread one collective over several steps, and loops.
"""
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from lit_jax.runtime.json_file import split_lines

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
    module = _parse(hlo_text)
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


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass
class _Module:
    """Computations by name, each {instruction name: text after the equals sign}."""
    computations: dict[str, dict[str, str]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    entry: str = ''

    def read(self, computation: str, name: str) -> _Instruction | None:
        text = self.computations.get(computation, {}).get(name)
        return None if text is None else _split(name, text)


_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,<=]*)\]')
_CALLED = re.compile(r'\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}')
_COLLECTIVE = re.compile(rf'^({"|".join(KINDS)})(-start)?$')
# Only lines with one of these are parsed: a module has tens of thousands of others.
_INTERESTING = re.compile(
    rf' ({"|".join(KINDS)})(-start)?\(|=%?[\w.\-]+.* while\(|calls=|to_apply=|body=|_computations?=')


def _parse(text: str) -> _Module:
    module, current = _Module(), None
    for line in split_lines(text):
        if header := _HEADER.match(line):
            current = header[2]
            module.computations[current] = {}
            if header[1]:
                module.entry = current
        elif current is not None and (match := _LINE.match(line)):
            module.computations[current][match[2]] = match[3]
            if match[1]:
                module.roots[current] = match[2]
    if not module.entry:
        raise ValueError('not the text of a compiled HLO module: it has no ENTRY computation')
    return module


def _split(name: str, text: str) -> _Instruction:
    """Parses 'f32[4]{0} add(%a, %b), metadata={...}'."""
    text = re.sub(r'/\*.*?\*/', '', text)
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    opening = text.index('(', end)
    closing = _closing(text, opening)
    names = tuple(part.split()[-1].lstrip('%') for part in _top_level(text[opening + 1:closing]))
    return _Instruction(name, text[:end], text[end:opening].strip(), names, text[closing + 1:])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == '(') - (text[index] == ')')
        if depth == 0:
            return index
    raise ValueError(f'unbalanced parentheses in HLO: {text[:80]}')


def _top_level(text: str) -> Iterator[str]:
    """The parts between the commas outside all brackets."""
    depth = start = 0
    for index, character in enumerate(text):
        depth += (character in '([{') - (character in ')]}')
        if character == ',' and depth == 0:
            yield text[start:index]
            start = index + 1
    if text[start:].strip():
        yield text[start:]


def _shape_bytes(shape: str) -> int:
    """Bytes of an array or tuple shape, without padding."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        digits = re.search(r'\d+', dtype)
        bits = 8 if dtype == 'pred' else int(digits[0]) if digits else 0
        total += math.prod(int(n.strip('<=')) for n in dims.split(',') if n) * bits // 8
    return total


def _walk(module: _Module, computation: str, times: int, at_least: bool,
          mesh: Mapping[str, int]) -> Iterator[Collective]:
    instructions = module.computations.get(computation, {})
    for name, text in instructions.items():
        if not _INTERESTING.search(text):
            continue
        instruction = _split(name, text)
        if match := _COLLECTIVE.match(instruction.opcode):
            if not _continues(instruction, instructions):
                kind = 'reduce-scatter' if computation.startswith('all-reduce-scatter') else match[1]
                yield _collective(kind, instruction, instructions, mesh, times, at_least)
        elif instruction.opcode == 'while':
            trips = _trip_count(module, computation, instruction)
            body = re.search(r'\bbody=%?([\w.\-]+)', instruction.attributes)[1]
            yield from _walk(module, body, times * (1 if trips is None else trips), at_least or trips is None,
                             mesh)
        elif instruction.opcode not in ('async-update', 'async-done'):     # these repeat their start's name
            names = [name for names in _BRANCHES.findall(instruction.attributes) for name in names.split(',')]
            for called in (*_CALLED.findall(instruction.attributes), *names):
                yield from _walk(module, called.strip().lstrip('%'), times, at_least, mesh)


def _continues(instruction: _Instruction, neighbours: Mapping[str, str]) -> bool:
    """Whether this is a later step of a collective that was counted at its start.

    The TPU compiler spreads a collective over several fusions, which all repeat the instruction; the first
    one has a custom call AsyncCollectiveStart."""
    return ('async_collective_fusion_config' in instruction.attributes
            and not any('"AsyncCollectiveStart"' in text for text in neighbours.values()))


def _collective(kind: str, instruction: _Instruction, neighbours: Mapping[str, str], mesh: Mapping[str, int],
                times: int, at_least: bool) -> Collective:
    groups = _groups(instruction.attributes, math.prod(mesh.values()))
    shapes = [_split(name, neighbours[name]).shape for name in instruction.operands if name in neighbours]
    size = sum(_shape_bytes(shape) for shape in shapes)
    group_size = max((len(group) for group in groups), default=0)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind=kind, axes=_axes(groups, mesh), bytes=size * group_size if kind == 'all-gather' else size,
        count=times, at_least=at_least, group_size=group_size, name=instruction.name,
        source=source[1] if source else '',
        shapes=tuple(f'{dtype}[{dims}]' for shape in shapes for dtype, dims in _ARRAY.findall(shape)))


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
    """mesh['a'=2,'b'=8] {'b':(2)4}: groups along parts of axes; (p)n is [p, n, rest][1] of its axis."""
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


def _trip_count(module: _Module, computation: str, loop: _Instruction) -> int | None:
    """Iterations of a while loop: known to XLA, else computed from start, step and bound, else None."""
    if known := re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.attributes):
        return int(known[1])
    condition = re.search(r'\bcondition=%?([\w.\-]+)', loop.attributes)[1]
    body = re.search(r'\bbody=%?([\w.\-]+)', loop.attributes)[1]
    compare = module.read(condition, module.roots.get(condition, ''))
    if compare is None or compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
        return _only_constant(module, condition)
    counter, bound = (module.read(condition, name) for name in compare.operands)
    index = counter and re.search(r'\bindex=(\d+)', counter.attributes)
    limit = _constant(module, condition, compare.operands[1]) if bound else None
    if limit is None or not index:
        return _only_constant(module, condition)
    start = _constant(module, computation, _element(module, computation, loop.operands[0], int(index[1])))
    step = _step(module, body, _element(module, body, module.roots.get(body, ''), int(index[1])))
    return max(0, math.ceil((limit - (start or 0)) / step))


def _only_constant(module: _Module, condition: str) -> int | None:
    """The bound of a condition whose comparison is inside a fusion: its only integer."""
    found = [re.search(r'^[su]\d+\[\]\S* constant\((-?\d+)\)', text)
             for text in module.computations[condition].values()]
    values = {int(match[1]) for match in found if match}
    return values.pop() if len(values) == 1 else None


def _element(module: _Module, computation: str, name: str, index: int) -> str:
    """The name of element `index` of a tuple instruction; '' if it is no tuple."""
    instruction = module.read(computation, name)
    return instruction.operands[index] if instruction and instruction.opcode == 'tuple' else ''


def _constant(module: _Module, computation: str, name: str) -> int | None:
    """The integer behind a name, through copies."""
    instruction = _behind_copies(module, computation, name, 'convert')
    number = instruction and instruction.opcode == 'constant' and instruction.operands[0]
    return int(number) if number and re.fullmatch(r'-?\d+', number) else None


def _step(module: _Module, body: str, name: str) -> int:
    """The number that a loop body adds to its counter; 1 if that is inside a fusion."""
    instruction = _behind_copies(module, body, name)
    if instruction is None or instruction.opcode != 'add':
        return 1
    return next(filter(None, (_constant(module, body, operand) for operand in instruction.operands)), 1)


def _behind_copies(module: _Module, computation: str, name: str, *also: str) -> _Instruction | None:
    instruction = module.read(computation, name)
    while instruction and instruction.opcode in ('copy', 'bitcast', *also):
        instruction = module.read(computation, instruction.operands[0])
    return instruction
