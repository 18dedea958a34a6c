"""The two graphs of each network and scaling, against torch."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from export import predict_graph, stochastic_graph, trace, verify
from export.bundle import Verification
from export.reference import OnnxReference, TorchReference, VerificationError
from export.sites import ExportError, Site, sites_of
from model import datasets
from model.dropout import SCALINGS, CustomDropout, Scaling, only_sites_in_train_mode
from model.networks import NETWORKS, Model, NetworkConfig, NetworkName

Floats = NDArray[np.float32]
P = 0.3


@cache
def network(name: NetworkName, scaling: Scaling) -> Model:
    """A network with weights, statistics and input scale that are no defaults."""
    torch.manual_seed(0)
    model = Model(NetworkConfig(name, (8, 8), 10, (32, 32), P, scaling))
    x = torch.from_numpy(rows(256))
    model.learn_input_scale(x)
    # Batch norm learns statistics, without which it would be the identity.
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(x)
    return model.eval()


@cache
def traced(name: NetworkName, scaling: Scaling) -> ir.Model:
    return trace.trace(network(name, scaling), torch.from_numpy(rows(2)))


@cache
def rows(count: int) -> Floats:
    digits = datasets.load("digits")
    return datasets.split(digits, 0).test.x[:count] if count <= 270 else digits.x[:count]


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def with_masks(model: nn.Module, x: Floats, masks: dict[str, NDArray[np.bool_]]) -> Floats:
    """Torch train mode with given masks: independent of ``export.verify``.

    ``torch.rand`` is what ``CustomDropout`` draws from, so its draws are put in its place.
    """
    draws = iter([torch.from_numpy(np.where(mask, 1.0, -1.0)) for mask in masks.values()])
    drawn = torch.rand
    try:
        torch.rand = lambda *_, **__: next(draws).float()
        with only_sites_in_train_mode(model), torch.no_grad():
            return np.asarray(model(torch.from_numpy(x)))
    finally:
        torch.rand = drawn


every_network = pytest.mark.parametrize("name", NETWORKS)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)


@every_network
@every_scaling
def test_predict_graph_equals_eval_mode_on_the_whole_test_split(
    name: NetworkName, scaling: Scaling
) -> None:
    graph, _ = predict_graph.build(traced(name, scaling))
    x = rows(270)
    (measured,) = session(graph).run(None, {"x": x})
    with torch.no_grad():
        expected = network(name, scaling)(torch.from_numpy(x)).numpy()
    assert np.abs(measured - expected).max() < 1e-5


@every_network
@every_scaling
@pytest.mark.parametrize(("batch", "passes"), [(1, 100), (64, 3)])
def test_stochastic_graph_equals_train_mode_with_the_same_masks_in_every_pass(
    name: NetworkName, scaling: Scaling, batch: int, passes: int
) -> None:
    source = traced(name, scaling)
    x = rows(batch)
    generator = np.random.default_rng(1)
    places = generator.permutation(np.repeat(np.arange(batch), passes))
    masks = verify.draw_masks(sites_of(source), len(places), generator)
    feed = {stochastic_graph.mask_input(site): mask for site, mask in masks.items()}
    (measured,) = session(stochastic_graph.build(source)).run(
        None, {"x": x, "rows": places, **feed}
    )
    expected = with_masks(network(name, scaling), x[places], masks)
    assert measured.shape == (batch * passes, 10)
    assert np.abs(measured - expected).max() < 1e-5


@every_network
@every_scaling
def test_no_graph_holds_a_dropout_or_random_operator(name: NetworkName, scaling: Scaling) -> None:
    predict, _ = predict_graph.build(traced(name, scaling))
    stochastic = stochastic_graph.build(traced(name, scaling))
    for graph in (predict, stochastic):
        assert not [op for op in operators(graph) if "Random" in op or "Dropout" in op]
        assert {domain for domain in graph.opset_imports if domain} == set()


@every_scaling
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_weights_take_every_factor_where_a_linear_operator_follows(
    name: NetworkName, scaling: Scaling
) -> None:
    predict, left = predict_graph.build(traced(name, scaling))
    assert left == ()
    assert "Mul" not in operators(predict)
    # Only the masks multiply.
    stochastic = operators(stochastic_graph.build(traced(name, scaling)))
    assert stochastic.count("Mul") == len(sites_of(traced(name, scaling)))


def test_a_factor_that_no_weight_can_take_stays_and_is_reported() -> None:
    predict, left = predict_graph.build(traced("residual", "classic"))
    assert left == ("network.blocks.0.dropout", "network.blocks.1.dropout")
    assert operators(predict).count("Mul") == 2
    _, left = predict_graph.build(traced("residual", "inverted"))
    assert left == ()


def test_what_lies_before_the_first_site_runs_once_per_input_row() -> None:
    graph = stochastic_graph.build(traced("convnet", "classic"))
    after_gather = False
    for node in graph.graph:
        after_gather |= node.op_type == "Gather"
        for value in node.outputs:
            dims = [d.value for d in value.shape or () if isinstance(d, ir.SymbolicDim)]
            assert dims == ["passes" if after_gather else "batch"]
    convolutions = [node for node in graph.graph if node.op_type == "Conv"]
    assert [str(node.outputs[0].shape) for node in convolutions] == [
        "[batch,16,8,8]",
        "[passes,32,8,8]",
    ]


def test_building_leaves_the_traced_graph_as_it_was() -> None:
    source = traced("mlp", "classic")
    before = ir.to_proto(source).SerializeToString()
    predict_graph.build(source)
    stochastic_graph.build(source)
    assert ir.to_proto(source).SerializeToString() == before


def test_exported_graphs_hold_no_path_of_the_machine_that_made_them() -> None:
    graph, _ = predict_graph.build(traced("mlp", "classic"))
    assert b".py" not in ir.to_proto(graph).SerializeToString()


class Foreign(nn.Module):
    """A network of torch's own layers, one of them used twice, whose reshape asks for its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.drop2d = nn.Dropout2d(0.2)
        self.drop = nn.Dropout(0.4)
        self.hidden = nn.Linear(4 * 64, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop2d(torch.relu(self.conv(x.unsqueeze(1))))
        h = self.drop(h.reshape(x.shape[0], -1))
        out: torch.Tensor = self.out(self.drop(torch.tanh(self.hidden(h))))
        return out


def verified(model: nn.Module, x: Floats) -> tuple[tuple[Site, ...], Verification]:
    """Export and verify any model."""
    source = trace.trace(model, torch.from_numpy(x[:2]))
    predict, _ = predict_graph.build(source)
    stochastic = stochastic_graph.build(source)
    graphs = [ir.to_proto(graph).SerializeToString() for graph in (predict, stochastic)]
    sites = sites_of(source)
    return sites, verify.verify(TorchReference(model), sites, graphs[0], graphs[1], x)


def test_a_model_of_torchs_own_layers_is_exported_and_a_layer_used_twice_is_two_sites() -> None:
    torch.manual_seed(0)
    sites, measured = verified(Foreign().eval(), rows(64) / np.float32(16))
    assert [(site.name, site.p, site.scaling, site.mask_shape) for site in sites] == [
        ("drop2d", 0.2, "inverted", (4, 1, 1)),
        ("drop", 0.4, "inverted", (256,)),
        ("drop:2", 0.4, "inverted", (16,)),
    ]
    assert measured.predict_error < 1e-5
    assert measured.stochastic_error < 1e-5


def test_alpha_dropout_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.AlphaDropout(0.1))
    with pytest.raises(ExportError, match=r"^2: AlphaDropout does more than multiply by a mask$"):
        trace.trace(model, torch.from_numpy(rows(2)))


