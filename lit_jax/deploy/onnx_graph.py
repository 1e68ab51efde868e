"""Builds ONNX graphs out of traced JAX functions. `onnx_operators` has the table of operators.

A traced function is a list of equations between arrays. Those between weights and other constants are
computed here; the others become nodes. A broadcast is not carried out until somebody needs it: most
operators of ONNX broadcast by themselves. Sizes that are not known, such as the batch, are names."""
import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_jax.runtime.errors import UserError, shown_name

OPSET = 20
SMALL = 1024         # bytes up to which a constant stands in the graph itself
INT8_LEAST = 4096    # weights of a matrix from which on it is stored in int8
Shape = tuple


@dataclass(frozen=True)
class Value:
    """An array of the traced function: `held` is its content, or the name of a tensor of the graph. Axes of
    size 1 in `shape` may stand for any size (a broadcast that was put off)."""
    held: Any
    shape: Shape
    label: str = ''

    @property
    def known(self) -> bool:
        return not isinstance(self.held, str)


class Weights:
    """The constants of a graph and of those inside it. int8: matrices are stored in 8 bit."""

    def __init__(self, int8: bool = False):
        self.int8, self.arrays, self._names = int8, {}, {}
        self.errors: list[float] = []
        self._count = 0

    def fresh(self, hint: str = 'v') -> str:
        self._count += 1
        return f'{hint}_{self._count}'

    def name(self, array: np.ndarray, label: str = '') -> str:
        """The name under which the array is stored; the same memory, or the same small content, once."""
        array = np.asarray(array)
        where = array.__array_interface__['data'][0], array.strides
        key = (array.tobytes() if array.nbytes <= SMALL else where, array.shape, array.dtype.str)
        if key not in self._names:
            self._names[key] = self.fresh(label or 'constant')
            self.arrays[self._names[key]] = array
        return self._names[key]


class Graph:
    """One graph: the whole, or the body of a loop or a branch, which sees the tensors of those around it."""

    def __init__(self, operators: dict[str, Callable], weights: Weights, sizes: dict[str, str]):
        self.operators, self.weights, self.sizes = operators, weights, sizes
        self.nodes: list = []
        self._shapes: dict[tuple, str] = {}

    def inner(self) -> 'Graph':
        return Graph(self.operators, self.weights, self.sizes)

    def node(self, kind: str, inputs: Sequence, outputs: int = 1, **attributes):
        """Adds a node; returns the name of its output, or their names. inputs: names or arrays."""
        from onnx import helper
        names = [self.weights.fresh(kind) for _ in range(outputs)]
        inputs = [x if isinstance(x, str) else self.weights.name(x) for x in inputs]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    # Reading values

    def name(self, value: Value) -> str:
        """The tensor, not broadcast."""
        return self.weights.name(value.held, value.label) if value.known else value.held

    def full(self, value: Value, shape: Shape) -> str:
        """The tensor in its whole shape."""
        if same(value.shape, shape):
            return self.name(value)
        if value.known and is_static(shape):
            return self.weights.name(np.broadcast_to(value.held, shape))
        return self.node('Expand', [self.name(value), self.shape(shape)])

    def shape(self, shape: Shape) -> str | np.ndarray:
        """A shape as a tensor of int64."""
        if is_static(shape):
            return np.array(shape, np.int64)
        key = tuple(map(str, shape))
        if key not in self._shapes:
            self._shapes[key] = self.node('Concat', [self.size(size) for size in shape], axis=0)
        return self._shapes[key]

    def size(self, size) -> str | np.ndarray:
        """A size as a tensor [1] of int64: a number, or computed from the sizes of the inputs."""
        if isinstance(size, int | np.integer):
            return np.array([size], np.int64)
        return self._expression(ast.parse(str(size), mode='eval').body)

    def _expression(self, node):
        operators = {ast.Add: 'Add', ast.Sub: 'Sub', ast.Mult: 'Mul'}
        calls = {'floordiv': 'Div', 'mod': 'Mod', 'max': 'Max', 'min': 'Min'}
        if isinstance(node, ast.Name):
            return self.sizes[node.id]
        if isinstance(node, ast.Constant):
            return np.array([node.value], np.int64)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self.node('Neg', [self._expression(node.operand)])
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return self.node(operators[type(node.op)], [self._expression(node.left),
                                                        self._expression(node.right)])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            return self.node('Pow', [self._expression(node.left), self._expression(node.right)])
        if isinstance(node, ast.Call) and node.func.id in calls:
            return self.node(calls[node.func.id], [self._expression(part) for part in node.args])
        raise unwritable(f'the size {ast.unparse(node)}')

    def reshape(self, name: str, before: Shape, after: Shape) -> str:
        """A tensor in another shape; one size that is not known is left to ONNX to find."""
        if same(before, after):
            return name
        open_sizes = [size for size in after if not isinstance(size, int | np.integer)]
        if len(open_sizes) == 1 and 0 not in after:
            after = tuple(size if isinstance(size, int | np.integer) else -1 for size in after)
        return self.node('Reshape', [name, self.shape(after)])

    def transpose(self, name: str, order: Sequence[int]) -> str:
        return name if list(order) == sorted(order) else self.node('Transpose', [name],
                                                                   perm=[int(axis) for axis in order])

    # Running a traced function

    def run(self, jaxpr, consts: Sequence, arguments: Sequence[Value]) -> list[Value]:
        """The results of a jaxpr for these arguments."""
        env: dict[Any, Value] = {}
        for variables, values in ((jaxpr.constvars, map(constant, consts)), (jaxpr.invars, arguments)):
            env |= dict(zip(variables, values, strict=True))

        def read(atom) -> Value:
            return constant(atom.val) if hasattr(atom, 'val') else env[atom]

        equations = needed(jaxpr)
        last = last_uses(equations, jaxpr.outvars)
        for number, eqn in enumerate(equations):
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            env |= {variable: result for variable, result in zip(eqn.outvars, results, strict=True)}
            for variable in last.get(number, ()):
                env.pop(variable, None)      # arrays that are not needed any more
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name not in self.operators:
            raise unwritable(f'the operator {shown_name(name)} of JAX')
        return self.operators[name](self, eqn, values)


