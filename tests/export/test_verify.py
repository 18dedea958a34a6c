"""Verification catches wrong graphs, and says which graph, where and by how much."""

import copy
import re
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import nn
from torch.nn import functional

from dropserve.export import predict_graph, stochastic_graph, trace, verify
from dropserve.export.bundle import Verification
from dropserve.export.reference import TorchReference, VerificationError
from dropserve.export.sites import Site, sites_of
from dropserve.model import datasets
from dropserve.model.dropout import CustomDropout, Scaling
from dropserve.model.networks import Model, NetworkConfig, NetworkName

Floats = NDArray[np.float32]
X: Floats = datasets.split(datasets.load("digits"), 0).test.x


@cache
def network(
    name: NetworkName = "mlp", scaling: Scaling = "classic", hidden: tuple[int, ...] = (32, 32)
) -> Model:
    torch.manual_seed(0)
    model = Model(NetworkConfig(name, (8, 8), 10, hidden, 0.5, scaling))
    model.learn_input_scale(torch.from_numpy(X))
    return model.eval()


@cache
def traced(model: nn.Module) -> ir.Model:
    return trace.trace(model, torch.from_numpy(X[:2]))


def export(model: nn.Module) -> tuple[ir.Model, ir.Model, ir.Model]:
    source = traced(model)
    return source, predict_graph.build(source)[0], stochastic_graph.build(source)


def check(model: nn.Module, source: ir.Model, predict: ir.Model, stochastic: ir.Model) -> object:
    graphs = [ir.to_proto(graph).SerializeToString() for graph in (predict, stochastic)]
    with torch.no_grad():
        outputs = model(torch.from_numpy(X)).numpy()
    return verify.verify(TorchReference(model), sites_of(source), graphs[0], graphs[1], X, outputs)


def named(graph: ir.Model, operator: str) -> list[ir.Node]:
    return [node for node in graph.graph if node.op_type == operator]


def bypass(node: ir.Node) -> None:
    """Remove a node's effect: its first input replaces its output."""
    value = node.inputs[0]
    assert value is not None
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)


def test_a_factor_that_is_left_out_of_the_predict_graph_is_named_by_its_site() -> None:
    model = network("residual")
    source, predict, stochastic = export(model)
    bypass(named(predict, "Mul")[1])
    with pytest.raises(
        VerificationError,
        match=r"^predict.onnx is off from eval mode by [\d.]+ \(allowed: 1e-05\); "
        r"the factor of site network.blocks.1.dropout is left out$",
    ):
        check(model, source, predict, stochastic)


def test_weights_that_were_not_scaled_are_named_by_their_site() -> None:
    model = network("mlp")
    source, predict, stochastic = export(model)
    weight = named(predict, "Gemm")[1].inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 2)
    with pytest.raises(VerificationError, match=r"predict.onnx .* site network.dropouts.0 is left"):
        check(model, source, predict, stochastic)


def test_masks_at_each_others_sites_are_caught_and_located() -> None:
    model = network("mlp")
    source, predict, stochastic = export(model)
    first, second = stochastic.graph.inputs[2:]
    names = first.name, second.name
    first.name, second.name = "swap", names[0]
    first.name = names[1]
    with pytest.raises(
        VerificationError,
        match=r"^stochastic.onnx is off from train mode with the same masks by [\d.]+ .*"
        r"; at site network.dropouts.0 by [\d.]+$",
    ):
        check(model, source, predict, stochastic)


def test_a_train_factor_that_is_left_out_is_caught_with_masks_that_keep_all() -> None:
    model = network("residual", "inverted")
    source, predict, stochastic = export(model)
    bypass(named(stochastic, "Mul")[1])  # the first multiplies by the mask
    with pytest.raises(VerificationError, match=r"stochastic.onnx .*; also with masks that keep"):
        check(model, source, predict, stochastic)


def test_a_gather_that_is_left_out_on_the_skip_path_is_caught() -> None:
    model = network("residual")
    source, predict, stochastic = export(model)
    gathers = named(stochastic, "Gather")
    assert len(gathers) == 2  # the site's input and the skip path around it
    for gather in gathers:
        (use,) = gather.outputs[0].uses()
        if use.node.op_type == "Add":
            bypass(gather)
    with pytest.raises(VerificationError, match=r"^stochastic.onnx "):
        check(model, source, predict, stochastic)


def test_passes_that_ignore_their_row_are_caught() -> None:
    model = network("mlp")
    source, predict, stochastic = export(model)
    (gather,) = named(stochastic, "Gather")
    zeros = ir.node("Sub", [gather.inputs[1], gather.inputs[1]])
    stochastic.graph.insert_before(gather, zeros)
    gather.replace_input_with(1, zeros.outputs[0])
    with pytest.raises(VerificationError, match=r"stochastic.onnx .* 64 rows, 4 passes each"):
        check(model, source, predict, stochastic)


