"""What each operator of JAX is in ONNX, for the operators that models and samplers consist of.

An operator is a function (graph, equation, values) -> values. Where all values are known it computes."""
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from lit_jax.deploy.onnx_graph import (
    INT8_LEAST,
    Graph,
    Shape,
    Value,
    is_static,
    quantized,
    unwritable,
)

OPERATORS: dict[str, Callable] = {}
FAR = np.iinfo(np.int64).max


def operator(*names: str):
    """Enters a function into the table."""
    def enter(function):
        OPERATORS.update(dict.fromkeys(names, function))
        return function
    return enter


def shape_of(eqn, number: int = 0) -> Shape:
    return tuple(eqn.outvars[number].aval.shape)


def computed(eqn, values: Sequence[Value]) -> list[Value] | None:
    """The results by JAX, if everything is known."""
    shapes = [tuple(atom.aval.shape) for atom in eqn.invars]
    static = [*shapes, *(tuple(out.aval.shape) for out in eqn.outvars)]
    if not all(value.known for value in values) or not all(map(is_static, static)):
        return None
    arrays = [np.broadcast_to(value.held, shape) for value, shape in zip(values, shapes, strict=True)]
    results = eqn.primitive.bind(*arrays, **eqn.params)
    results = results if eqn.primitive.multiple_results else [results]
    return [Value(np.asarray(result), np.shape(result)) for result in results]


def folding(function):
    """The operator, or its result if everything is known."""
    @functools.wraps(function)
    def run(graph, eqn, values):
        return computed(eqn, values) or function(graph, eqn, values)
    return run


# Element by element

def elementwise(emit: Callable[..., str]):
    """An operator from (graph, equation, names) -> name. Broadcasts are left to ONNX."""
    def run(graph, eqn, values):
        rank = len(shape_of(eqn))
        if all(value.known for value in values):
            arrays = np.broadcast_arrays(*(value.held for value in values))
            result = np.asarray(eqn.primitive.bind(*arrays, **eqn.params))
            return [Value(result, result.shape)]
        shape = functools.reduce(broadcast, (value.shape for value in values))
        assert len(shape) == rank
        return [Value(emit(graph, eqn, [graph.name(value) for value in values]), shape)]
    return run


def broadcast(a: Shape, b: Shape) -> Shape:
    if len(a) != len(b):
        return max(a, b, key=len)      # one of them is a number
    return tuple(y if str(x) == '1' else x for x, y in zip(a, b, strict=True))


def plainly(kind: str):
    return elementwise(lambda graph, eqn, names: graph.node(kind, names))


for _name, _kind in {
        'add': 'Add', 'add_any': 'Add', 'sub': 'Sub', 'mul': 'Mul', 'div': 'Div', 'max': 'Max', 'min': 'Min',
        'pow': 'Pow', 'exp': 'Exp', 'log': 'Log', 'tanh': 'Tanh', 'sin': 'Sin', 'cos': 'Cos', 'neg': 'Neg',
        'abs': 'Abs', 'sign': 'Sign', 'floor': 'Floor', 'ceil': 'Ceil', 'sqrt': 'Sqrt', 'logistic': 'Sigmoid',
        'erf': 'Erf', 'lt': 'Less', 'le': 'LessOrEqual', 'gt': 'Greater', 'ge': 'GreaterOrEqual',
        'eq': 'Equal', 'and': 'And', 'or': 'Or', 'not': 'Not'}.items():
    OPERATORS[_name] = plainly(_kind)


def chain(*kinds: str):
    """Operators of one input, one after the other."""
    return elementwise(lambda graph, eqn, names: functools.reduce(
        lambda name, kind: graph.node(kind, [name]), kinds, names[0]))


def one(eqn) -> np.ndarray:
    return np.ones((), eqn.outvars[0].aval.dtype)


OPERATORS |= {
    'rsqrt': chain('Sqrt', 'Reciprocal'),
    'square': elementwise(lambda graph, eqn, names: graph.node('Mul', names * 2)),
    'ne': elementwise(lambda graph, eqn, names: graph.node('Not', [graph.node('Equal', names)])),
    'erfc': elementwise(lambda graph, eqn, names: graph.node('Sub', [one(eqn), graph.node('Erf', names)])),
    'log1p': elementwise(lambda graph, eqn, names: graph.node(
        'Log', [graph.node('Add', [*names, one(eqn)])])),
    'expm1': elementwise(lambda graph, eqn, names: graph.node('Sub', [graph.node('Exp', names), one(eqn)])),
    'clamp': elementwise(lambda graph, eqn, names: graph.node(
        'Min', [graph.node('Max', names[:2]), names[2]])),
}


