"""Graphs in half precision: their errors, the nodes that stay float32, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.blocking import BlockingService
from dropserve.app.inference.query import Query
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.service import Service
from dropserve.export import bundle, half_precision, predict_graph, stochastic_graph, trace, verify
from dropserve.export.pipeline import export
from dropserve.export.reference import TorchReference, VerificationError
from dropserve.export.sites import ExportError, sites_of
from dropserve.model import datasets
from dropserve.model.networks import Model, NetworkConfig, NetworkName

X: NDArray[np.float32] = datasets.split(datasets.load("digits"), 0).test.x


def network(name: NetworkName, x: NDArray[np.float32] = X) -> Model:
    torch.manual_seed(0)
    model = Model(NetworkConfig(name, (8, 8), 10, (32, 32), 0.5, "inverted"))
    model.learn_input_scale(torch.from_numpy(x))
    return model.eval()


def measured(model: Model, x: NDArray[np.float32] = X) -> bundle.Verification:
    """Export in half precision, and verify."""
    traced = trace.trace(model, torch.from_numpy(x[:2]))
    graphs = [predict_graph.build(traced)[0], stochastic_graph.build(traced)]
    predict, stochastic = (
        ir.to_proto(half_precision.build(graph)).SerializeToString() for graph in graphs
    )
    with torch.no_grad():
        outputs = model(torch.from_numpy(x)).numpy()
    reference, sites = TorchReference(model), sites_of(traced)
    return verify.verify(reference, sites, predict, stochastic, x, outputs, half=True)


@pytest.mark.parametrize("name", ["mlp", "convnet", "residual"])
def test_every_network_is_right_within_what_float16_can_hold(name: NetworkName) -> None:
    found = measured(network(name))
    # Float16 keeps 11 bits; float32 would be off by a millionth.
    assert 2**-16 < found.predict_error < 2**-8
    assert 2**-16 < found.stochastic_error < 2**-8


def test_raw_features_may_be_larger_than_float16_reaches() -> None:
    x = 1e7 + 1e6 * X
    assert measured(network("mlp", x), x).predict_error < 2**-8


def test_an_output_around_2000_is_not_rounded_to_whole_units() -> None:
    model = network("mlp")
    *_, last = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        last.bias.fill_(2000)
        outputs = model(torch.from_numpy(X)).numpy()
    error = measured(model).predict_error
    assert error < 2**-8
    spread = np.abs(outputs - outputs.mean(axis=0)).max()
    # Rounding to float16 at 2000 would be off by up to half a unit, 2.5e-4 of the value.
    assert error * spread / 2000 < 1e-6


def test_a_node_that_names_its_own_type_is_refused() -> None:
    class Mask(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (x > 0).float()

    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8), Mask(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)]
    traced = trace.trace(torch.nn.Sequential(*layers).eval(), torch.randn(2, 8))
    with pytest.raises(ExportError, match=r"^node \w+: a Cast between linear operators"):
        half_precision.build(predict_graph.build(traced)[0])


def test_weights_that_float16_cannot_hold_are_refused() -> None:
    model = network("mlp")
    with torch.no_grad():
        first = next(model.network.parameters())
        first[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"weight is beyond float16; export without --half$"):
        measured(model)


def test_a_bundle_in_half_precision_is_served_and_its_manifest_records_the_error(
    built: Path, tmp_path: Path, examples: Any
) -> None:
    place = export(built / "runs" / "digits", tmp_path, "digits", half=True)
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["precision"] == "float16"
    assert 1e-5 < manifest["provenance"]["verification"]["predict_error"] < 2**-8
    for file in (bundle.PREDICT, bundle.STOCHASTIC):
        graph = onnx.load(place / file).graph
        assert {value.type.tensor_type.elem_type for value in (graph.input[0], *graph.output)} == {
            onnx.TensorProto.FLOAT
        }
    limits: Any = {
        "max_rows": 100,
        "max_passes": 100,
        "max_row_passes": 10_000,
        "queue_rows": 10_000,
    }
    half, single = (
        BlockingService(Service(load_engines(models, "cpu"), **limits))
        for models in (tmp_path, built / "models")
    )
    query = Query(examples("digits"), "digits", 1, 100, seed=5, interval=0.9)
    with half, single:
        one, other = half.uncertainty(query), single.uncertainty(query)
    assert one["labels"] == other["labels"]
    np.testing.assert_allclose(np.asarray(one["mean"]), np.asarray(other["mean"]), atol=1e-2)


def test_the_error_includes_the_rounding_of_every_node() -> None:
    """onnxruntime's CPU provider computes in float32 and would show that of the weights alone."""
    model, x = network("mlp"), X[:100]
    traced = trace.trace(model, torch.from_numpy(x[:2]))
    graph = ir.to_proto(half_precision.build(predict_graph.build(traced)[0])).SerializeToString()
    with torch.no_grad():
        outputs = model(torch.from_numpy(x)).numpy()
    feed = {trace.INPUT: x}
    by_node = verify.HalfGraph("predict.onnx", graph, outputs.mean(axis=0)).run(feed)
    as_float32 = verify.Graph("predict.onnx", graph).run(feed)
    spread = np.abs(outputs - outputs.mean(axis=0)).max()
    assert np.abs(by_node - outputs).max() < 2**-8 * spread
    # Layers of 32 units round to 2^-11 of their outputs.
    assert np.abs(by_node - as_float32).max() > 2**-14 * spread


def test_an_offset_common_to_all_rows_does_not_hide_an_error() -> None:
    """An error of 2 is a thousandth of 2000, but far larger than these outputs differ by."""
    model = network("mlp")
    *_, last = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        last.bias.fill_(2000)
        outputs = model(torch.from_numpy(X)).numpy()
    traced = trace.trace(model, torch.from_numpy(X[:2]))
    predict = half_precision.build(predict_graph.build(traced)[0])
    stochastic = half_precision.build(stochastic_graph.build(traced))
    (bias,) = (
        value for value in predict.graph.initializers.values() if "output.bias" in str(value.name)
    )
    bias.const_value = ir.tensor(np.full(10, 2002, np.float32), name=bias.name)
    files = [ir.to_proto(graph).SerializeToString() for graph in (predict, stochastic)]
    with pytest.raises(VerificationError, match=r"^predict\.onnx is off from eval mode by"):
        verify.verify(
            TorchReference(model), sites_of(traced), files[0], files[1], X, outputs, half=True
        )
