"""Rewrite an exported graph to compute in float16, which is several times faster on a GPU.

Only the nodes between the first linear operators and the last ones change type. The nodes before
them stay float32, since raw features may exceed the range of float16. The last linear operators and
the nodes behind them stay float32, since they produce values in the target's unit, and float16
resolves only whole units around 2000. The graph's inputs and output keep their types.
"""

import numpy as np
import onnx_ir as ir

from dropserve.export.predict_graph import WEIGHT_OF_INPUT, clean_up, constant, is_constant
from dropserve.export.sites import ExportError
from dropserve.export.stochastic_graph import SUBGRAPHS, downstream

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
LINEAR = {operator for operator, _ in WEIGHT_OF_INPUT}
# Operators whose attributes or rules fix the types of their inputs or outputs.
TYPED = {"Cast", "CastLike", "ConstantOfShape", "Range", "Resize"}


def build(model: ir.Model) -> ir.Model:
    """Return a copy of the graph in half precision.

    Raises
    ------
    ExportError
        If a weight exceeds the range of float16, or a node cannot compute in it.
    """
    model = model.clone()
    graph = model.graph
    half = downstream(graph, {node for node in graph if is_linear(node)}) - last_nodes(graph)
    as_half: dict[ir.Value, ir.Value] = {}
    as_float: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        inside = node in half
        if inside:
            check_convertible(node)
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, HALF):
                continue
            if inside and value.producer() not in half:
                if value not in as_half:
                    as_half[value] = to_half(graph, value, node)
                node.replace_input_with(place, as_half[value])
            elif not inside and value.producer() in half:
                if value not in as_float:
                    as_float[value] = cast(graph, value, value, FLOAT, node)
                node.replace_input_with(place, as_float[value])
        if inside:
            for output in node.outputs:
                if output.dtype == FLOAT:
                    # A new object, since values may share the old one.
                    output.type = ir.TensorType(HALF)
    clean_up(model)
    return model


def is_linear(node: ir.Node) -> bool:
    """Tell whether a node is one of ONNX's linear operators."""
    return node.domain == "" and node.op_type in LINEAR


def last_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the last linear operators before the output, and all nodes behind them."""
    found: set[ir.Node] = set()
    waiting = [output.producer() for output in graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if not is_linear(node):
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def check_convertible(node: ir.Node) -> None:
    """Raise ExportError if float16 inputs are not enough for a node to compute in float16."""
    if node.op_type in TYPED or any(a.type in SUBGRAPHS for a in node.attributes.values()):
        raise ExportError(
            f"node {node.name}: a {node.op_type} between linear operators; export without --half"
        )


def to_half(graph: ir.Graph, value: ir.Value, consumer: ir.Node) -> ir.Value:
    """Return ``value`` as float16: a converted weight, or a Cast placed before ``consumer``."""
    if is_constant(value):
        assert value.const_value is not None
        weights = value.const_value.numpy()
        if np.abs(weights).max(initial=0) > LARGEST:
            raise ExportError(f"{value.name} is beyond float16; export without --half")
        return constant(graph, f"{value.name}.half", weights.astype(np.float16))
    source, producer = value, value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        source = producer.inputs[0]  # one Cast, not a chain
    return cast(graph, source, value, HALF, consumer)


def cast(
    graph: ir.Graph, source: ir.Value, like: ir.Value, dtype: ir.DataType, consumer: ir.Node
) -> ir.Value:
    """Cast ``source`` to ``dtype``, before ``consumer``; the result has the shape of ``like``."""
    node = ir.node("Cast", [source], {"to": dtype})
    graph.insert_before(consumer, node)
    made = node.outputs[0]
    made.shape, made.type = like.shape, ir.TensorType(dtype)
    return made
