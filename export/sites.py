"""Dropout sites in an ONNX graph: the marker nodes between the trace and the two rewrites.

A *site* is one place where dropout acts. The trace leaves a marker node there, which
``predict_graph`` replaces with a factor and ``stochastic_graph`` with a mask.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dropserve.model.dropout import SCALINGS, Scaling, factors, mask_shape

# Types that torch.onnx.ops.symbolic accepts as attributes.
Attribute = (
    int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
)

DOMAIN = "dropserve"
MARKER = "DropoutSite"


class ExportError(Exception):
    """A network cannot be exported; the message names the node or module and the reason."""


@dataclass(frozen=True)
class Site:
    """One marker in a graph."""

    name: str
    p: float
    scaling: Scaling
    mask_shape: tuple[int, ...]  # of one pass
    train_factor: float  # scales kept units in train mode
    eval_factor: float  # scales all units in eval mode
    node: ir.Node


def batch_dimension(model: ir.Model) -> str:
    """Return the name of the batch axis, the first axis of the graph's input.

    Raises
    ------
    ExportError
        If the graph has several inputs or outputs, or the axis has no name.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1 or len(model.graph.outputs) != 1:
        raise ExportError(
            f"the graph must have one input and one output, not {len(inputs)} and "
            f"{len(model.graph.outputs)}"
        )
    shape = inputs[0].shape
    if not shape or not isinstance(shape[0], ir.SymbolicDim) or shape[0].value is None:
        raise ExportError(
            f"the first axis of input {inputs[0].name!r} must be a named batch axis, not {shape}"
        )
    return shape[0].value


def sites_of(model: ir.Model) -> tuple[Site, ...]:
    """Return the sites of a traced model in the order in which they act.

    Raises
    ------
    ExportError
        If a site lies inside a branch or loop, its first axis is not the batch, or another axis
        varies.
    """
    batch = batch_dimension(model)
    calls: Counter[str] = Counter()
    found = []
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) != (DOMAIN, MARKER):
            continue
        if node.graph is not model.graph:
            raise ExportError(f"node {node.name}: a dropout site inside a branch or loop")
        module = node.attributes["name"].as_string()
        name = call_name(module, calls[module])
        calls[module] += 1
        shape = node.outputs[0].shape
        if shape is None or not shape.rank() or shape[0] != batch:
            raise ExportError(f"dropout site {name}: the first axis must be the batch, not {shape}")
        axes = node.attributes["axes"].as_int()
        if axes not in (0, shape.rank()):
            raise ExportError(f"dropout site {name}: its input must have {axes} axes, not {shape}")
        units = []
        for dimension in shape[1:]:
            if not isinstance(dimension, int):
                raise ExportError(f"dropout site {name}: an axis of its input {shape} varies")
            units.append(dimension)
        # As text, because an ONNX float attribute would make 0.30000001192 of 0.3.
        p = float(node.attributes["p"].as_string())
        scaling = SCALINGS[node.attributes["scaling"].as_int()]
        train_factor, eval_factor = factors(p, scaling)
        channels = bool(node.attributes["channels"].as_int())
        if channels and len(units) < 2:
            raise ExportError(f"dropout site {name}: no axis behind the channels in {shape}")
        found.append(
            Site(
                name=name,
                p=p,
                scaling=scaling,
                mask_shape=mask_shape(tuple(units), channels),
                train_factor=train_factor,
                eval_factor=eval_factor,
                node=node,
            )
        )
    return tuple(found)


def call_name(module: str, call: int) -> str:
    """Return the site's name for one call of a module: each further call is a separate site."""
    return module if call == 0 else f"{module}:{call + 1}"


def marker_attributes(
    name: str, p: float, scaling: Scaling, *, channels: bool, axes: int
) -> dict[str, Attribute]:
    """Return the attributes of a marker, in the form that ``sites_of`` reads."""
    place = SCALINGS.index(scaling)
    return {"name": name, "p": repr(p), "scaling": place, "channels": int(channels), "axes": axes}