def test_a_mask_that_is_not_used_is_caught() -> None:
    model = network("mlp", hidden=(32,))
    source, predict, stochastic = export(model)
    bypass(named(stochastic, "Mul")[0])
    with pytest.raises(VerificationError, match=r"stochastic.onnx .* at site network.dropouts.0"):
        check(model, source, predict, stochastic)


def test_a_dropout_node_in_a_graph_is_caught() -> None:
    model = network("mlp")
    source, predict, stochastic = export(model)
    relu = named(predict, "Relu")[0]
    relu.op_type = "Dropout"
    with pytest.raises(VerificationError, match=r"^predict.onnx: node .* is a Dropout$"):
        check(model, source, predict, stochastic)


def test_a_graph_that_gives_nan_is_caught() -> None:
    model = network("mlp")
    source, predict, stochastic = export(model)
    named(predict, "Relu")[1].op_type = "Log"
    with pytest.raises(VerificationError, match=r"^predict.onnx is off from eval mode by inf"):
        check(model, source, predict, stochastic)


class FunctionalDropout(nn.Module):
    """A functional dropout, which leaves no trace in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 16), nn.ReLU())
        self.block = Block()
        self.out = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.block(self.inner(x.flatten(1))))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = CustomDropout(0.5, "classic")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional.dropout(self.drop(x), 0.5, self.training)
        return out


def test_randomness_that_is_no_site_is_named_by_its_module() -> None:
    torch.manual_seed(0)
    model = FunctionalDropout().eval()
    source, predict, stochastic = export(model)
    with pytest.raises(
        VerificationError, match=r"^module block has randomness that is no dropout site: "
    ):
        check(model, source, predict, stochastic)


class InnerDropout(nn.Module):
    """Dropout by an argument of a module that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = CustomDropout(0.5, "classic")
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.drop(x))
        out: torch.Tensor = self.out(states[:, -1])
        return out


def test_randomness_of_a_modules_own_argument_is_named_by_that_module() -> None:
    torch.manual_seed(0)
    model = InnerDropout().eval()
    site = Site("drop", 0.5, "classic", (8, 8), 1.0, 0.5, ir.node("Relu", []))
    masks = verify.draw_masks((site,), 4, np.random.default_rng(0))
    with pytest.raises(VerificationError, match=r"^module lstm has randomness .* own dropout arg"):
        TorchReference(model).check_no_other_randomness(X[:4], masks)


