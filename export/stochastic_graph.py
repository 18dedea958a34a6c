"""Rewrite a traced graph into the train-mode graph, whose randomness is an input.

    x      [B, ...]            rows of features
    rows   int64 [N]           input row of each pass
    mask.S bool [N, ...]       units that site S keeps; one input for each site
    output [N, C]              logits or values of each pass

The nodes before the first site run once per input row. All nodes behind a site form the *stochastic
part* and run once per pass; each tensor that enters it is gathered by ``rows`` on the way in.
"""

from collections.abc import Iterator

import onnx_ir as ir

from dropserve.export.bundle import ROWS
from dropserve.export.predict_graph import clean_up, fold_factors, multiply
from dropserve.export.sites import ExportError, Site, batch_dimension, sites_of

PASSES = "passes"
GRAPHS = ir.AttributeType.GRAPHS
SUBGRAPHS = (ir.AttributeType.GRAPH, GRAPHS)


def mask_input(site: str) -> str:
    """Return the name of the graph input for the mask of ``site``."""
    return f"mask.{site}"


def build(traced: ir.Model) -> ir.Model:
    """Return the train-mode graph of a traced network.

    Raises
    ------
    ExportError
        If a tensor whose first axis is not the batch enters the stochastic part, a branch or loop
        lies behind a site, or no site lies before the output.
    """
    model = traced.clone()
    graph = model.graph
    if graph.inputs[0].name == ROWS:
        raise ExportError(f"the network's input must not be called {ROWS!r}")
    sites = sites_of(model)
    # Train factors are positive, so they fold into weights as eval factors do.
    not_folded = fold_factors(graph, sites, lambda site: site.train_factor)
    Gathering(model, sites).run()
    for site in sites:
        replace_with_mask(graph, site, with_factor=site.name in not_folded)
    clean_up(model)
    return model


def replace_with_mask(graph: ir.Graph, site: Site, *, with_factor: bool) -> None:
    """Replace a marker with ``x * mask``, times the train factor if ``with_factor``."""
    value, old = site.node.inputs[0], site.node.outputs[0]
    assert value is not None
    assert value.dtype is not None
    mask = ir.val(mask_input(site.name), ir.DataType.BOOL, [PASSES, *site.mask_shape])
    graph.inputs.append(mask)
    cast = ir.node("Cast", [mask], {"to": value.dtype})
    cast.outputs[0].shape = mask.shape
    cast.outputs[0].type = value.type
    product = ir.node("Mul", [value, cast.outputs[0]])
    graph.insert_before(site.node, [cast, product])
    kept = product.outputs[0]
    kept.shape, kept.type = old.shape, old.type
    if with_factor:
        kept = multiply(graph, site, kept, site.train_factor)
    old.replace_all_uses_with(kept, replace_graph_outputs=True)
    graph.remove(site.node, safe=True)


