"""Reads the text of compiled programs (HLO): computations, instructions, turns of loops."""
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from lit_jax.runtime.json_file import split_lines


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass
class Module:
    """Computations by name, each {instruction name: text after the equals sign}."""
    computations: dict[str, dict[str, str]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    entry: str = ''

    def read(self, computation: str, name: str) -> Instruction | None:
        text = self.computations.get(computation, {}).get(name)
        return None if text is None else split_instruction(name, text)


_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,<=]*)\]')
CALLED = re.compile(r'\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
BRANCHES = re.compile(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}')


def parse_module(text: str) -> Module:
    module, current = Module(), None
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


def split_instruction(name: str, text: str) -> Instruction:
    """Parses 'f32[4]{0} add(%a, %b), metadata={...}'."""
    text = re.sub(r'/\*.*?\*/', '', text)
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    opening = text.index('(', end)
    closing = _closing(text, opening)
    names = tuple(part.split()[-1].lstrip('%') for part in _top_level(text[opening + 1:closing]))
    return Instruction(name, text[:end], text[end:opening].strip(), names, text[closing + 1:])


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


def shape_bytes(shape: str) -> int:
    """Bytes of an array or tuple shape, without padding."""
    total = 0
    for dtype, dims in ARRAY.findall(shape):
        digits = re.search(r'\d+', dtype)
        bits = 8 if dtype == 'pred' else int(digits[0]) if digits else 0
        total += math.prod(int(n.strip('<=')) for n in dims.split(',') if n) * bits // 8
    return total


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
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


def _only_constant(module: Module, condition: str) -> int | None:
    """The bound of a condition whose comparison is inside a fusion: its only integer."""
    found = [re.search(r'^[su]\d+\[\]\S* constant\((-?\d+)\)', text)
             for text in module.computations[condition].values()]
    values = {int(match[1]) for match in found if match}
    return values.pop() if len(values) == 1 else None


def _element(module: Module, computation: str, name: str, index: int) -> str:
    """The name of element `index` of a tuple instruction; '' if it is no tuple."""
    instruction = module.read(computation, name)
    return instruction.operands[index] if instruction and instruction.opcode == 'tuple' else ''


def _constant(module: Module, computation: str, name: str) -> int | None:
    """The integer behind a name, through copies."""
    instruction = _behind_copies(module, computation, name, 'convert')
    number = instruction and instruction.opcode == 'constant' and instruction.operands[0]
    return int(number) if number and re.fullmatch(r'-?\d+', number) else None


def _step(module: Module, body: str, name: str) -> int:
    """The number that a loop body adds to its counter; 1 if that is inside a fusion."""
    instruction = _behind_copies(module, body, name)
    if instruction is None or instruction.opcode != 'add':
        return 1
    return next(filter(None, (_constant(module, body, operand) for operand in instruction.operands)), 1)


def _behind_copies(module: Module, computation: str, name: str, *also: str) -> Instruction | None:
    instruction = module.read(computation, name)
    while instruction and instruction.opcode in ('copy', 'bitcast', *also):
        instruction = module.read(computation, instruction.operands[0])
    return instruction
