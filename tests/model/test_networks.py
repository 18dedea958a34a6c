"""The networks: shapes, dropout sites, and their built-in scales of input and target."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dropserve.model.dropout import CustomDropout
from dropserve.model.networks import NETWORKS, Model, NetworkConfig, NetworkName


def build(
    network: NetworkName,
    shape: tuple[int, ...] = (8, 8),
    p: float = 0.5,
    seed: int = 0,
    input_p: float = 0.0,
) -> Model:
    torch.manual_seed(seed)
    return Model(NetworkConfig(network, shape, 3, (12, 6), p, "classic", input_p))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ("mlp", (5,)),
        ("mlp", (8, 8)),
        ("mlp", (2, 3, 4)),
        ("residual", (5,)),
        ("residual", (8, 8)),
        ("convnet", (8, 8)),
        ("convnet", (3, 9, 7)),
        ("convnet", (2, 2)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_rows_of_its_shape_become_rows_of_outputs(
    network: NetworkName, shape: tuple[int, ...], training: bool
) -> None:
    out = build(network, shape).train(training)(normal(4, *shape))
    assert out.shape == (4, 3)
    assert out.isfinite().all()


@pytest.mark.parametrize("shape", [(10,), (1, 8), (8, 1), (3, 1, 8), (2, 3, 8, 8)])
def test_a_convnet_refuses_rows_that_are_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="convnet needs images") as refused:
        build("convnet", shape)
    assert str(list(shape)) in str(refused.value)


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        ("mlp", [False, False]),
        ("residual", [False, False]),
        ("convnet", [True, True, False, False]),
    ],
)
def test_every_hidden_layer_has_its_dropout_site(
    network: NetworkName, channels: list[bool]
) -> None:
    sites = [site for site in build(network, p=0.3).modules() if isinstance(site, CustomDropout)]
    assert [site.channels for site in sites] == channels
    assert {(site.p, site.scaling) for site in sites} == {(0.3, "classic")}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_features_have_a_site_with_input_p(network: NetworkName) -> None:
    plain, dropping = build(network), build(network, input_p=0.25)
    sites = [site for site in dropping.modules() if isinstance(site, CustomDropout)]
    assert [site.p for site in sites] == [0.25] + [0.5] * (len(sites) - 1)
    assert len(sites) == 1 + sum(isinstance(site, CustomDropout) for site in plain.modules())
    # The same weights under the same names, so that old checkpoints load.
    ours, theirs = plain.state_dict(), dropping.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_drops_standardised_features_and_evaluation_keeps_them() -> None:
    model = build("mlp", (1000,), p=0.0, input_p=0.25)
    x = normal(50, 1000) * 10 + 100
    model.learn_input_scale(x)
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    model.eval()(x)
    standardised = (x - model.mean) / model.std
    dropped = seen[0] == 0
    # A share of 50,000 features has a standard deviation of 0.002.
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(seen[0][~dropped], standardised[~dropped])
    torch.testing.assert_close(seen[1], 0.75 * standardised)


@pytest.mark.parametrize("input_p", [-0.1, 1.0, float("nan")])
def test_an_invalid_input_p_is_an_error(input_p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be a number in \[0, 1\)"):
        build("mlp", input_p=input_p)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_seed_decides_the_fresh_weights(network: NetworkName) -> None:
    x = normal(4, 8, 8)
    first, again = build(network).eval()(x), build(network).eval()(x)
    assert torch.equal(first, again)
    assert not torch.equal(build(network, seed=1).eval()(x), first)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_row_has_the_same_output_alone_and_in_a_batch(network: NetworkName) -> None:
    model, x = build(network).eval(), normal(5, 8, 8)
    alone = torch.cat([model(row) for row in torch.split(x, 1)])
    torch.testing.assert_close(model(x), alone)


def test_the_skip_path_goes_around_the_dropout_sites() -> None:
    # With p this high no unit of a site survives (fewer than 200 draws of probability 1e-6).
    x = normal(4, 8, 8)
    plain, residual = build("mlp", p=1 - 1e-6)(x), build("residual", p=1 - 1e-6)(x)
    assert torch.equal(plain, plain[:1].expand_as(plain))
    assert len(residual.unique(dim=0)) == 4


def test_columns_are_standardised_within_the_model() -> None:
    x = normal(50, 3) * torch.tensor([1.0, 100.0, 1e-3]) + torch.tensor([0.0, -7.0, 5.0])
    model = build("mlp", (3,)).eval()
    model.learn_input_scale(x)
    columns = x.numpy().astype(np.float64)
    np.testing.assert_allclose(model.mean, columns.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.std, columns.std(0), rtol=1e-4)
    standardised = (columns - columns.mean(0)) / columns.std(0)
    expected = model.network(torch.from_numpy(standardised.astype(np.float32)))
    # The third column, of std 1e-3, loses three of its seven digits when its mean of 5 is
    # subtracted.
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


def test_the_input_scale_is_saved_with_the_weights() -> None:
    model, other = build("mlp", (3,)).eval(), build("mlp", (3,)).eval()
    x = normal(50, 3) * 10 + 5
    model.learn_input_scale(x)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0, 123.456, 1e6])
def test_a_constant_column_is_only_centred(constant: float) -> None:
    x = normal(1000, 2)
    x[:, 1] = constant
    model = build("mlp", (2,))
    model.learn_input_scale(x)
    assert model.std[1] == 1
    torch.testing.assert_close(model.mean[1], torch.tensor(constant), rtol=1e-6, atol=0)


def test_pixels_share_one_mean_and_one_scale() -> None:
    # A pixel that is blank but for one dot must not become a huge number.
    x = torch.rand((100, 8, 8), generator=torch.Generator().manual_seed(0)) * 16
    x[:, 0, 0] = 0
    x[0, 0, 0] = 1e-3
    model = build("mlp")
    model.learn_input_scale(x)
    torch.testing.assert_close(model.mean, x.mean().reshape(1))
    torch.testing.assert_close(model.std, x.std(correction=0).reshape(1))
    assert ((x - model.mean) / model.std).abs().max() < 3


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_folding_the_target_scale_makes_outputs_times_std_plus_mean(
    network: NetworkName, training: bool
) -> None:
    model, x = build(network).train(training), normal(6, 8, 8)
    mean, std = torch.tensor([150.0, 0.0, -2.0]), torch.tensor([77.0, 1.0, 0.1])
    torch.manual_seed(3)
    before = model(x)
    model.fold_target_scale(mean, std)
    torch.manual_seed(3)  # the same masks
    torch.testing.assert_close(model(x), before * std + mean)
