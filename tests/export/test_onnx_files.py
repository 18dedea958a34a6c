"""ONNX files with Dropout nodes, exported like a torch network."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dropserve.export import predict_graph, stochastic_graph, trace, verify
from dropserve.export.reference import OnnxReference, VerificationError
from dropserve.export.sites import ExportError, sites_of
from tests.export.test_graphs import session

ONNX_TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 4] x) => (float[N, 2] output)
<float[4, 3] w1 = {1, -2, 3, -4, 5, -6, 7, -8, 9, 1, 2, 3}, float[3, 2] w2 = {1, 2, 3, 4, 5, 6},
 float ratio = {0.25}, bool training = {1}>
{
    h = MatMul(x, w1)
    a = Relu(h)
    d = Dropout(a, ratio, training)
    SHAPE_LINES
    output = MatMul(LAST, w2)
}
"""


def from_text(lines: str, last: str, folder: Path) -> ir.Model:
    text = ONNX_TEXT.replace("SHAPE_LINES", lines).replace("LAST", last)
    path = folder / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return trace.from_onnx(path)


def test_an_onnx_file_with_dropout_nodes_enters_in_place_of_a_torch_model(
    tmp_path: Path,
) -> None:
    source = from_text("", "d", tmp_path)
    (site,) = sites_of(source)
    assert (site.p, site.scaling, site.mask_shape) == (0.25, "inverted", (3,))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    w1 = np.array([1, -2, 3, -4, 5, -6, 7, -8, 9, 1, 2, 3], np.float32).reshape(4, 3)
    w2 = np.array([1, 2, 3, 4, 5, 6], np.float32).reshape(3, 2)
    (point,) = session(predict_graph.build(source)[0]).run(None, {"x": x})
    np.testing.assert_allclose(point, np.maximum(x @ w1, 0) @ w2, rtol=1e-5)
    mask = np.array([[True, False, True], [False, True, True]])
    places = np.array([4, 1])
    (passes,) = session(stochastic_graph.build(source)).run(
        None, {"x": x, "rows": places, stochastic_graph.mask_input(site.name): mask}
    )
    expected = (np.maximum(x[places] @ w1, 0) * mask / 0.75) @ w2
    np.testing.assert_allclose(passes, expected, rtol=1e-5)


def test_an_onnx_file_is_verified_against_onnxs_own_evaluator(tmp_path: Path) -> None:
    source = from_text("", "d", tmp_path)
    graphs = [predict_graph.build(source)[0], stochastic_graph.build(source)]
    predict, stochastic = (ir.to_proto(graph).SerializeToString() for graph in graphs)
    x = np.random.default_rng(0).normal(size=(70, 4)).astype(np.float32)
    sites = sites_of(source)
    reference = OnnxReference(source)
    outputs = reference.eval_mode(x)
    measured = verify.verify(reference, sites, predict, stochastic, x, outputs)
    assert measured.stochastic_error < 1e-5
    # The network behind the site is linear, so the passes scatter around eval mode: 140 outputs,
    # of which the two of a row are correlated.
    assert measured.expectation_gap == pytest.approx(1.0, abs=0.3)
    # A difference in one weight of six must be noticed.
    weights = np.array([1, 2, 3, 4, 5, 7], np.float32).reshape(3, 2)
    for value in graphs[1].graph.initializers.values():
        if value.const_value is not None and value.shape == (3, 2):
            value.const_value = ir.tensor(weights)
    broken = ir.to_proto(graphs[1]).SerializeToString()
    with pytest.raises(VerificationError, match=r"^stochastic.onnx is off from train mode"):
        verify.verify(reference, sites, predict, broken, x, outputs)


def test_a_reshape_behind_a_site_asks_for_passes_where_its_target_came_from_the_input(
    tmp_path: Path,
) -> None:
    lines = """
    shape = Shape <start = 0, end = 1> (x)
    width = Constant <value = int64[1] {3}> ()
    target = Concat <axis = 0> (shape, width)
    r = Reshape(d, target)
    """
    source = from_text(lines, "r", tmp_path)
    (site,) = sites_of(source)
    graph = session(stochastic_graph.build(source))
    x = np.ones((2, 4), np.float32)
    feed = {"x": x, "rows": np.zeros(7, np.int64)}
    masks = np.ones((7, 3), bool)
    (passes,) = graph.run(None, feed | {stochastic_graph.mask_input(site.name): masks})
    assert passes.shape == (7, 2)


def test_the_ratio_of_an_old_onnx_file_is_an_attribute(tmp_path: Path) -> None:
    text = ONNX_TEXT.replace('"" : 20', '"" : 10').replace("ir_version: 10", "ir_version: 4")
    text = text.replace("Dropout(a, ratio, training)", "Dropout <ratio = 0.1> (a)")
    text = text.replace("SHAPE_LINES", "").replace("LAST", "d")
    onnx.save(onnx.parser.parse_model(text), tmp_path / "old.onnx")
    (site,) = sites_of(trace.from_onnx(tmp_path / "old.onnx"))
    assert site.p == 0.1


BRANCH = """
    yes = Constant <value = bool {1}> ()
    b = If (yes) <then_branch = t () => (float[batch, 3] y) { y = OP },
                  else_branch = e () => (float[batch, 3] z) { z = Relu(a) }>
"""


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        ("Relu(d)", "a branch or loop behind a dropout site"),
        ("Dropout(a, ratio)", "inside a branch"),
    ],
)
def test_a_branch_behind_a_site_or_around_one_is_refused(
    tmp_path: Path, operator: str, says: str
) -> None:
    with pytest.raises(ExportError, match=says):
        stochastic_graph.build(from_text(BRANCH.replace("OP", operator), "b", tmp_path))


def test_a_batch_on_another_axis_that_enters_the_stochastic_part_is_refused_by_node(
    tmp_path: Path,
) -> None:
    lines = """
    turned = Transpose <perm = [1, 0]> (a)
    dt = Transpose <perm = [1, 0]> (d)
    sum = Add(dt, turned)
    back = Transpose <perm = [1, 0]> (sum)
    """
    source = from_text(lines, "back", tmp_path)
    (add,) = [node for node in source.graph if node.op_type == "Add"]
    add.name = "the_add"
    with pytest.raises(ExportError, match=r"node the_add: .* is not known to be the batch"):
        stochastic_graph.build(source)
