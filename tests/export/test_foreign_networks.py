"""Networks of other authors: some are exported, others refused by name."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dropserve.export import predict_graph, stochastic_graph, trace, verify
from dropserve.export.bundle import Verification
from dropserve.export.reference import Floats, TorchReference, VerificationError
from dropserve.export.sites import ExportError, Site, sites_of
from dropserve.model.dropout import CustomDropout
from dropserve.model.networks import Model, NetworkConfig
from tests.export.test_graphs import rows


class Foreign(nn.Module):
    """A network of torch's own layers, one of them used twice, with a reshape by batch size."""

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
    with torch.no_grad():
        outputs = model(torch.from_numpy(x)).numpy()
    return sites, verify.verify(TorchReference(model), sites, graphs[0], graphs[1], x, outputs)


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


class Tripled(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


class Shifted(CustomDropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("layer", [Tripled(0.5), Shifted(0.5)])
def test_a_subclass_of_a_dropout_layer_is_refused_because_it_may_act_otherwise(
    layer: nn.Module,
) -> None:
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 8))
    with pytest.raises(ExportError, match=r"^1: \w+ is a subclass of a dropout layer and may act"):
        trace.trace(model, torch.from_numpy(rows(2)))


def test_a_foreign_layer_that_drops_all_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(64, 8))
    with pytest.raises(ExportError, match=r"^1: p must be a number in \[0, 1\), not 1.0$"):
        trace.trace(model, torch.from_numpy(rows(2)))


@pytest.mark.parametrize(("layer", "axes"), [(nn.Dropout2d, 4), (nn.Dropout3d, 5)])
def test_channel_dropout_of_fewer_axes_is_refused_by_its_site(
    layer: type[nn.Dropout2d | nn.Dropout3d], axes: int
) -> None:
    model = nn.Sequential(nn.Flatten(), layer(0.5), nn.Linear(64, 8))
    with pytest.raises(ExportError, match=rf"^dropout site 1: its input must have {axes} axes"):
        sites_of(trace.trace(model, torch.from_numpy(rows(2))))


class InPlace(nn.Module):
    """Reads the input of an in-place layer again, which no graph can represent."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.drop = nn.Linear(64, 16), nn.Dropout(0.5, inplace=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.hidden(x.flatten(1)))
        out: torch.Tensor = self.last(h + self.drop(h))
        return out


def test_a_layer_that_changes_its_input_in_place_is_caught_where_that_input_is_read_again() -> None:
    torch.manual_seed(0)
    with pytest.raises(VerificationError, match=r"^stochastic.onnx is off from train mode"):
        verified(InPlace().eval(), rows(64) / np.float32(16))


class Unused(nn.Module):
    """Calls a dropout layer and ignores its output."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.drop = CustomDropout(0.5, "classic"), CustomDropout(0.5, "classic")
        self.last = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        self.idle(x)
        out: torch.Tensor = self.last(self.drop(x))
        return out


def test_a_dropout_layer_whose_output_is_not_used_is_named() -> None:
    with pytest.raises(VerificationError, match=r"^dropout site idle has no part in the network's"):
        verified(Unused().eval(), rows(64))


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_network_that_torch_cannot_trace_is_one_line() -> None:
    with pytest.raises(ExportError, match=r"^torch cannot trace the network: [^\n]+$"):
        trace.trace(Untraceable(), torch.from_numpy(rows(2)))


def test_a_network_whose_sites_do_not_reach_the_output_is_refused() -> None:
    with pytest.raises(ExportError, match="no dropout site lies before the output"):
        verified(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), rows(64))


def test_a_site_with_p_0_is_the_identity_in_both_graphs() -> None:
    torch.manual_seed(0)
    model = Model(NetworkConfig("mlp", (8, 8), 10, (16,), 0.0, "double")).eval()
    _, measured = verified(model, rows(64))
    assert measured.expectation_gap < 1.0


class Shared(nn.Module):
    """Two layers that share weights, one of them behind a site."""

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
