"""Forecasts the time of a program compiled for a TPU from the estimates that its compiler chose tiles by.

Every fusion, copy and convolution in the text of such a program carries "estimated_cycles". Summed over the
program, loops times their turns, divided by the clock, they are the compute time of a device; collectives
have no estimate and get the time of their bytes on links of the published speed. No TPU has confirmed these
figures: they rank programs.

Parts of the model are told apart by the scopes (`jax.named_scope`) of SCOPES in the names of operations."""
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from lit_jax.plan.collectives import Collective
from lit_jax.plan.hlo import CALLED, Module, parse_module, split_instruction, trip_count
from lit_jax.runtime.chips import Chip
from lit_jax.runtime.json_file import split_lines

# scope in the name of an operation -> part of the model; the innermost one counts
SCOPES = {'mixer': 'mixer projections', 'linear_core': 'linear core', 'depthwise': 'depth-wise convolution',
          'softmax': 'softmax attention', 'ffn': 'feed-forward', 'adaln': 'adaLN, norms and gates',
          'optimizer': 'optimizer and EMA'}
COPIES, STACKING, OTHER = 'layout copies', 'stacking and slicing of layers', 'embedders, losses, the rest'
# Of collectives over n devices: bytes that each device sends, per byte of `Collective.bytes`
_TRAFFIC: dict[str, Callable[[int], float]] = {
    'all-reduce': lambda n: 2 * (n - 1) / n, 'all-gather': lambda n: (n - 1) / n,
    'reduce-scatter': lambda n: (n - 1) / n, 'all-to-all': lambda n: (n - 1) / n}


@dataclass(frozen=True)
class Operation:
    """One instruction with an estimate.

    Attributes:
        part: of the model. teacher: whether the teacher's.
        seconds: of all its executions in a step. times: how many they are.
        name, shape: in HLO. operation: the JAX operation. source: 'file:line', or ''."""
    part: str
    teacher: bool
    seconds: float
    times: int
    name: str
    shape: str
    operation: str
    source: str


@dataclass(frozen=True)
class Forecast:
    """What the compiler expects of a program on one device.

    Attributes:
        operations: all with an estimate, the most expensive first.
        links: (kind, axes, executions, bytes on the links, seconds) of the collectives, the longest first.
        flops: of the model's own count, per device. peak_flops: per second.
        unknown_loops: loops with unknown numbers of turns, counted once.
        kernels: Pallas kernels, which have no estimate."""
    operations: Sequence[Operation]
    links: Sequence[tuple[str, str, int, float, float]]
    flops: float
    peak_flops: float
    unknown_loops: int = 0
    kernels: int = 0

    @property
    def seconds(self) -> float:
        """Of compute."""
        return sum(operation.seconds for operation in self.operations)

    @property
    def mfu(self) -> float:
        """Of the compute time alone: the model's FLOPs over what the device could do in it."""
        return self.flops / self.peak_flops / self.seconds if self.operations else 0.0

    @property
    def link_seconds(self) -> float:
        """Of all collectives, one after the other."""
        return sum(link[-1] for link in self.links)

    def parts(self) -> dict[tuple[str, bool], float]:
        """{(part, whether the teacher's): seconds}, the longest first."""
        found: dict[tuple[str, bool], float] = defaultdict(float)
        for operation in self.operations:
            found[operation.part, operation.teacher] += operation.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def without(self, part: str, teacher: bool = False) -> float:
        """MFU if this part took no time."""
        rest = self.seconds - self.parts().get((part, teacher), 0.0)
        return self.flops / self.peak_flops / rest if rest > 0 else 0.0


def forecast(hlo_text: str, chip: Chip, flops: float, collectives: Sequence[Collective] = ()) -> Forecast:
    """hlo_text: `compiled.as_text()` of a program for `chip`. flops: of the model, per device."""
    module, unknown = parse_module(hlo_text), []
    frames = _Frames(hlo_text)
    found = [_operation(module, name, text, times, chip, frames)
             for name, text, times in _walk(module, module.entry, 1, unknown)]
    return Forecast(sorted(found, key=lambda operation: -operation.seconds), _links(collectives, chip), flops,
                    chip.peak_flops, len(unknown), hlo_text.count('custom_call_target="tpu_custom_call"'))


