"""Multiply-accumulates (MACs) of a traced program, by parameter.

A program is traced, never run. Each matrix product and convolution is counted for the parameter that it
multiplies with; products of activations with each other (attention maps, states) are counted under PRODUCTS.
So what a paper leaves out of its count can be left out by name, whatever the module's code.

Loops count by their length; a loop whose length depends on the data counts once. Of alternative forms for
different platforms the most expensive counts: they compute the same thing, and a kernel that hides its
products must not make them free. But a grouped product (`jax.lax.ragged_dot`) counts one group for each row,
and where one form is such a product the others, which pad their groups, do not count. Element-wise work is
not counted, as in the papers."""
import math
from collections import Counter
from collections.abc import Callable, Sequence

import jax
from jax.extend import core

PRODUCTS = ''           # the account of products without a parameter
GROUPED = 'ragged_dot_general'

# Sources of a value: names of parameters, none (a constant), or None if it depends on the input.
Source = frozenset | None


def count_macs(fn: Callable, *args) -> int:
    """Multiply-accumulates of one call of `fn`; args may be ShapeDtypeStructs."""
    return sum(macs_by_parameter(lambda params, *rest: fn(*rest), {}, *args).values())


def macs_by_parameter(fn: Callable, params, *args) -> Counter:
    """{path of a parameter: MACs of its products} of one `fn(params, *args)`. Paths of several parameters
    that were joined before the product are joined by spaces."""
    closed = jax.make_jaxpr(fn)(params, *args)
    paths = [jax.tree_util.keystr(path, simple=True, separator='/')
             for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    inputs: list[Source] = [frozenset({path}) for path in paths]
    inputs += [None] * (len(closed.jaxpr.invars) - len(inputs))
    return _walk(closed.jaxpr, inputs)[0]


def _walk(jaxpr: core.Jaxpr, inputs: Sequence[Source]) -> tuple[Counter, list[Source]]:
    """(the accounts of a program, the sources of its outputs) from the sources of its inputs."""
    known: dict = dict.fromkeys(jaxpr.constvars, frozenset()) | dict(zip(jaxpr.invars, inputs, strict=True))
    total: Counter = Counter()

    def source(var) -> Source:
        return frozenset() if isinstance(var, core.Literal) else known[var]

    for eqn in jaxpr.eqns:
        operands = [source(var) for var in eqn.invars]
        if eqn.primitive.name in PRODUCT_MACS:
            total[_account(operands[:2])] += PRODUCT_MACS[eqn.primitive.name](eqn)
            outputs = None
        else:
            inner, outputs = _inside(eqn, operands)
            total.update(inner)
        if outputs is None or len(outputs) != len(eqn.outvars):
            outputs = [_join(operands)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return total, [source(var) for var in jaxpr.outvars]


def _account(operands: Sequence[Source]) -> str:
    """The parameters of the one operand that consists of parameters alone; otherwise PRODUCTS."""
    names = frozenset().union(*(names for names in operands if names is not None))
    return ' '.join(sorted(names)) or PRODUCTS


def _join(operands: Sequence[Source]) -> Source:
    made = [names for names in operands if names is not None]
    return frozenset().union(*made) if len(made) == len(operands) else None


def _inside(eqn, operands: list[Source]) -> tuple[Counter, list[Source] | None]:
    """The accounts of the programs that an operation calls, and its outputs' sources if they are known."""
    name, params = eqn.primitive.name, eqn.params
    if name == 'cond':
        exact = [branch for branch in params['branches'] if _has_grouped_product(_open(branch))]
        branches = [_walk(_open(branch), operands[1:]) for branch in exact or params['branches']]
        dearest = max(branches, key=lambda branch: branch[0].total())
        return dearest[0], list(map(_join, zip(*(branch[1] for branch in branches), strict=True)))
    if name == 'scan':
        turn = _open(params['jaxpr'])
        first, after = _carried(eqn, turn)
        # What is carried changes from turn to turn; what comes in slices stays what it was.
        body = [*operands[:first], *[None] * (after - first), *operands[after:]]
        counts, made = _walk(turn, body)
        return Counter({key: params['length'] * macs for key, macs in counts.items()}), made
    total: Counter = Counter()
    outputs: list[Source] | None = None
    for jaxpr in _inner_jaxprs(params):
        fits = len(jaxpr.invars) == len(operands) and name != 'while'
        counts, made = _walk(jaxpr, operands if fits else [None] * len(jaxpr.invars))
        outputs = made if fits else None
        total.update(counts)
    return total, outputs


def _carried(eqn, turn: core.Jaxpr) -> tuple[int, int]:
    """(first, after the last) of the inputs that a scan carries: constants come before them, slices after.
    Found by shapes, as jax 0.10 and 0.12 differ in names: slices lack the axis of the turns."""
    def whole(outside, inside) -> int:
        return sum(one.aval.shape == other.aval.shape for one, other in zip(outside, inside, strict=True))

    after = whole(eqn.invars, turn.invars)
    return after - whole(eqn.outvars, turn.outvars), after


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _has_grouped_product(jaxpr: core.Jaxpr) -> bool:
    return any(eqn.primitive.name == GROUPED or any(map(_has_grouped_product, _inner_jaxprs(eqn.params)))
               for eqn in jaxpr.eqns)


def _inner_jaxprs(params: dict):
    for value in params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                yield _open(inner)


def _of_dot(eqn) -> int:
    (contract, _), _ = eqn.params['dimension_numbers']
    return _size(eqn.outvars[0]) * _axes(eqn.invars[0], contract)


def _of_grouped_dot(eqn) -> int:
    numbers = eqn.params['ragged_dot_dimension_numbers']
    (contract, _), _ = numbers.dot_dimension_numbers
    macs = _size(eqn.outvars[0]) * _axes(eqn.invars[0], contract)
    # Where the groups divide the sum (the gradient of the weights), each row is in one of them only.
    groups = eqn.outvars[0].aval.shape[0] if set(numbers.lhs_ragged_dimensions) & set(contract) else 1
    return macs // groups


def _of_convolution(eqn) -> int:
    kernel = eqn.invars[1].aval.shape
    outputs = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
    return _size(eqn.outvars[0]) * math.prod(kernel) // outputs


def _size(var) -> int:
    return math.prod(var.aval.shape)


def _axes(var, axes: Sequence[int]) -> int:
    return math.prod(var.aval.shape[axis] for axis in axes)


PRODUCT_MACS = {'dot_general': _of_dot, GROUPED: _of_grouped_dot, 'conv_general_dilated': _of_convolution}
