"""Writes programs as ONNX: the graph in `model.onnx`, weights beside it in `model.onnx.data`."""
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from lit_jax.deploy.onnx_graph import OPSET, Graph, Value, Weights, external
from lit_jax.deploy.onnx_operators import OPERATORS, body, described
from lit_jax.deploy.programs import Program
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves

FILE, DATA = 'model.onnx', 'model.onnx.data'
IR_VERSION = 10


def check_onnx() -> None:
    """UserError where the package is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UserError('ONNX files need the package onnx: pip install "lit_jax[export]"') from error


def write_onnx(folder: Path, program: Program, params: Mapping, metadata: Mapping,
               int8: bool = False) -> list[float]:
    """Writes both files; returns the relative errors of the matrices that were stored in int8."""
    weights = Weights(int8)
    graph = _built(program, params, weights)
    model = _model(graph, metadata)
    with open(folder / DATA, 'wb') as file:
        for tensor, array, offset in external(weights.arrays, DATA):
            model.graph.initializer.append(tensor)
            if array is not None:
                file.seek(offset)
                _write(file, array)
    (folder / FILE).write_bytes(model.SerializeToString())
    return weights.errors


def _built(program: Program, params: Mapping, weights: Weights):
    names = list(program.inputs)
    traced = jax.make_jaxpr(lambda params, *arrays: program.function(params, **dict(zip(names, arrays,
                                                                                         strict=True))))
    closed = traced(program.params, *program.inputs.values())
    graph = Graph(OPERATORS, weights, {})
    arguments = [Value(leaf, leaf.shape, path.replace('/', '.'))
                 for path, leaf in _leaves(program.params, params)]
    for name, aval in program.inputs.items():
        arguments.append(Value(name, tuple(aval.shape)))
        _read_sizes(graph, name, aval)
    results = graph.run(closed.jaxpr, closed.consts, arguments)
    built = body(graph, 'lit_jax', list(program.inputs.items()), results, closed.out_avals)
    _rename_output(built, program.output)
    return built


def _leaves(abstract: Mapping, params: Mapping) -> list[tuple[str, np.ndarray]]:
    """(path, array) in the order in which JAX passes them."""
    flat = named_leaves(params)
    names = [path for path in named_leaves(abstract)]
    order = jax.tree.leaves(jax.tree.unflatten(jax.tree.structure(abstract), range(len(names))))
    assert order == sorted(order)
    return [(name, np.asarray(flat[name])) for name in names]


def _read_sizes(graph: Graph, name: str, aval) -> None:
    """The sizes of an input that are names, or multiples of one."""
    for axis, size in enumerate(aval.shape):
        if isinstance(size, int):
            continue
        factor, _, symbol = str(size).rpartition('*')
        if symbol in graph.sizes:
            continue
        found = graph.node('Shape', [name], start=axis, end=axis + 1)
        if factor:
            found = graph.node('Div', [found, np.array([int(factor)], np.int64)])
        graph.sizes[symbol] = found


def _rename_output(graph, name: str) -> None:
    output, = graph.output
    for node in graph.node:
        node.output[:] = [name if out == output.name else out for out in node.output]
    output.name = name


def _model(graph, metadata: Mapping):
    from onnx import helper

    from lit_jax import __version__
    model = helper.make_model(graph, producer_name='lit_jax', producer_version=__version__,
                              opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, {'lit_jax': json.dumps(metadata)})
    return model


def _write(file, array: np.ndarray) -> None:
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise UserError('the weights hold NaN or infinity: nothing is written. Take an earlier checkpoint')
    file.write(np.ascontiguousarray(array).data)


__all__ = ['DATA', 'FILE', 'check_onnx', 'described', 'write_onnx']
