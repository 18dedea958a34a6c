"""Rewrite an exported graph so that it computes in float16, which GPUs do several times faster.

It does so from the first linear operator on. What lies before stays float32, since raw features
may be larger than float16 reaches, and so do the graph's inputs and output.
"""

import numpy as np
import onnx_ir as ir

from export.predict_graph import WEIGHT_OF_INPUT, constant, finish, is_constant
from export.sites import ExportError
from export.stochastic_graph import downstream

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
LINEAR = {operator for operator, _ in WEIGHT_OF_INPUT}


def build(model: ir.Model) -> ir.Model:
    """Return the graph in half precision, its inputs and output as they are.

    Raises
    ------
    ExportError
        If a weight is larger than float16 reaches.
    """
    model = model.clone()
    graph = model.graph
    half = downstream(graph, {node for node in graph if node.op_type in LINEAR})
    entered: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node not in half:
            continue
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype != FLOAT or value.producer() in half:
                continue
            if value not in entered:
                entered[value] = enter(graph, value, node)
            node.replace_input_with(place, entered[value])
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.type = ir.TensorType(HALF)  # its old one may be others', too
    for place, output in enumerate(graph.outputs):
        if output.dtype == HALF:
            graph.outputs[place] = leave(graph, output)
    finish(model)
    return model


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
    node = ir.node("Cast", [source], {"to": HALF})
    graph.insert_before(consumer, node)
    cast = node.outputs[0]
    cast.shape, cast.type = value.shape, ir.TensorType(HALF)
    return cast


def leave(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return ``value`` as float32, under its name."""
    node = ir.node("Cast", [value], {"to": FLOAT})
    graph.append(node)
    cast = node.outputs[0]
    cast.shape, cast.type = value.shape, ir.TensorType(FLOAT)
    cast.name, value.name = value.name, f"{value.name}.half"
    return cast
