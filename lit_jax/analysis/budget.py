"""Costs of the blocks of a hybrid, and the blocks that keep their attention for a budget.

All blocks of a teacher have one mixer here, and all others of its student another, so what a hybrid costs
depends only on how many blocks keep theirs; which ones is decided by the errors of the others."""
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_jax.models.cost import state_bytes
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError, human_bytes, shown
from lit_jax.training.flops import forward_macs, mixer_macs

_UNITS = {'': 1, 'kb': 1000, 'mb': 1000 ** 2, 'gb': 1000 ** 3, 'kib': 2 ** 10, 'mib': 2 ** 20, 'gib': 2 ** 30}
_BUDGET = re.compile(r'(softmax|gmacs|state)=([0-9.eE+-]+) ?([a-zA-Z]*)')


@dataclass(frozen=True)
class Costs:
    """What hybrids of a teacher cost.

    Attributes:
        depth: blocks. macs, state: (of a block of the teacher, of a new one): multiply-accumulates of its
            mixer for one image, and bytes of state (None: not defined for that mixer).
        new_macs, teacher_macs: of one forward pass of the model with new mixers only, and of the teacher,
            for one image."""
    depth: int
    macs: tuple[int, int]
    state: tuple[int | None, int | None]
    new_macs: int
    teacher_macs: int

    @staticmethod
    def of(teacher: Network, student: Network) -> 'Costs':
        """student: with its new mixer in every block."""
        depth, pair = student.arch['depth'], (teacher, student)

        def share(total: int | None) -> int | None:
            return None if total is None else total // depth

        return Costs(depth, tuple(mixer_macs(one) // depth for one in pair),
                     tuple(share(state_bytes(one.arch)) for one in pair), forward_macs(student),
                     forward_macs(teacher))

    def gmacs(self, kept: int) -> float:
        """10^9 multiply-accumulates of a forward pass for one image, where `kept` blocks keep theirs."""
        return (self.new_macs + kept * (self.macs[0] - self.macs[1])) / 1e9

    def state_bytes(self, kept: int) -> int | None:
        """Bytes of state of all blocks for one image."""
        old, new = self.state
        return None if old is None or new is None else kept * old + (self.depth - kept) * new


@dataclass(frozen=True)
class Budget:
    """'softmax=0.25': the share of blocks that keep their attention; 'gmacs=110': of a forward pass for one
    image; 'state=12MiB': bytes that all blocks keep between the tokens of one image."""
    text: str
    kind: str
    most: float

    @staticmethod
    def parse(text: str) -> 'Budget':
        found = _BUDGET.fullmatch(text.strip())
        kind, number, unit = found.groups() if found else ('', 'nan', '')
        units = _UNITS if kind == 'state' else {'': 1}
        try:
            most = float(number) * units.get(unit.lower(), math.nan)
        except ValueError:
            most = math.nan
        if not math.isfinite(most) or most < 0:
            raise UserError(f'--budget={shown(text)}: give softmax=SHARE, gmacs=NUMBER or state=BYTES, such '
                            f'as softmax=0.25, gmacs=110 or state=12MiB')
        return Budget(text, kind, most)

    def kept(self, costs: Costs) -> int:
        """The most blocks that may keep their attention; at least one becomes new. UserError, with the range
        that can be reached, where none fits."""
        cost, say = self._cost(costs)
        numbers = range(costs.depth) if self.kind != 'softmax' else range(costs.depth + 1)
        values = [cost(kept) for kept in numbers]
        if None in values:
            raise UserError(f'--budget={self.text}: one of the two mixers does not define the bytes of its '
                            f'state; give softmax=SHARE or gmacs=NUMBER')
        most = self.most * (1 + 1e-9)
        fitting = [kept for kept, value in zip(numbers, values, strict=True) if value <= most]
        if not fitting or (self.kind == 'softmax' and self.most > 1):
            raise UserError(f'--budget={self.text} cannot be met: hybrids of this teacher reach '
                            f'{say(min(values))} to {say(max(values))}')
        return min(fitting[-1], costs.depth - 1)

    def _cost(self, costs: Costs) -> tuple[Callable[[int], float | None], Callable[[float], str]]:
        """(cost by number of kept blocks, a cost in words)."""
        return {'softmax': (lambda kept: kept / costs.depth, lambda value: f'softmax={value:.3g}'),
                'gmacs': (costs.gmacs, lambda value: f'gmacs={math.ceil(value * 1e6) / 1e6:.10g}'),
                'state': (costs.state_bytes, lambda value: f'state={value:.0f} ({human_bytes(value)})')
                }[self.kind]


def worst_blocks(errors: Sequence[float], count: int) -> list[int]:
    """The `count` blocks with the largest errors, in order."""
    return sorted(sorted(range(len(errors)), key=lambda block: -errors[block])[:count])