def _walk(module: Module, computation: str, times: int, unknown: list) -> Iterator[tuple[str, str, int]]:
    """(name, text, executions) of each instruction with an estimate."""
    for name, text in module.computations.get(computation, {}).items():
        if ' while(' in text:
            loop = split_instruction(name, text)
            turns = trip_count(module, computation, loop)
            if turns is None:
                unknown.append(name)
            body = re.search(r'\bbody=%?([\w.\-]+)', loop.attributes)
            yield from _walk(module, body[1], times * (1 if turns is None else turns), unknown)
        elif re.search(r' (?:call|conditional|async-start)\(', text):
            called = CALLED.findall(text)
            branches = re.search(r'branch_computations=\{([^}]*)\}', text)
            if branches:      # one of them runs: the dearest
                called = [max((part.strip().lstrip('%') for part in branches[1].split(',')),
                              key=functools.partial(_cycles_of, module))]
            for one in called:
                yield from _walk(module, one, times, unknown)
        if _cycles(text):
            yield name, text, times


def _cycles(text: str) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', text)
    return int(found[1]) if found else 0


def _cycles_of(module: Module, computation: str) -> int:
    return sum(_cycles(text) * times for _, text, times in _walk(module, computation, 1, []))


def _operation(module: Module, name: str, text: str, times: int, chip: Chip, frames: '_Frames') -> Operation:
    operation = _metadata(text, 'op_name')
    return Operation(part=_part(name, text, operation), teacher='teacher' in _scopes(operation),
                     seconds=_cycles(text) * times / chip.clock, times=times, name=name,
                     shape=re.match(r'\(.*?\)|\S+', text)[0], operation=operation, source=frames.source(text))


def _metadata(text: str, field: str) -> str:
    found = re.search(rf'\b{field}="([^"]*)"', text)
    return found[1] if found else ''


def _scopes(operation: str) -> list[str]:
    return re.findall(r'\w+', operation)


def _part(name: str, text: str, operation: str) -> str:
    if name.startswith('copy'):
        return COPIES
    if operation.rpartition('/')[2].startswith(('dynamic_update_slice', 'dynamic_slice', 'dynamic_index')):
        return STACKING
    scopes = [scope for scope in _scopes(operation) if scope in SCOPES]
    return SCOPES[scopes[-1]] if scopes else OTHER


class _Frames:
    """Source lines of instructions: beside them, or in tables at the top of the text."""

    def __init__(self, text: str):
        self._tables: dict[str, dict[str, str]] = {}
        table: dict[str, str] | None = None
        for line in split_lines(text[:text.find('\nENTRY')]):
            if re.fullmatch(r'FileNames|FunctionNames|FileLocations|StackFrames', line.strip()):
                table = self._tables.setdefault(line.strip(), {})
            elif table is not None and (row := re.match(r'\s*(\d+)\s+(.*)', line)):
                table[row[1]] = row[2]
            elif line.strip():
                table = None

    def source(self, text: str) -> str:
        file, line = _metadata(text, 'source_file'), re.search(r'source_line=(\d+)', text)
        if file and line:
            return f'{_short(file)}:{line[1]}'
        frame = re.search(r'stack_frame_id=(\d+)', text)
        return ' < '.join(self._of_frame(frame[1])) if frame else ''

    def _of_frame(self, frame: str) -> list[str]:
        """The line, and the first one in another file that called it: most products are those of `Linear`."""
        lines: list[str] = []
        while found := re.search(r'file_location_id=(\d+)(?: parent_frame_id=(\d+))?',
                                 self._tables.get('StackFrames', {}).get(frame, '')):
            where = self._tables.get('FileLocations', {}).get(found[1], '')
            name, line = (re.search(rf'\b{field}=(\d+)', where) for field in ('file_name_id', 'line'))
            if not name or not line:
                break
            file = _short(self._tables.get('FileNames', {}).get(name[1], '').strip('"'))
            if not lines or not lines[0].startswith(f'{file}:'):
                lines.append(f'{file}:{line[1]}')
            if len(lines) == 2 or found[2] is None:
                break
            frame = str(int(found[2]) - 1)      # 1: no parent
        return lines


