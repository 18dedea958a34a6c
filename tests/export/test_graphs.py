"""The two graphs of each network and scaling, compared with torch."""

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from dropserve.export import predict_graph, stochastic_graph, trace, verify
from dropserve.export.sites import sites_of
from dropserve.model import datasets
from dropserve.model.dropout import SCALINGS, Scaling, only_sites_in_train_mode
from dropserve.model.networks import NETWORKS, Model, NetworkConfig, NetworkName

Floats = NDArray[np.float32]
P = 0.3


@cache
def network(name: NetworkName, scaling: Scaling) -> Model:
    """A network whose weights, statistics and input scale differ from their defaults."""
    torch.manual_seed(0)
    model = Model(NetworkConfig(name, (8, 8), 10, (32, 32), P, scaling))
    x = torch.from_numpy(rows(256))
    model.learn_input_scale(x)
    # Train mode updates batch norm's statistics; with the initial ones it is the identity.
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
    """Run torch's train mode with given masks, independently of ``export.verify``.

    Replaces ``torch.rand``, from which ``CustomDropout`` draws.
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


def test_nodes_before_the_first_site_run_once_per_input_row() -> None:
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


def test_the_name_of_a_site_is_its_place_in_the_model() -> None:
    names = [site.name for site in sites_of(traced("convnet", "classic"))]
    assert names == [
        "network.dropout1",
        "network.dropout2",
        "network.classifier.dropouts.0",
        "network.classifier.dropouts.1",
    ]