class Gathering:
    """Insert ``Gather(rows)`` on every edge by which the batch enters the stochastic part.

    A value from outside is one of three kinds:

    1. It does not depend on ``x``: it enters unchanged.
    2. It is computed from shapes alone, such as the target shape of a Reshape, and so counts B rows
       where N passes flow: it is computed again from the gathered tensors.
    3. It is a tensor whose first axis is the batch: it is gathered. A tensor with the batch on
       another axis, or without one, is refused.
    """

    def __init__(self, model: ir.Model, sites: tuple[Site, ...]) -> None:
        self.graph = model.graph
        self.batch = batch_dimension(model)
        self.rows = ir.val(ROWS, ir.DataType.INT64, [PASSES])
        self.graph.inputs.append(self.rows)
        self.stochastic = downstream(self.graph, {site.node for site in sites})
        self.dependent = downstream_values(self.graph)
        self.of_shapes: set[ir.Value] = set()
        self.inside: dict[ir.Value, ir.Value] = {}  # value from outside -> its form inside

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph):
            if node not in self.stochastic:
                self.note_shape_arithmetic(node)
                continue
            if any(attr.type in SUBGRAPHS for attr in node.attributes.values()):
                raise ExportError(f"node {node.name}: a branch or loop behind a dropout site")
            for place, value in enumerate(node.inputs):
                if value is not None and value.producer() not in self.stochastic:
                    node.replace_input_with(place, self.enter(value, node))
            for value in node.outputs:
                self.rename_batch(value)
        for output in self.graph.outputs:
            if output.producer() not in self.stochastic:
                raise ExportError("no dropout site lies before the output: no pass would differ")

    def note_shape_arithmetic(self, node: ir.Node) -> None:
        """Remember the outputs of ``node`` if they are computed from shapes alone."""
        inputs = [value for value in node.inputs if value in self.dependent]
        if inputs and (
            node.op_type in ("Shape", "Size") or all(v in self.of_shapes for v in inputs)
        ):
            self.of_shapes.update(node.outputs)

    def enter(self, value: ir.Value, consumer: ir.Node) -> ir.Value:
        """Return the form of an outside value inside, with any new nodes before ``consumer``."""
        if value not in self.dependent:
            return value  # case 1
        if value not in self.inside:
            if value in self.of_shapes:
                self.compute_again(value, consumer)  # case 2
            else:
                self.inside[value] = self.gather(value, consumer)  # case 3
        return self.inside[value]

    def compute_again(self, value: ir.Value, consumer: ir.Node) -> None:
        """Copy the node that computes ``value``, with the inside form of its inputs."""
        node = value.producer()
        assert node is not None  # computed from shapes, so by a node
        copy = ir.node(
            node.op_type,
            [None if v is None else self.enter(v, consumer) for v in node.inputs],
            dict(node.attributes),
            domain=node.domain,
            num_outputs=len(node.outputs),
        )
        self.graph.insert_before(consumer, copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            self.rename_batch(new)
            self.inside[old] = new

    def gather(self, value: ir.Value, consumer: ir.Node) -> ir.Value:
        """Gather the row of ``value`` for each pass."""
        shape = value.shape
        if shape is None or not shape.rank() or shape[0] != self.batch:
            raise ExportError(
                f"node {consumer.name or consumer.op_type}: its input {value.name!r} of shape "
                f"{shape} enters the stochastic part, and its first axis is not known to be the "
                "batch"
            )
        node = ir.node("Gather", [value, self.rows], {"axis": 0})
        self.graph.insert_before(consumer, node)
        gathered = node.outputs[0]
        gathered.shape, gathered.type = shape, value.type
        self.rename_batch(gathered)
        return gathered

    def rename_batch(self, value: ir.Value) -> None:
        """Rename the batch axis of a stochastic value to ``passes``, and drop all other names.

        onnxruntime's memory planner takes axes with equal names to have equal lengths.
        """
        if value.shape is None:
            return
        names = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        value.shape = ir.Shape(
            [PASSES if d == self.batch else None if isinstance(d, str) else d for d in names]
        )


def downstream(graph: ir.Graph, sources: set[ir.Node]) -> set[ir.Node]:
    """Return ``sources`` and every node that depends on one of them."""
    found: set[ir.Node] = set()
    for node in graph:
        if node in sources or any(value.producer() in found for value in values_read(node)):
            found.add(node)
    return found


def downstream_values(graph: ir.Graph) -> set[ir.Value]:
    """Return the graph's inputs and every value that depends on one of them."""
    found: set[ir.Value] = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if any(value in found for value in values_read(node)):
            found.update(node.outputs)
    return found


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the inputs of a node and of all nodes in its branches and loops."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type in SUBGRAPHS:
            graphs = attribute.as_graphs() if attribute.type == GRAPHS else [attribute.as_graph()]
            for graph in graphs:
                for inner in graph:
                    yield from values_read(inner)