def _short(file: str) -> str:
    """From the package on: 'lit_jax/models/ffn.py'."""
    parts = PurePath(file).parts
    return '/'.join(parts[parts.index('lit_jax'):] if 'lit_jax' in parts else parts[-1:])


def _links(collectives: Sequence[Collective], chip: Chip) -> list[tuple[str, str, int, float, float]]:
    groups: dict[tuple[str, str], list[float]] = {}
    for one in collectives:
        sent = one.total_bytes * _TRAFFIC.get(one.kind, lambda n: 1.0)(max(one.group_size, 1))
        row = groups.setdefault((one.kind, ' '.join(one.axes)), [0, 0.0])
        row[0], row[1] = row[0] + one.count, row[1] + sent
    rows = [(kind, axes, int(count), size, size / chip.link_bytes if chip.link_bytes else 0.0)
            for (kind, axes), (count, size) in groups.items()]
    return sorted(rows, key=lambda row: -row[-1])


def format_forecast(found: Forecast, chip: Chip, top: int = 10) -> str:
    """Times by part, MFU with and without each, the most expensive operations, links."""
    ms, peak = 1e3, found.flops / found.peak_flops
    lines = ["forecast of a step (the TPU compiler's own estimate; no TPU has confirmed it)",
             f'  compute {found.seconds * ms:.1f} ms a device, {peak * ms:.1f} ms at peak: '
             f'MFU {found.mfu:.1%}',
             f'  {"part":34}{"student":>10}{"teacher":>10}{"share":>8}{"MFU without it":>16}']
    parts = found.parts()
    for part in dict.fromkeys(part for part, _ in parts):
        own, teacher = parts.get((part, False), 0.0), parts.get((part, True), 0.0)
        rest = found.seconds - own - teacher
        without = f'{peak / rest:.1%}' if rest > 0 else ''
        lines.append(f'  {part:34}{own * ms:7.1f} ms{teacher * ms:7.1f} ms'
                     f'{(own + teacher) / found.seconds:8.1%}{without:>16}')
    lines.append(f'  the {top} most expensive operations')
    lines += [f'  {one.seconds * ms:7.2f} ms {one.times:>4} x {one.shape[:44]:44} {one.source or one.name}'
              for one in found.operations[:top]]
    if found.links:
        lines.append('  collectives, one after the other, from bytes and the published '
                     f'{chip.link_bytes / 1e9:g} GB/s that a chip sends: {found.link_seconds * ms:.1f} ms')
        lines += [f'  {seconds * ms:7.2f} ms {count:>6,} x {kind:20} {axes:18} {size / 2**20:,.0f} MiB sent'
                  for kind, axes, count, size, seconds in found.links]
    if found.unknown_loops:
        lines.append(f'  {found.unknown_loops} loops of unknown length were counted once')
    if found.kernels:
        lines.append(f'  {found.kernels} Pallas kernels have no estimate and are not counted: the step takes '
                     f'longer')
    return '\n'.join(lines)


def forecast_json(found: Forecast, top: int = 10) -> dict:
    """The same as plain data, seconds and bytes."""
    return {'confirmed_by_a_tpu': False, 'seconds': found.seconds, 'mfu': found.mfu,
            'peak_seconds': found.flops / found.peak_flops, 'link_seconds': found.link_seconds,
            'parts': [{'part': part, 'teacher': teacher, 'seconds': seconds,
                       'mfu_without': found.without(part, teacher)}
                      for (part, teacher), seconds in found.parts().items()],
            'operations': [vars(one) for one in found.operations[:top]],
            'links': [dict(zip(('kind', 'axes', 'count', 'bytes', 'seconds'), link, strict=True))
                      for link in found.links],
            'unknown_loops': found.unknown_loops, 'kernels': found.kernels}
