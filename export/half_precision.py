"""Rewrite an exported graph so that it computes in float16, which GPUs do several times faster.

It does so between the first linear operators and the last. What lies before stays float32, since
raw features may be larger than float16 reaches; so do the last linear operators and what follows
them, since they put the answer in the target's unit: of a target around 2000, float16 tells whole
units apart. The graph's inputs and output are as they were.
"""

import numpy as np
import onnx_ir as ir

from dropserve.export.predict_graph import WEIGHT_OF_INPUT, constant, finish, is_constant
from dropserve.export.sites import ExportError
from dropserve.export.stochastic_graph import SUBGRAPHS, downstream

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
LINEAR = {operator for operator, _ in WEIGHT_OF_INPUT}
# Their own attributes or rules say what type their outputs or inputs have.
TYPED = {"Cast", "CastLike", "ConstantOfShape", "Range", "Resize"}


def build(model: ir.Model) -> ir.Model:
    """Return the graph in half precision.

    Raises
    ------
    ExportError
        If a weight is larger than float16 reaches, or a node cannot compute in it.
    """
    model = model.clone()
    graph = model.graph
    half = downstream(graph, {node for node in graph if is_linear(node)}) - last_nodes(graph)
    entered: dict[ir.Value, ir.Value] = {}
    left: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        inside = node in half
        if inside:
            check(node)
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, HALF):
                continue
            if inside and value.producer() not in half:
                if value not in entered:
                    entered[value] = enter(graph, value, node)
                node.replace_input_with(place, entered[value])
            elif not inside and value.producer() in half:
                if value not in left:
                    left[value] = cast(graph, value, value, FLOAT, node)
                node.replace_input_with(place, left[value])
        if inside:
            for output in node.outputs:
                if output.dtype == FLOAT:
                    # Its old type may be others', too.
                    output.type = ir.TensorType(HALF)
    finish(model)
    return model


def is_linear(node: ir.Node) -> bool:
    """Tell whether a node is a linear operator of ONNX's own."""
    return node.domain == "" and node.op_type in LINEAR


def last_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the last linear operators before the output, and what follows them."""
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


def check(node: ir.Node) -> None:
    """Raise ExportError if a node cannot simply be given float16."""
    if node.op_type in TYPED or any(a.type in SUBGRAPHS for a in node.attributes.values()):
        raise ExportError(
            f"node {node.name}: a {node.op_type} between linear operators; export without --half"
        )


def enter(graph: ir.Graph, value: ir.Value, consumer: ir.Node) -> ir.Value:
    """Return ``value`` as float16: a weight, or what a Cast before ``consumer`` makes of it."""
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
    """Return ``source`` as another type, in the shape of ``like``, made before ``consumer``."""
    node = ir.node("Cast", [source], {"to": dtype})
    graph.insert_before(consumer, node)
    made = node.outputs[0]
    made.shape, made.type = like.shape, ir.TensorType(dtype)
    return made