class Mixing(nn.Module):
    """Subtracts the mean of the batch behind the site."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16)
        self.drop = CustomDropout(0.5, "classic")
        self.out = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(torch.relu(self.hidden(x.flatten(1))))
        out: torch.Tensor = self.out(h - h.mean(0))
        return out


def test_a_network_that_mixes_the_rows_of_a_batch_is_refused() -> None:
    torch.manual_seed(0)
    model = Mixing().eval()
    with pytest.raises(VerificationError, match=r"mixes the rows of a batch: a row alone is off"):
        check(model, *export(model))


def test_a_graph_whose_passes_depend_on_each_other_is_refused() -> None:
    model = network("mlp")
    source, _, stochastic = export(model)
    (gather,) = named(stochastic, "Gather")
    uses = list(gather.outputs[0].uses())
    axes = value("axes", np.array([0]))
    stochastic.graph.register_initializer(axes)
    mean = ir.node("ReduceMean", [gather.outputs[0], axes])
    centred = ir.node("Sub", [gather.outputs[0], mean.outputs[0]])
    for use in uses:
        use.node.replace_input_with(use.idx, centred.outputs[0])
    stochastic.graph.insert_after(gather, [mean, centred])
    graph = verify.Graph("stochastic.onnx", ir.to_proto(stochastic).SerializeToString())
    with pytest.raises(VerificationError, match=r"mixes the rows of a batch: a pass alone is off"):
        verify.check_passes_alone(sites_of(source), graph, X[:8], np.ones(10, np.float32))


def value(name: str, array: NDArray[np.int64]) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(array, name=name))


def test_passes_that_are_equal_for_all_seeds_are_refused() -> None:
    model = network("mlp", hidden=(32,))
    source, _, stochastic = export(model)
    bypass(named(stochastic, "Mul")[0])
    graph = verify.Graph("stochastic.onnx", ir.to_proto(stochastic).SerializeToString())
    with pytest.raises(VerificationError, match="two seeds give the same 100 passes"):
        verify.check_seeds_disagree(sites_of(source), graph, X[:1])


@pytest.mark.parametrize("units", [1e-6, 1.0, 1e6])
def test_errors_count_in_each_targets_own_unit(units: float) -> None:
    """Wrong weights of a small target must show beside large targets."""
    model = copy.deepcopy(network("mlp", hidden=(32,)))
    scale = torch.full((10,), units)
    scale[3] = 1e-3 * units
    model.fold_target_scale(torch.zeros(10), scale)
    source, predict, stochastic = export(model)
    result = check(model, source, predict, stochastic)
    assert isinstance(result, Verification)
    weight = named(stochastic, "Gemm")[-1].inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    broken = weight.const_value.numpy().copy()
    broken[3] = 0.0
    weight.const_value = ir.tensor(broken)
    with pytest.raises(VerificationError, match=r"^stochastic.onnx is off"):
        check(model, source, predict, stochastic)


def measured(scaling: Scaling, hidden: tuple[int, ...]) -> tuple[float, float]:
    model = network("mlp", scaling, hidden)
    result = check(model, *export(model))
    assert isinstance(result, Verification)
    return result.expectation_gap, result.expectation_gap_largest


@pytest.mark.parametrize("scaling", ["classic", "inverted"])
def test_the_mean_of_the_passes_is_eval_mode_where_the_network_behind_the_site_is_linear(
    scaling: Scaling,
) -> None:
    gap, largest = measured(scaling, (32,))
    # All 640 outputs lie within four standard errors with a probability of 24 in 25; the seed is
    # fixed.
    assert largest < 4.0
    # Root mean square of 640 standard normal numbers, of which the ten of a row are correlated.
    assert gap == pytest.approx(1.0, abs=0.3)


def test_the_gap_is_measured_where_the_network_is_not_linear_and_where_it_is_scaled_twice() -> None:
    linear, _ = measured("classic", (32,))
    curved, _ = measured("classic", (32, 32))
    double, _ = measured("double", (32,))
    assert curved > linear
    assert double > 10.0


@pytest.mark.parametrize(
    ("gap", "scaling", "says"),
    [
        (1.0, "classic", "scatter around the output of eval mode"),
        (3.0, "classic", "not linear"),
        (30.0, "double", "scaled down once more at each site"),
    ],
)
def test_the_summary_explains_the_gap(gap: float, scaling: Scaling, says: str) -> None:
    sites = sites_of(traced(network("mlp", scaling)))
    text = verify.summary(
        Verification(
            predict_error=1e-7,
            predict_rows=10,
            stochastic_error=2e-7,
            stochastic_passes=20,
            expectation_gap=gap,
            expectation_gap_largest=2 * gap,
            expectation_gap_passes=1000,
        ),
        sites,
    )
    assert says in text
    assert f"{gap:.1f} standard errors" in text


def passes_through_a_dropout_node(first: str, shape: list[int]) -> Floats:
    """Run eight equal rows of ones through Relu, Dropout on ``first``, and a sum."""
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["h"]),
            helper.make_node("Dropout", [first, "ratio", "training"], ["d"]),
            helper.make_node("MatMul", ["d", "w"], ["sum"]),
        ],
        "passes",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, None)],
        [
            helper.make_tensor("ratio", onnx.TensorProto.FLOAT, [], [0.5]),
            helper.make_tensor("training", onnx.TensorProto.BOOL, [], [True]),
            helper.make_tensor("w", onnx.TensorProto.FLOAT, [64, 1], [1.0] * 64),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = verify.Graph("dropout.onnx", model.SerializeToString())
    return session.run({"x": np.ones(shape, np.float32)})


def test_onnxruntime_removes_dropout_in_training_mode_so_masks_must_be_an_input() -> None:
    """The reason for the whole design (onnxruntime issues 5549 and 9333)."""
    passes = passes_through_a_dropout_node("h", [8, 64])
    # With dropout, each would be the sum of some 32 doubled units of 64, and vary.
    assert passes.tolist() == [[64.0]] * 8
    # A node at the graph's edge survives, so a test of a single node would not show the removal.
    assert len(set(passes_through_a_dropout_node("x", [8, 64])[:, 0])) > 1


def test_wrong_weights_behind_the_sites_are_reported_with_their_error() -> None:
    model = network("mlp")
    source, predict, stochastic = export(model)
    for gemm in named(stochastic, "Gemm")[2:]:
        weight = gemm.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() + 0.5)
    with pytest.raises(VerificationError) as caught:
        check(model, source, predict, stochastic)
    off = re.search(r"by ([\d.]+) \(allowed", str(caught.value))
    assert off
    assert float(off[1]) > 0.1