def _integer_pow(graph, eqn, names):
    power = eqn.params['y']
    if power in (2, 3):
        squared = graph.node('Mul', names * 2)
        return squared if power == 2 else graph.node('Mul', [squared, *names])
    if power == -1:
        return graph.node('Reciprocal', names)
    return graph.node('Pow', [*names, np.asarray(power, eqn.outvars[0].aval.dtype)])


OPERATORS['integer_pow'] = elementwise(_integer_pow)


@operator('convert_element_type')
def _convert(graph, eqn, values):
    dtype = np.dtype(eqn.params['new_dtype'])
    value, = values
    if value.known:
        return [Value(value.held.astype(dtype, copy=False), value.shape, value.label)]
    if eqn.invars[0].aval.dtype == dtype:
        return values
    return [Value(cast(graph, value.held, dtype), value.shape)]


def cast(graph: Graph, name: str, dtype) -> str:
    from onnx import helper
    return graph.node('Cast', [name], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


@operator('copy', 'copy_p', 'stop_gradient', 'optimization_barrier', 'reduce_precision',
          'sharding_constraint')
def _pass_on(graph, eqn, values):
    return list(values)


@operator('select_n')
def _select(graph, eqn, values):
    if result := computed(eqn, values):
        return result
    which, *cases = values
    if len(cases) != 2:
        raise unwritable(f'a choice of {len(cases)}')
    name = graph.name(which)
    if eqn.invars[0].aval.dtype != np.bool_:
        name = cast(graph, name, np.bool_)
    shape = functools.reduce(broadcast, (value.shape for value in values))
    return [Value(graph.node('Where', [name, graph.name(cases[1]), graph.name(cases[0])]), shape)]


# Shapes

@operator('reshape')
def _reshape(graph, eqn, values):
    value, before, after = values[0], tuple(eqn.invars[0].aval.shape), shape_of(eqn)
    if value.known and is_static(before):
        return [Value(np.broadcast_to(value.held, before).reshape(after), after, value.label)]
    return [Value(graph.reshape(graph.full(value, before), before, after), after)]


@operator('squeeze')
def _squeeze(graph, eqn, values):
    value, axes = values[0], {int(axis) for axis in eqn.params['dimensions']}
    shape = tuple(size for axis, size in enumerate(value.shape) if axis not in axes)
    if value.known:
        return [Value(value.held.reshape(shape), shape, value.label)]
    return [Value(graph.node('Squeeze', [value.held, np.array(sorted(axes), np.int64)]), shape)]


@operator('broadcast_in_dim')
def _broadcast_in_dim(graph, eqn, values):
    """The axes in their new places; the broadcast itself is put off."""
    value, after = values[0], shape_of(eqn)
    places = [int(axis) for axis in eqn.params['broadcast_dimensions']]
    shape = [1] * len(after)
    for place, size in zip(places, value.shape, strict=True):
        shape[place] = size
    shape = tuple(shape)
    if value.known:
        return [Value(value.held.reshape(shape), shape, value.label)]
    added = [axis for axis in range(len(after)) if axis not in places]
    name = graph.node('Unsqueeze', [value.held, np.array(added, np.int64)]) if added else value.held
    return [Value(name, shape)]


@operator('transpose')
def _transpose(graph, eqn, values):
    value, order = values[0], [int(axis) for axis in eqn.params['permutation']]
    shape = tuple(value.shape[axis] for axis in order)
    if value.known:
        return [Value(value.held.transpose(order), shape, value.label)]
    return [Value(graph.transpose(value.held, order), shape)]


@operator('slice')
def _slice(graph, eqn, values):
    value, sizes = values[0], tuple(eqn.invars[0].aval.shape)
    starts, limits = eqn.params['start_indices'], eqn.params['limit_indices']
    steps = eqn.params['strides'] or (1,) * len(starts)
    if value.known and is_static(sizes):
        held = np.broadcast_to(value.held, sizes)[tuple(map(slice, starts, limits, steps))]
        label = f'{value.label}[{starts[0]}]' if value.label and starts else ''
        return [Value(held, held.shape, label)]
    cut = [axis for axis, size in enumerate(sizes)
           if not (str(starts[axis]) == '0' and str(limits[axis]) == str(size) and steps[axis] == 1)]
    if not cut:
        return values
    ends = [np.array([FAR]) if str(limits[axis]) == str(sizes[axis]) else graph.size(limits[axis])
            for axis in cut]
    bounds = [joined(graph, [graph.size(starts[axis]) for axis in cut]), joined(graph, ends)]
    name = graph.full(value, sizes)
    axes, strides = np.array(cut, np.int64), np.array([steps[axis] for axis in cut], np.int64)
    return [Value(graph.node('Slice', [name, *bounds, axes, strides]), shape_of(eqn))]


def joined(graph: Graph, parts: Sequence) -> str | np.ndarray:
    if all(not isinstance(part, str) for part in parts):
        return np.concatenate(parts).astype(np.int64)
    return graph.node('Concat', parts, axis=0) if len(parts) > 1 else parts[0]


@operator('dynamic_slice')
@folding
def _dynamic_slice(graph, eqn, values):
    value, starts = values[0], values[1:]
    shape, slices = tuple(eqn.invars[0].aval.shape), eqn.params['slice_sizes']
    cut = [axis for axis, size in enumerate(shape) if str(size) != str(slices[axis])]      # not whole
    if not cut:
        return [value]
    sizes, wanted = ([sides[axis] for axis in cut] for sides in (shape, slices))
    if not is_static((*sizes, *wanted)):
        raise unwritable('a slice of an axis of unknown size')
    begin = [graph.node('Reshape', [cast(graph, graph.name(starts[axis]), np.int64), np.array([1], np.int64)])
             for axis in cut]
    begin = graph.node('Concat', begin, axis=0)
    begin = graph.node('Max', [begin, np.zeros(len(cut), np.int64)])
    begin = graph.node('Min', [begin, np.array(sizes, np.int64) - np.array(wanted, np.int64)])
    end = graph.node('Add', [begin, np.array(wanted, np.int64)])
    name = graph.node('Slice', [graph.full(value, shape), begin, end, np.array(cut, np.int64)])
    return [Value(name, shape_of(eqn))]


@operator('rev')
@folding
def _reverse(graph, eqn, values):
    axes = np.array(eqn.params['dimensions'], np.int64)
    back = np.full_like(axes, -1)
    name = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
    return [Value(graph.node('Slice', [name, back, np.full_like(axes, -FAR), axes, back]), shape_of(eqn))]


@operator('pad')
@folding
def _pad(graph, eqn, values):
    config = eqn.params['padding_config']
    if any(interior for _, _, interior in config):
        raise unwritable('padding between elements')
    pads = np.array([side[end] for end in (0, 1) for side in config], np.int64)
    name = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
    return [Value(graph.node('Pad', [name, pads, graph.name(values[1])]), shape_of(eqn))]


@operator('concatenate')
@folding
def _concatenate(graph, eqn, values):
    names = [graph.full(value, tuple(atom.aval.shape))
             for value, atom in zip(values, eqn.invars, strict=True)]
    return [Value(graph.node('Concat', names, axis=int(eqn.params['dimension'])), shape_of(eqn))]


@operator('stack')
@folding
def _stack(graph, eqn, values):
    axis = np.array([eqn.params['axis']], np.int64)
    names = [graph.node('Unsqueeze', [graph.full(value, tuple(atom.aval.shape)), axis])
             for value, atom in zip(values, eqn.invars, strict=True)]
    return [Value(graph.node('Concat', names, axis=int(axis[0])), shape_of(eqn))]


@operator('tile')
@folding
def _tile(graph, eqn, values):
    name = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
    return [Value(graph.node('Tile', [name, graph.shape(tuple(eqn.params['reps']))]), shape_of(eqn))]


@operator('split')
@folding
def _split(graph, eqn, values):
    name = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
    sizes = joined(graph, [graph.size(size) for size in eqn.params['sizes']])
    names = graph.node('Split', [name, sizes], len(eqn.outvars),
                       axis=int(eqn.params['axis']))
    names = names if isinstance(names, list) else [names]
    return [Value(part, shape_of(eqn, number)) for number, part in enumerate(names)]


@operator('iota')
def _iota(graph, eqn, values):
    size, axis = eqn.params['shape'][eqn.params['dimension']], int(eqn.params['dimension'])
    dtype, rank = np.dtype(eqn.params['dtype']), len(eqn.params['shape'])
    shape = tuple(size if place == axis else 1 for place in range(rank))
    if is_static(shape):
        return [Value(np.arange(size, dtype=dtype).reshape(shape), shape)]
    zero, step = np.zeros((), np.int64), np.ones((), np.int64)
    end = graph.node('Squeeze', [graph.size(size), np.array([0], np.int64)])
    name = cast(graph, graph.node('Range', [zero, end, step]), dtype)
    others = np.array([place for place in range(rank) if place != axis], np.int64)
    return [Value(graph.node('Unsqueeze', [name, others]) if rank > 1 else name, shape)]


@operator('dim_as_value')
def _dim_as_value(graph, eqn, values):
    size = graph.node('Squeeze', [graph.size(eqn.params['dim']), np.array([0], np.int64)])
    return [Value(cast(graph, size, eqn.outvars[0].aval.dtype), ())]


# Sums and searches

def reduction(kind: str):
    def run(graph, eqn, values):
        axes = np.array([int(axis) for axis in eqn.params['axes']], np.int64)
        name = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
        return [Value(graph.node(kind, [name, axes], keepdims=0), shape_of(eqn))]
    return folding(run)


OPERATORS |= {'reduce_sum': reduction('ReduceSum'), 'reduce_max': reduction('ReduceMax'),
              'reduce_min': reduction('ReduceMin'), 'reduce_prod': reduction('ReduceProd')}


@operator('reduce_or', 'reduce_and')
@folding
def _reduce_bool(graph, eqn, values):
    axes = np.array([int(axis) for axis in eqn.params['axes']], np.int64)
    name = cast(graph, graph.full(values[0], tuple(eqn.invars[0].aval.shape)), np.int32)
    kind = 'ReduceMax' if eqn.primitive.name == 'reduce_or' else 'ReduceMin'
    return [Value(cast(graph, graph.node(kind, [name, axes], keepdims=0), np.bool_), shape_of(eqn))]


@operator('argmax', 'argmin')
@folding
def _argmax(graph, eqn, values):
    axis, = eqn.params['axes']
    kind = 'ArgMax' if eqn.primitive.name == 'argmax' else 'ArgMin'
    whole = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
    name = graph.node(kind, [whole], axis=int(axis), keepdims=0)
    return [Value(cast(graph, name, eqn.params['index_dtype']), shape_of(eqn))]


@operator('top_k')
@folding
def _top_k(graph, eqn, values):
    name = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
    axis = int(eqn.params.get('axis', -1))
    best, index = graph.node('TopK', [name, np.array([eqn.params['k']], np.int64)], 2, axis=axis)
    index = cast(graph, index, eqn.outvars[1].aval.dtype)
    return [Value(best, shape_of(eqn)), Value(index, shape_of(eqn, 1))]


@operator('cumsum')
@folding
def _cumsum(graph, eqn, values):
    name = graph.full(values[0], tuple(eqn.invars[0].aval.shape))
    axis = np.array(eqn.params['axis'], np.int64)
    return [Value(graph.node('CumSum', [name, axis], reverse=int(eqn.params['reverse'])), shape_of(eqn))]


@operator('gather')
@folding
def _gather(graph, eqn, values):
    """Whole slices along one axis, picked by an index."""
    numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
    operand, index = (tuple(atom.aval.shape) for atom in eqn.invars)
    axis = int(numbers.start_index_map[0])
    whole = all(str(size) == str(operand[place]) for place, size in enumerate(sizes) if place != axis)
    stays = axis not in numbers.collapsed_slice_dims      # a slice, from one index on
    if (len(numbers.start_index_map) != 1 or numbers.operand_batching_dims or not whole
            or sizes[axis] != 1 and (not stays or index != (1,))):
        raise unwritable('this use of an index')
    count, picks = len(index) - 1, graph.full(values[1], index)
    if not stays:
        picks = graph.reshape(picks, index, index[:-1])
    elif sizes[axis] > 1:
        picks = graph.node('Add', [picks, np.arange(sizes[axis], dtype=eqn.invars[1].aval.dtype)])
    name = graph.node('Gather', [graph.full(values[0], operand), picks], axis=axis)
    places = range(len(sizes) - 1 + count + stays)
    batch = iter(range(axis, axis + count))
    offset = iter([place for place in places if not axis <= place < axis + count])
    order = [next(offset if place in numbers.offset_dims else batch) for place in places]
    return [Value(graph.transpose(name, order), shape_of(eqn))]


@operator('scatter', 'scatter-add')
@folding
def _scatter(graph, eqn, values):
    raise unwritable('a change at an index')


# Products

@operator('dot_general')
@folding
def _dot_general(graph, eqn, values):
    (left_sum, right_sum), (left_batch, right_batch) = (
        tuple(tuple(int(axis) for axis in axes) for axes in pair) for pair in eqn.params['dimension_numbers'])
    left, right = (tuple(atom.aval.shape) for atom in eqn.invars)
    if values[0].known and not values[1].known and not left_batch:      # a weight on the left: turned around
        free = len(left) - len(left_sum)
        name = _product(graph, values[::-1], (right, left), (right_sum, left_sum), ((), ()))
        rank = len(shape_of(eqn))
        return [Value(graph.transpose(name, [*range(rank - free, rank), *range(rank - free)]), shape_of(eqn))]
    name = _product(graph, values, (left, right), (left_sum, right_sum), (left_batch, right_batch))
    return [Value(name, shape_of(eqn))]


def _product(graph: Graph, values, shapes, sums, batches) -> str:
    """Σ over `sums`, the axes of the result: those of the batch, free ones of the first, of the second."""
    (left, right), (left_sum, right_sum), (left_batch, right_batch) = shapes, sums, batches
    left_free = [axis for axis in range(len(left)) if axis not in (*left_sum, *left_batch)]
    right_free = [axis for axis in range(len(right)) if axis not in (*right_sum, *right_batch)]
    batch = tuple(left[axis] for axis in left_batch)
    outer, inner = [left[axis] for axis in left_free], [right[axis] for axis in right_free]
    count = math.prod(left[axis] for axis in left_sum)
    weight = values[1].known and not batch
    # Behind a weight, the free axes of the left may stay as they are.
    rows = tuple(outer) if weight and outer else (math.prod(outer),)
    first = _arranged(graph, values[0], left, [*left_batch, *left_free, *left_sum], (*batch, *rows, count))
    order, columns = [*right_batch, *right_sum, *right_free], math.prod(inner)
    if weight:
        matrix = np.broadcast_to(values[1].held, right).transpose(order).reshape(count, columns)
        second = _matrix(graph, matrix, values[1].label)
    else:
        second = _arranged(graph, values[1], right, order, (*batch, count, columns))
    name = graph.node('MatMul', [first, second])
    return graph.reshape(name, (*batch, *rows, columns), (*batch, *outer, *inner))


def _arranged(graph: Graph, value: Value, shape: Shape, order: list[int], after: Shape) -> str:
    if value.known and is_static(shape):
        array = np.broadcast_to(value.held, shape).transpose(order).reshape(after)
        return graph.weights.name(array, value.label)
    name = graph.transpose(graph.full(value, shape), order)
    return graph.reshape(name, tuple(shape[axis] for axis in order), after)


def _matrix(graph: Graph, matrix: np.ndarray, label: str) -> str:
    weights = graph.weights
    if not weights.int8 or matrix.size < INT8_LEAST or not label:
        return weights.name(matrix, label)
    small, scale = quantized(matrix)
    weights.errors.append(float(np.linalg.norm(small * scale - matrix) / max(np.linalg.norm(matrix), 1e-30)))
    return graph.node('DequantizeLinear', [weights.name(small, label), weights.name(scale, f'{label}.scale')],
                      axis=1)


@operator('conv_general_dilated')
@folding
def _convolution(graph, eqn, values):
    told, numbers = eqn.params, eqn.params['dimension_numbers']
    if any(step != 1 for step in told['lhs_dilation']) or told['batch_group_count'] != 1:
        raise unwritable('a transposed convolution')
    image, kernel = (tuple(atom.aval.shape) for atom in eqn.invars)
    x = graph.transpose(graph.full(values[0], image), numbers.lhs_spec)
    if values[1].known:
        w = graph.weights.name(np.broadcast_to(values[1].held, kernel).transpose(numbers.rhs_spec),
                               values[1].label)
    else:
        w = graph.transpose(graph.full(values[1], kernel), numbers.rhs_spec)
    pads = [int(side[end]) for end in (0, 1) for side in told['padding']]
    name = graph.node('Conv', [x, w], strides=list(told['window_strides']), pads=pads,
                      dilations=list(told['rhs_dilation']), group=int(told['feature_group_count']))
    return [Value(graph.transpose(name, np.argsort(numbers.out_spec).tolist()), shape_of(eqn))]


# Functions inside of functions

@operator('jit', 'pjit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr',
          'remat2', 'checkpoint', 'core_call', 'remat')
def _call(graph, eqn, values):
    inner = next(eqn.params[name] for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if name in eqn.params)
    return graph.run(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), values)


