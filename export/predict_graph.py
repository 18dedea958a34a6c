"""Rewrite a traced graph into the eval-mode graph, and the graph helpers that all rewrites share.

The eval-mode graph holds no dropout: each site's eval factor is folded into the weights behind it.
"""

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from dropserve.export.sites import DOMAIN, MARKER, Site, sites_of

# Operators that commute with a positive factor, f(s * x) = s * f(x), and so may lie between a site
# and the weights that its factor is folded into.
COMMUTING = {
    "AveragePool",
    "Flatten",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Identity",
    "LeakyRelu",
    "MaxPool",
    "Relu",
    "Reshape",
    "Transpose",
}
# (linear operator, scaled input) -> input whose weights can be scaled instead.
WEIGHT_OF_INPUT = {
    ("Gemm", 0): 1,
    ("Gemm", 1): 0,
    ("MatMul", 0): 1,
    ("MatMul", 1): 0,
    ("Conv", 0): 1,
}


def build(traced: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the eval-mode graph, and the names of the sites whose factor remains as a Mul node.

    The graph maps ``x [B, ...]`` to logits or values ``[B, C]``.
    """
    model = traced.clone()
    sites = sites_of(model)
    not_folded = fold_factors(model.graph, sites, lambda site: site.eval_factor)
    for site in sites:
        old = site.node.outputs[0]
        kept = site.node.inputs[0]
        assert kept is not None  # a marker has one input
        if site.name in not_folded:
            kept = multiply(model.graph, site, kept, site.eval_factor)
        old.replace_all_uses_with(kept, replace_graph_outputs=True)
        model.graph.remove(site.node, safe=True)
    clean_up(model)
    return model, not_folded


def fold_factors(
    graph: ir.Graph, sites: tuple[Site, ...], factor_of: Callable[[Site], float]
) -> tuple[str, ...]:
    """Fold each site's factor into the weights behind it; return the names of the others."""
    not_folded = []
    for site in sites:
        factor = factor_of(site)
        if factor == 1.0:
            continue
        linears = linears_behind(site.node.outputs[0])
        if linears is None:
            not_folded.append(site.name)
            continue
        for node, weight in linears:
            scale_weight(graph, node, weight, factor)
    return tuple(not_folded)


def linears_behind(value: ir.Value) -> list[tuple[ir.Node, int]] | None:
    """Find the weights that can absorb a positive factor of ``value``.

    Returns linear operators, each with the place of its weights among its inputs. Every use of the
    value must end in one:

    1. A linear operator with constant weights absorbs the factor.
    2. An operator that commutes with the factor, or another site, passes it on.
    3. Anything else, including the graph's output, can do neither: the result is None.
    """
    if value.is_graph_output():
        return None  # case 3
    found: list[tuple[ir.Node, int]] = []
    for node, place in value.uses():
        weight = WEIGHT_OF_INPUT.get((node.op_type, place)) if node.domain == "" else None
        if weight is not None and is_constant(node.inputs[weight]):
            found.append((node, weight))  # case 1
        elif place == 0 and is_commuting(node):
            behind = linears_behind(node.outputs[0])  # case 2
            if behind is None:
                return None
            found.extend(behind)
        else:
            return None  # case 3
    return found


def is_commuting(node: ir.Node) -> bool:
    """Tell whether a positive factor of the node's first input may be applied to its output."""
    if node.domain == DOMAIN:
        return node.op_type == MARKER
    return node.domain == "" and node.op_type in COMMUTING


def is_constant(value: ir.Value | None) -> bool:
    """Tell whether a value is an initializer that no caller can replace."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and not value.is_graph_input()
    )


def scale_weight(graph: ir.Graph, node: ir.Node, place: int, factor: float) -> None:
    """Give ``node`` its own copy of the weights at input ``place``, times ``factor``."""
    old = node.inputs[place]
    assert old is not None
    assert old.const_value is not None
    weights = old.const_value.numpy()
    scaled = (weights.astype(np.float64) * factor).astype(weights.dtype)
    new = constant(graph, f"{old.name}.scaled", scaled)
    node.replace_input_with(place, new)
    if not old.uses() and old.name is not None:
        del graph.initializers[old.name]


def multiply(graph: ir.Graph, site: Site, value: ir.Value, factor: float) -> ir.Value:
    """Return ``value`` times ``factor``, by a Mul node before the site."""
    assert value.dtype is not None
    scalar = constant(graph, f"{site.name}.factor", np.array(factor, value.dtype.numpy()))
    node = ir.node("Mul", [value, scalar])
    graph.insert_before(site.node, node)
    product = node.outputs[0]
    product.shape, product.type = value.shape, value.type
    return product


def constant(graph: ir.Graph, name: str, array: np.typing.NDArray[np.generic]) -> ir.Value:
    """Add an initializer; underscores are appended to ``name`` until it is free."""
    while name in graph.initializers:
        name += "_"
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def values_per(model: ir.Model, axis: str) -> int:
    """Count the numbers that a graph computes for one step along the first axis named ``axis``."""
    counts = [
        math.prod(d for d in value.shape[1:] if isinstance(d, int))
        for node in model.graph
        for value in node.outputs
        if value.shape is not None and value.shape.rank() and value.shape[0] == axis
    ]
    return max(1, sum(counts))


def clean_up(model: ir.Model) -> None:
    """Remove nodes and opsets that a rewrite left unused, and check the model."""
    model.producer_name, model.producer_version = "dropserve", None
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.NameFixPass()(model)
    passes.CheckerPass()(model)
