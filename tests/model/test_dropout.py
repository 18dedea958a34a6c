"""The dropout layer: values, gradients, expectations, errors, the warning, and Latin hypercubes."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dropserve.model import dropout
from dropserve.model.dropout import (
    SCALINGS,
    CustomDropout,
    Scaling,
    double_scaling_warning,
    latin_hypercube,
    only_sites_in_train_mode,
)

reproducible = settings(derandomize=True, deadline=None, max_examples=50)


def test_ones_become_zero_or_two_in_train_mode() -> None:
    layer = CustomDropout(p=0.5)
    torch.manual_seed(0)
    for _ in range(20):
        assert set(layer(torch.ones(5, 5)).flatten().tolist()) == {0.0, 2.0}


def test_ones_become_a_half_in_eval_mode() -> None:
    layer = CustomDropout(p=0.5).eval()
    assert torch.equal(layer(torch.ones(5, 5)), torch.full((5, 5), 0.5))


def test_the_gradient_goes_through_the_mask_of_the_output() -> None:
    x = torch.ones(5, 5, requires_grad=True)
    torch.manual_seed(0)
    y = CustomDropout(p=0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(x.grad, y)


@reproducible
@given(
    p=st.floats(0.0, 0.99),
    scaling=st.sampled_from(SCALINGS),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_a_unit_is_dropped_or_scaled_and_nothing_else(
    p: float, scaling: Scaling, shape: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape)
    y = CustomDropout(p, scaling)(x)
    scaled = x if scaling == "classic" else x / (1 - p)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, scaled, torch.zeros_like(x)))


@pytest.mark.parametrize(
    ("scaling", "factor"), [("double", 0.75), ("classic", 0.75), ("inverted", 1.0)]
)
def test_eval_mode_scales_every_unit_alike(scaling: Scaling, factor: float) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CustomDropout(0.25, scaling).eval()(x), x * factor)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_p_of_zero_is_the_identity(scaling: Scaling, channels: bool, training: bool) -> None:
    # torch.rand can draw exactly 0, once in 2^24; seed 12 does so within the million.
    x = torch.ones(1000, 1000, 1, 1)
    torch.manual_seed(12)
    assert (torch.rand(x.shape) == 0).any()
    for p in (0, 0.0, -0.0):
        torch.manual_seed(12)
        layer = CustomDropout(p, scaling, channels=channels).train(training)
        assert torch.equal(layer(x), x)


@pytest.mark.parametrize(
    "p",
    [
        1,
        1.0,
        1.5,
        -0.1,
        -1e-300,
        math.nan,
        math.inf,
        -math.inf,
        "0.5",
        "",
        True,
        False,
        None,
        [0.5],
    ],
)
def test_any_p_but_a_number_from_zero_to_below_one_is_refused_by_value(p: object) -> None:
    with pytest.raises(ValueError, match=r"^p must be a number in \[0, 1\)") as refused:
        CustomDropout(p)  # type: ignore[arg-type] # the point: a caller without a type checker
    assert str(refused.value).endswith(f"not {p!r}")


@pytest.mark.parametrize("scaling", ["Double", "", "foo", None, 1])
def test_an_unknown_scaling_is_refused_by_value(scaling: object) -> None:
    with pytest.raises(ValueError, match="double, classic, inverted") as refused:
        CustomDropout(0.5, scaling)  # type: ignore[arg-type] # the point: no type checker
    assert str(refused.value).endswith(f"not {scaling!r}")


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mean_of_train_mode_is_eval_mode_except_for_double(scaling: Scaling, p: float) -> None:
    count = 200_000
    ones = torch.ones(count)
    layer = CustomDropout(p, scaling)
    torch.manual_seed(0)
    train_mean = layer(ones).mean(dtype=torch.float64).item()
    eval_value = layer.eval()(ones)[0].item()
    # A unit is 0 or factor: its standard deviation is factor * sqrt(p * (1 - p)).
    factor = 1.0 if scaling == "classic" else 1 / (1 - p)
    four_standard_errors = 4 * factor * math.sqrt(p * (1 - p) / count)
    gap = 1 / (1 - p) if scaling == "double" else 1.0
    assert abs(train_mean - gap * eval_value) < four_standard_errors


def test_channels_are_dropped_whole() -> None:
    torch.manual_seed(0)
    y = CustomDropout(0.5, channels=True)(torch.ones(6, 8, 4, 5))
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
    one_value_a_channel = y[:, :, 0, 0]
    # Rows and channels draw independently: all of them coincide with a probability below 2^-39.
    assert len(one_value_a_channel.unique(dim=0)) > 1
    assert one_value_a_channel.unique(dim=1).shape[1] > 1


def test_units_are_dropped_one_by_one() -> None:
    torch.manual_seed(0)
    y = CustomDropout(0.5)(torch.ones(6, 8, 4, 5))
    assert set(y[0, 0].flatten().tolist()) == {0.0, 2.0}


def test_channel_dropout_of_rows_without_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"channel dropout needs .* not \(8,\)"):
        CustomDropout(0.5, channels=True)(torch.ones(6, 8))


@pytest.mark.parametrize("channels", [False, True])
def test_the_same_seed_draws_the_same_mask_and_another_seed_another(channels: bool) -> None:
    layer = CustomDropout(0.5, channels=channels)
    x = torch.ones(8, 16, 2)
    torch.manual_seed(1)
    first, later = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    # Equal by chance with probability 2^-128 (one draw for each of 8 x 16 channels).
    assert not torch.equal(later, first)
    torch.manual_seed(2)
    assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_type_of_the_numbers_is_kept(dtype: torch.dtype) -> None:
    layer = CustomDropout(0.5)
    assert layer(torch.ones(2, 2, dtype=dtype)).dtype == dtype
    assert layer.eval()(torch.ones(2, 2, dtype=dtype)).dtype == dtype


def test_the_examples_of_the_docstrings_run_as_printed() -> None:
    results = doctest.testmod(dropout)
    assert results.failed == 0
    assert results.attempted > 0


def test_the_warning_of_double_scaling_is_one_line_with_the_shares_passed_on() -> None:
    model = nn.Sequential(CustomDropout(0.5), nn.Sequential(CustomDropout(0.2)), CustomDropout(0))
    warning = double_scaling_warning(model)
    assert warning is not None
    assert "\n" not in warning
    # In eval mode each site scales down by 1 - p once more, and all of them by the product.
    for part in ("'double'", "as little as 0.5 of", "0.4 over all 2"):
        assert part in warning


@pytest.mark.parametrize(
    "layer",
    [
        CustomDropout(0.5, "classic"),
        CustomDropout(0.5, "inverted"),
        CustomDropout(0.0, "double"),
        nn.Dropout(0.5),
        nn.Linear(1, 1),
    ],
)
def test_there_is_no_warning_where_nothing_scales_twice(layer: nn.Module) -> None:
    assert double_scaling_warning(nn.Sequential(layer)) is None


def test_only_the_sites_run_in_train_mode_and_all_modes_come_back() -> None:
    site, norm, foreign = CustomDropout(0.5), nn.BatchNorm1d(4), nn.Dropout(0.5)
    model = nn.Sequential(nn.Sequential(norm, site), foreign).train()
    foreign.eval()
    running_mean = norm.running_mean
    assert running_mean is not None
    before = running_mean.clone()
    modes: list[bool] = []

    def fail_in_the_middle() -> None:
        with only_sites_in_train_mode(model):
            modes.extend([site.training, norm.training, foreign.training])
            model(torch.randn(8, 4))
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_middle()
    assert modes == [True, False, False]
    assert torch.equal(running_mean, before)
    assert site.training
    assert norm.training
    assert not foreign.training
    assert model.training
    site.eval()
    with only_sites_in_train_mode(model):
        assert site.training
    assert not site.training


def test_a_unit_is_kept_where_torchs_uniform_number_reaches_p() -> None:
    torch.manual_seed(4)
    expected = torch.rand(6, 8) >= 0.3
    torch.manual_seed(4)
    assert torch.equal(CustomDropout(0.3, "classic")(torch.ones(6, 8)), expected.float())


def test_the_sites_draw_by_a_given_function_and_as_before_afterwards() -> None:
    site = CustomDropout(0.5, "classic")
    ones = torch.ones(4, 2)
    with only_sites_in_train_mode(site, lambda shape, _: torch.arange(8).reshape(shape) / 8):
        assert site(ones).flatten().tolist() == [0.0] * 4 + [1.0] * 4
    torch.manual_seed(1)
    first = site(ones)
    torch.manual_seed(1)
    assert torch.equal(CustomDropout(0.5, "classic")(ones), first)


@pytest.mark.parametrize("passes", [1, 7, 100])
def test_one_hypercube_number_of_a_unit_falls_into_each_part(passes: int) -> None:
    torch.manual_seed(0)
    units = 20_000
    drawn = latin_hypercube(passes)((passes * units // 10, 10), torch.device("cpu"))
    parts = (drawn.reshape(passes, units) * passes).floor().sort(dim=0).values
    assert torch.equal(parts, torch.arange(passes).double()[:, None].expand(-1, units))


@pytest.mark.parametrize(("p", "passes"), [(0.5, 100), (0.3, 10), (0.25, 30), (0.999, 100)])
def test_the_passes_of_a_hypercube_keep_each_unit_as_often_as_p_says(p: float, passes: int) -> None:
    site, rows, units = CustomDropout(p, "classic"), 50, 400
    torch.manual_seed(0)
    with only_sites_in_train_mode(site, latin_hypercube(passes)):
        kept = site(torch.ones(passes * rows, units)).reshape(passes, rows * units)
    # (1 - p) T, rounded up or down at random so that it is right on average.
    expected = (1 - p) * passes
    counts = kept.sum(dim=0)
    assert ((counts - expected).abs() < 1).all()
    rounding = math.sqrt(max(expected % 1 * (1 - expected % 1), 1e-12) / (rows * units))
    assert abs(counts.mean(dtype=torch.float64).item() - expected) < 4 * rounding + 1e-6
    # Each pass alone is an ordinary one: 4.5 standard errors, since there are up to 100.
    share = kept.mean(dim=1)
    assert ((share - (1 - p)).abs() < 4.5 * math.sqrt(p * (1 - p) / (rows * units))).all()


def test_units_of_a_hypercube_are_independent_and_two_passes_hardly_correlated() -> None:
    torch.manual_seed(0)
    kept = latin_hypercube(10)((10, 100_000), torch.device("cpu")) >= 0.5
    one, other = kept[:, ::2].double(), kept[:, 1::2].double()
    # Two units of a pass agree in half of the passes: 5 of 10, standard error over 50,000 pairs.
    agree = (one == other).double().mean().item()
    assert abs(agree - 0.5) < 4 * math.sqrt(0.25 / 10 / 50_000)
    # Two passes of a unit: drawing 5 of 10 without replacement has a correlation of -1/9.
    both = (kept[0] & kept[1]).double().mean().item()
    assert abs(both - 0.5 * 4 / 9) < 4 * math.sqrt(0.25 / 100_000)