def constant(value, label: str = '') -> Value:
    array = np.asarray(value)
    return Value(array, array.shape, label)


def needed(jaxpr) -> list:
    """The equations that the results depend on."""
    wanted, kept = {atom for atom in jaxpr.outvars if not hasattr(atom, 'val')}, []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            wanted |= {atom for atom in eqn.invars if not hasattr(atom, 'val')}
            kept.append(eqn)
    return kept[::-1]


def last_uses(equations: Sequence, results: Sequence) -> dict[int, list]:
    """{number of an equation: variables that nothing behind it reads}."""
    last, kept = {}, {atom for atom in results if not hasattr(atom, 'val')}
    for number, eqn in enumerate(equations):
        last |= {atom: number for atom in [*eqn.invars, *eqn.outvars] if not hasattr(atom, 'val')}
    found: dict[int, list] = {}
    for variable, number in last.items():
        if variable not in kept:
            found.setdefault(number, []).append(variable)
    return found


def is_static(shape: Shape) -> bool:
    return all(isinstance(size, int | np.integer) for size in shape)


def same(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b, strict=True))


def unwritable(what: str) -> UserError:
    return UserError(f'{what} has no form in ONNX here, so this model cannot be written as ONNX; give '
                     '--to stablehlo, which needs no operators of its own')


def quantized(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [K, N], scale [N]): each column by its largest weight."""
    scale = np.maximum(np.abs(matrix).max(0), np.finfo(np.float32).tiny) / 127
    return np.rint(matrix / scale).astype(np.int8), scale.astype(np.float32)


def external(arrays: dict[str, np.ndarray], location: str) -> Iterator[tuple[Any, np.ndarray | None, int]]:
    """(initializer, array to be written, its offset in the file) of each constant; None: it is inside."""
    from onnx import TensorProto, helper, numpy_helper
    offset = 0
    for name, array in arrays.items():
        if array.nbytes <= SMALL:
            yield numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name), None, 0
            continue
        offset += -offset % 4096      # so that the file can be mapped into memory
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL,
                             data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        for key, value in (('location', location), ('offset', offset), ('length', array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        yield tensor, array, offset
        offset += array.nbytes
