"""Each statistic against its definition, computed another way, and its bounds."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats

from dropserve.app.inference.batch import softmax
from dropserve.app.uncertainty import statistics
from dropserve.expectation import expectation_gap

Samples = NDArray[np.float32]
quick = settings(derandomize=True, deadline=None, max_examples=100)


@st.composite
def logits(draw: st.DrawFn) -> Samples:
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=5))
    # Saturated probabilities, down to exact zeros, belong to the cases.
    values = st.floats(-200, 200, width=32)
    return draw(hnp.arrays(np.float32, shape, elements=values))


def probabilities(seed: int = 0, passes: int = 40) -> Samples:
    z = np.random.default_rng(seed).normal(0, 2, (passes, 3, 4)).astype(np.float32)
    return softmax(z)


@quick
@given(logits())
def test_probabilities_are_in_bounds_and_sum_to_1(z: Samples) -> None:
    p = softmax(z)
    assert p.dtype == np.float32
    assert ((p >= 0) & (p <= 1)).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-6)


def test_softmax_of_logits_further_apart_than_float32_reaches() -> None:
    logits = np.array([[3e38, -3e38, 3e38]], np.float32)
    np.testing.assert_array_equal(softmax(logits), [[0.5, 0, 0.5]])


def test_softmax_by_value() -> None:
    p = softmax(np.array([[0, math.log(2), math.log(5)]], np.float32))
    np.testing.assert_allclose(p, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)


def test_moments_by_value() -> None:
    samples = np.array([1, 2, 3, 6], np.float32).reshape(4, 1, 1)
    m = statistics.moments(samples)
    assert m.mean == 3.0
    # Squared distances 4, 1, 0 and 9, divided by T - 1 = 3.
    np.testing.assert_allclose(m.std, math.sqrt(14 / 3))
    np.testing.assert_allclose(m.standard_error, math.sqrt(14 / 3) / 2)
    # A quarter and three quarters of the way along the sorted values.
    interval = statistics.passes_interval(samples, level=0.5)
    assert (interval.lower.item(), interval.upper.item()) == (1.75, 3.75)


def test_one_pass_has_no_spread_and_an_unknown_standard_error() -> None:
    samples = probabilities(passes=1)
    for replicate in (1, 10):
        m = statistics.moments(samples, replicate)
        assert (m.std == 0).all()
        assert np.isnan(m.standard_error).all()
    interval = statistics.passes_interval(samples, level=0.9)
    assert np.array_equal(interval.lower, m.mean)
    assert np.array_equal(interval.upper, m.mean)


def test_the_standard_error_of_replicates_by_value() -> None:
    # Four replicates of two passes, whose means are 0, 2, 4 and 6, and one of a single pass: 3.
    samples = np.array([-5, 5, -3, 7, -1, 9, 1, 11, 3], np.float32).reshape(9, 1, 1)
    m = statistics.moments(samples, replicate=2)
    assert m.mean == 3.0
    # 2 (9 + 1 + 1 + 9) + 1 x 0, divided by 5 - 3 and by 9.
    np.testing.assert_allclose(m.standard_error, math.sqrt(40 / 2 / 9))


def test_three_replicates_cannot_tell_so_the_bound_of_all_masks_counts() -> None:
    samples = probabilities(passes=30)
    m = statistics.moments(samples, replicate=10)
    np.testing.assert_allclose(m.standard_error, m.std / math.sqrt(30) * math.sqrt(10 / 9))


def test_passes_that_agree_have_no_standard_error() -> None:
    samples = np.full((100, 1, 1), 3, np.float32)
    assert statistics.moments(samples, replicate=10).standard_error == 0


def test_replicates_that_agree_to_the_last_digit_leave_the_rounding_of_their_passes() -> None:
    samples = np.tile(np.array([2, 4], np.float32), 50).reshape(100, 1, 1)
    m = statistics.moments(samples, replicate=10)
    np.testing.assert_allclose(m.standard_error, np.hypot(3, m.std) * 2**-23)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Samples, NDArray[np.float64]]:
    """Passes and the noise around them: as wide as they are apart, or so narrow that gaps are."""
    passes = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    apart = 10 ** rng.uniform(-4, 4)
    samples = (apart * rng.standard_t(2, (passes, 2, 3))).astype(np.float32)
    shape = (3,) if draw(st.booleans()) else (passes, 2, 3)
    return samples, 10 ** rng.uniform(-2, 2, shape)


@quick
@given(mixtures(), st.sampled_from([1e-3, 0.5, 0.9, 0.99, 0.9999]))
def test_the_predicted_interval_leaves_its_share_of_the_mixture_on_either_side(
    mixture: tuple[Samples, NDArray[np.float64]], level: float
) -> None:
    samples, noise_std = mixture
    m = statistics.moments(samples)
    total_std = statistics.spreads(m, noise_std).total_std
    interval = statistics.mixture_interval(samples, noise_std, total_std, level)
    below = stats.norm.cdf((interval.lower - samples) / noise_std)
    above = stats.norm.sf((interval.upper - samples) / noise_std)
    # A quantile is right within 1e-3 of a standard deviation of the noise, over which the share of
    # a component changes by z / 1000 at most, with z up to 4.1 here.
    for outside in (below, above):
        np.testing.assert_allclose(outside.mean(axis=0), (1 - level) / 2, rtol=5e-3)


@quick
@given(mixtures(), st.floats(1e-9, 1e-3), st.integers(-36, 36))
def test_the_predicted_interval_is_in_order_and_in_the_targets_unit(
    mixture: tuple[Samples, NDArray[np.float64]], level: float, magnitude: int
) -> None:
    samples, noise_std = mixture
    total_std = statistics.spreads(statistics.moments(samples), noise_std).total_std

    def interval(unit: float) -> statistics.Interval:
        # Beyond float32, too, as arithmetic on arrays is not.
        values: Any = samples.astype(np.float64) * unit
        return statistics.mixture_interval(values, noise_std * unit, total_std * unit, level)

    unit = 2.0 ** (3 * magnitude)
    found, scaled = interval(1.0), interval(unit)
    assert (found.lower <= found.upper).all()
    assert (scaled.lower <= scaled.upper).all()
    # A power of two changes no digit.
    np.testing.assert_allclose(scaled.lower, found.lower * unit, rtol=1e-9)
    np.testing.assert_allclose(scaled.upper, found.upper * unit, rtol=1e-9)


def test_the_predicted_interval_of_passes_that_agree_is_that_of_the_noise() -> None:
    samples = np.full((20, 1, 2), [[3, -1e6]], np.float32)
    noise_std = np.array([2.0, 5.0])
    total_std = statistics.spreads(statistics.moments(samples), noise_std).total_std
    for level in (0.5, 0.9, 0.999999):
        interval = statistics.mixture_interval(samples, noise_std, total_std, level)
        z = stats.norm.ppf((1 + level) / 2)
        np.testing.assert_allclose(interval.upper, [[3 + 2 * z, -1e6 + 5 * z]], rtol=2e-4)
        np.testing.assert_allclose(interval.lower, [[3 - 2 * z, -1e6 - 5 * z]], rtol=2e-4)


def test_a_level_next_to_1_has_an_interval() -> None:
    samples = np.zeros((5, 1, 1), np.float32)
    noise_std = np.array([1.0])
    interval = statistics.mixture_interval(samples, noise_std, np.ones((1, 1)), 1 - 2**-53)
    # The share of 2^-54 on either side.
    np.testing.assert_allclose(interval.upper, stats.norm.isf(2**-54), rtol=1e-3)
    np.testing.assert_allclose(interval.lower, -interval.upper)


@quick
@given(logits(), st.floats(0.01, 0.99))
def test_the_interval_holds_the_median_and_lies_within_the_samples(
    z: Samples, level: float
) -> None:
    m = statistics.passes_interval(z, level)
    median = np.median(z.astype(np.float64), axis=0)
    # Interpolation rounds.
    slack = 1e-12 * np.abs(z).max()
    assert (z.min(axis=0) - slack <= m.lower).all()
    assert (m.lower <= median + slack).all()
    assert (median <= m.upper + slack).all()
    assert (m.upper <= z.max(axis=0) + slack).all()


def test_entropies_equal_scipys() -> None:
    samples = probabilities()
    e = statistics.entropies(samples)
    mean = samples.astype(float).mean(axis=0)
    # scipy divides by the sum, which is 1 within the rounding of float32.
    np.testing.assert_allclose(e.predictive_entropy, stats.entropy(mean, axis=1), rtol=1e-6)
    expected = stats.entropy(samples.astype(float), axis=2).mean(axis=0)
    np.testing.assert_allclose(e.expected_entropy, expected, rtol=1e-6)
    # Mutual information is also the mean divergence of the passes from their mean.
    divergence = stats.entropy(samples.astype(float), mean[None], axis=2).mean(axis=0)
    np.testing.assert_allclose(e.mutual_information, divergence, rtol=1e-4)


@quick
@given(logits())
def test_entropies_keep_their_bounds(z: Samples) -> None:
    passes, _, classes = z.shape
    e = statistics.entropies(softmax(z))
    assert (e.mutual_information >= 0).all()
    assert (e.expected_entropy >= 0).all()
    assert (e.predictive_entropy <= math.log(classes) + 1e-6).all()
    assert (e.mutual_information <= math.log(min(passes, classes)) + 1e-6).all()
    np.testing.assert_allclose(
        e.predictive_entropy, e.expected_entropy + e.mutual_information, atol=1e-12
    )
    assert ((e.variation_ratio >= 0) & (e.variation_ratio <= 1 - 1 / classes + 1e-12)).all()


def test_passes_that_agree_have_no_mutual_information() -> None:
    same = np.repeat(probabilities(passes=1), 30, axis=0)
    e = statistics.entropies(same)
    assert (e.mutual_information < 1e-12).all()
    assert (e.variation_ratio == 0).all()


def test_passes_that_are_sure_of_different_classes_have_nothing_but_mutual_information() -> None:
    sure = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]][:, None, :]
    e = statistics.entropies(sure)
    half_and_two_quarters = 0.5 * math.log(2) + 0.5 * math.log(4)
    np.testing.assert_allclose(e.predictive_entropy, half_and_two_quarters)
    assert e.expected_entropy == 0
    np.testing.assert_allclose(e.mutual_information, half_and_two_quarters)
    assert e.variation_ratio == 0.5


def test_spreads_of_model_and_data_add_in_squares() -> None:
    samples = np.random.default_rng(0).normal(size=(50, 2, 2)).astype(np.float32)
    m = statistics.moments(samples)
    s = statistics.spreads(m, np.array([3.0, 4.0]))
    assert np.array_equal(s.epistemic_std, samples.std(axis=0, ddof=1, dtype=np.float64))
    assert s.aleatoric_std.tolist() == [[3.0, 4.0]] * 2
    np.testing.assert_allclose(s.total_std**2, s.epistemic_std**2 + [[9.0, 16.0]] * 2)


def test_the_noise_of_passes_that_differ_in_it_is_the_root_of_its_mean_square() -> None:
    samples = np.zeros((2, 1, 1), np.float32)
    s = statistics.spreads(statistics.moments(samples), np.array([3.0, 5.0]).reshape(2, 1, 1))
    np.testing.assert_allclose(s.aleatoric_std, math.sqrt(17))
    np.testing.assert_allclose(s.total_std, math.sqrt(17))


def test_the_expectation_gap_is_in_standard_errors() -> None:
    samples = np.array([1, 2, 3, 6], np.float32).reshape(4, 1, 1)
    m = statistics.moments(samples)
    gap = expectation_gap(m.mean, m.standard_error, np.array([[2.0]], np.float32))
    np.testing.assert_allclose(gap, 1 / (math.sqrt(14 / 3) / 2))


def test_the_expectation_gap_of_equal_passes_is_what_rounding_leaves() -> None:
    samples = np.full((10, 1, 1), 100.0, np.float32)
    m = statistics.moments(samples)
    gap = expectation_gap(m.mean, m.standard_error, np.array([[100.00001]], np.float32))
    assert np.abs(gap).max() < 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_joined_summaries_are_the_summary_of_all_rows(size: int) -> None:
    samples = probabilities()
    groups = [samples[:, start : start + size] for start in range(0, 3, size)]
    joined = statistics.join([statistics.entropies(group) for group in groups])
    whole = statistics.entropies(samples)
    for name, values in vars(whole).items():
        np.testing.assert_allclose(getattr(joined, name), values, atol=1e-12)