def test_a_network_whose_sites_do_not_reach_the_output_is_refused() -> None:
    with pytest.raises(ExportError, match="no dropout site lies before the output"):
        verified(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), rows(64))


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
    measured = verify.verify(OnnxReference(source), sites, predict, stochastic, x)
    assert measured.stochastic_error < 1e-5
    # Linear behind the site: the passes scatter around eval mode. 140 outputs, two of a row.
    assert measured.expectation_gap == pytest.approx(1.0, abs=0.3)
    # One weight of six that differs must be noticed.
    weights = np.array([1, 2, 3, 4, 5, 7], np.float32).reshape(3, 2)
    for value in graphs[1].graph.initializers.values():
        if value.const_value is not None and value.shape == (3, 2):
            value.const_value = ir.tensor(weights)
    broken = ir.to_proto(graphs[1]).SerializeToString()
    with pytest.raises(VerificationError, match=r"^stochastic.onnx is off from train mode"):
        verify.verify(OnnxReference(source), sites, predict, broken, x)


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
    with pytest.raises(ExportError, match=r"node the_add: .* its first axis is not the batch"):
        stochastic_graph.build(source)


def test_a_site_with_p_0_is_the_identity_in_both_graphs() -> None:
    torch.manual_seed(0)
    model = Model(NetworkConfig("mlp", (8, 8), 10, (16,), 0.0, "double")).eval()
    _, measured = verified(model, rows(64))
    assert measured.expectation_gap < 1.0


class Shared(nn.Module):
    """Two layers with the same weights, a factor on one only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.drop = CustomDropout(0.5, "classic")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.linear(x.flatten(1)))
        out: torch.Tensor = self.linear(self.drop(h))
        return out


def test_weights_that_two_layers_share_are_scaled_for_the_one_behind_the_site_only() -> None:
    torch.manual_seed(0)
    _, measured = verified(Shared().eval(), rows(64) / np.float32(16))
    assert measured.predict_error < 1e-5


def test_the_name_of_a_site_is_its_place_in_the_model() -> None:
    names = [site.name for site in sites_of(traced("convnet", "classic"))]
    assert names == [
        "network.dropout1",
        "network.dropout2",
        "network.classifier.dropouts.0",
        "network.classifier.dropouts.1",
    ]