@operator('platform_index')
def _platform(graph, eqn, values):
    """The form for devices in general."""
    return [Value(np.asarray(len(eqn.params['platforms']) - 1, np.int32), ())]


@operator('cond')
def _cond(graph, eqn, values):
    which, arguments = values[0], values[1:]
    branches = eqn.params['branches']
    if which.known:
        branch = branches[min(max(int(which.held), 0), len(branches) - 1)]
        return graph.run(branch.jaxpr, branch.consts, arguments)
    if len(branches) != 2:
        raise unwritable(f'a choice of {len(branches)}')
    graphs = {}
    for name, branch in zip(('else_branch', 'then_branch'), branches, strict=True):
        inner = graph.inner()
        results = inner.run(branch.jaxpr, branch.consts, arguments)
        graphs[name] = body(inner, name, [], results, [out.aval for out in eqn.outvars])
    names = graph.node('If', [cast(graph, which.held, np.bool_)], len(eqn.outvars), **graphs)
    names = names if isinstance(names, list) else [names]
    return [Value(name, shape_of(eqn, number)) for number, name in enumerate(names)]


@operator('scan')
def _scan(graph, eqn, values):
    """A loop: constants, then what is carried along, then rows of arrays."""
    if result := computed(eqn, values):
        return result
    told, closed = eqn.params, eqn.params['jaxpr']
    # Newer versions of JAX give the kinds of the arguments as a tree.
    consts, carried = told['num_consts'], told['num_carry']
    inner, avals = graph.inner(), [atom.aval for atom in closed.jaxpr.invars]
    fixed, moving = values[:consts], values[consts:]
    names = [inner.weights.fresh('loop') for _ in moving]
    arguments = [*fixed, *(Value(name, tuple(aval.shape))
                           for name, aval in zip(names, avals[consts:], strict=True))]
    results = inner.run(closed.jaxpr, closed.consts, arguments)
    inputs = list(zip(names, avals[consts:], strict=True))
    loop = body(inner, 'body', inputs, results, [atom.aval for atom in closed.jaxpr.outvars])
    given = [graph.full(value, tuple(atom.aval.shape))
             for value, atom in zip(moving, eqn.invars[consts:], strict=True)]
    rows, stacked = len(moving) - carried, len(eqn.outvars) - carried
    way = int(bool(told['reverse']))
    attributes = {'scan_output_directions': [way] * stacked} if stacked else {}
    if not rows:
        raise unwritable('a loop without rows')
    outputs = graph.node('Scan', given, len(eqn.outvars), body=loop, num_scan_inputs=rows,
                         scan_input_directions=[way] * rows, **attributes)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [Value(name, shape_of(eqn, number)) for number, name in enumerate(outputs)]


def body(graph: Graph, name: str, inputs, results: Sequence[Value], avals):
    """The graph of a loop or branch with these inputs [(name, abstract array)] and results."""
    from onnx import helper
    outputs = [graph.node('Identity', [graph.full(value, tuple(aval.shape))])
               for value, aval in zip(results, avals, strict=True)]
    return helper.make_graph(graph.nodes, name, [described(*pair) for pair in inputs],
                             [described(output, aval) for output, aval in zip(outputs, avals, strict=True)])


def described(name: str, aval):
    from onnx import helper
    sizes = [int(size) if isinstance(size, int | np.integer) else str(size) for size in aval.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype)), sizes)
