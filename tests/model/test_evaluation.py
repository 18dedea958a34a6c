"""Metrics, compared with results by hand, scikit-learn and scipy; the fitted noise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss

from dropserve.model.evaluation import (
    class_probabilities,
    classification_metrics,
    fit_noise,
    log_likelihood,
    regression_metrics,
    reliability,
)

reproducible = settings(derandomize=True, deadline=None, max_examples=50)
seeds = st.integers(0, 2**32)
Floats = NDArray[np.float64]


def answers(seed: int, rows: int, classes: int) -> tuple[Floats, NDArray[np.int64]]:
    """Draw probabilities, from uniform to confident, and true classes.

    No probability is below 1e-15, where scikit-learn clips.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * rng.uniform(0, 4, size=(rows, 1))
    return softmax(logits, axis=1), rng.integers(classes, size=rows)


def test_two_rows_have_the_metrics_computed_by_hand() -> None:
    probabilities = np.array([[0.81, 0.19], [0.61, 0.39]])
    metrics = classification_metrics(probabilities, np.array([0, 1]))
    assert metrics == pytest.approx(
        {
            "accuracy": 0.5,
            "nll": -(math.log(0.81) + math.log(0.39)) / 2,
            "brier": (2 * 0.19**2 + 2 * 0.61**2) / 2,
            "ece": ((1 - 0.81) + (0.61 - 0)) / 2,
        }
    )


@reproducible
@given(seed=seeds, rows=st.integers(1, 200), classes=st.integers(2, 10))
def test_the_metrics_are_those_of_scikit_learn_and_of_plain_loops(
    seed: int, rows: int, classes: int
) -> None:
    p, y = answers(seed, rows, classes)
    metrics = classification_metrics(p, y)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(axis=1)))
    assert metrics["nll"] == pytest.approx(log_loss(y, p, labels=range(classes)))
    brier = sum((p[b, c] - (c == y[b])) ** 2 for b in range(rows) for c in range(classes)) / rows
    assert metrics["brier"] == pytest.approx(brier)
    assert metrics["ece"] == pytest.approx(ece_by_loops(p, y))


def ece_by_loops(p: Floats, y: NDArray[np.int64]) -> float:
    """Guo et al. (2017), eq. 3: 15 bins of equal width, open below and closed above."""
    total = 0.0
    for low in range(15):
        inside = [b for b in range(len(y)) if low / 15 < max(p[b]) <= (low + 1) / 15]
        right = sum(int(np.argmax(p[b]) == y[b]) for b in inside)
        total += abs(right - sum(max(p[b]) for b in inside)) / len(y)
    return total


@reproducible
@given(seed=seeds, rows=st.integers(1, 200), classes=st.integers(2, 10))
def test_every_row_falls_into_one_bin_of_confidence(seed: int, rows: int, classes: int) -> None:
    p, y = answers(seed, rows, classes)
    confidence, accuracy, count = reliability(p, y)
    assert count.sum() == rows
    assert (count > 0).all()
    assert (confidence * count).sum() == pytest.approx(p.max(axis=1).sum())
    assert (accuracy * count).sum() == pytest.approx((p.argmax(axis=1) == y).sum())


@reproducible
@given(
    st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 3), min_size=1, max_size=10),
    st.integers(0, 2),
)
def test_saturated_probabilities_have_finite_metrics(
    logits: list[tuple[float, float, float]], true: int
) -> None:
    p = class_probabilities(np.array([*logits, (1e6, 0.0, -1e6)]))
    metrics = classification_metrics(p, np.full(len(p), true))
    assert np.isfinite(list(metrics.values())).all()


def test_confident_errors_cost_much_and_confident_successes_nothing() -> None:
    confident = class_probabilities(np.array([[1000.0, -1000.0]]))
    assert confident.tolist() == [[1.0, 0.0]]
    right = classification_metrics(confident, np.array([0]))
    assert right == {"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}
    wrong = classification_metrics(confident, np.array([1]))
    assert wrong["nll"] > 700  # -log of the smallest normal float64
    assert (wrong["accuracy"], wrong["brier"], wrong["ece"]) == (0.0, 2.0, 1.0)


def test_the_probabilities_of_passes_are_the_mean_of_theirs() -> None:
    logits = np.random.default_rng(0).normal(size=(7, 4, 3)) * 3
    np.testing.assert_allclose(class_probabilities(logits), softmax(logits, axis=-1).mean(axis=0))
    np.testing.assert_allclose(class_probabilities(logits[0]), softmax(logits[0], axis=-1))


@reproducible
@given(seed=seeds, passes=st.integers(1, 20), rows=st.integers(1, 10), outputs=st.integers(1, 3))
def test_the_log_likelihood_is_that_of_a_mixture_of_normals(
    seed: int, passes: int, rows: int, outputs: int
) -> None:
    rng = np.random.default_rng(seed)
    samples, y = rng.normal(size=(passes, rows, outputs)), rng.normal(size=(rows, outputs))
    noise = rng.uniform(0.5, 2.0, size=outputs)
    expected = np.log(norm.pdf(y, loc=samples, scale=noise).mean(axis=0))
    np.testing.assert_allclose(log_likelihood(samples, y, noise), expected, rtol=1e-9, atol=1e-9)


def test_a_target_far_from_every_pass_has_a_finite_log_likelihood() -> None:
    far = log_likelihood(np.zeros((5, 1, 1)), np.array([[1000.0]]), np.array([1.0]))
    assert far.item() == pytest.approx(norm.logpdf(1000.0))


def test_regression_metrics_are_those_computed_by_hand() -> None:
    samples = np.array([[[0.0], [4.0]], [[2.0], [4.0]]])  # [T=2, B=2, C=1], means 1 and 4
    y, noise = np.array([[2.0], [1.0]]), np.array([0.5])
    first = math.log((norm.pdf(2, 0, 0.5) + norm.pdf(2, 2, 0.5)) / 2)
    second = math.log(norm.pdf(1, 4, 0.5))
    assert regression_metrics(samples, y, noise) == pytest.approx(
        {
            "rmse": math.sqrt((1 + 9) / 2),
            "mae": (1 + 3) / 2,
            "log_likelihood": (first + second) / 2,
        }
    )


def test_the_noise_around_a_point_prediction_is_found_for_each_target() -> None:
    rows, true = 2000, np.array([0.3, 50.0])
    rng = np.random.default_rng(0)
    point = rng.normal(size=(1, rows, 2)) * 10
    found = fit_noise(point, point[0] + rng.normal(size=(rows, 2)) * true)
    # The standard error of a standard deviation from n rows is std / sqrt(2 n).
    assert (np.abs(found - true) < 4 * true / math.sqrt(2 * rows)).all()


def test_the_noise_explains_the_variance_that_the_passes_do_not() -> None:
    rows, noise, scatter = 4000, 0.5, 1.0
    rng = np.random.default_rng(0)
    # Quantiles instead of draws, so that the passes of every row form the same smooth mixture.
    passes = norm.ppf((np.arange(400) + 0.5) / 400) * scatter
    y = rng.normal(0.0, math.hypot(noise, scatter), size=(rows, 1))
    samples = np.broadcast_to(passes[:, None, None], (400, rows, 1))
    # The variance v of y has standard error v sqrt(2 / n); noise^2 = v - scatter^2, so the
    # noise has that error divided by 2 * noise. The quantiles cut tails worth 1 % of scatter^2.
    variance = noise**2 + scatter**2
    four_standard_errors = 4 * variance * math.sqrt(2 / rows) / (2 * noise)
    cut = abs(passes.var() - scatter**2) / (2 * noise)
    assert abs(fit_noise(samples, y).item() - noise) < four_standard_errors + cut


@reproducible
@given(seed=seeds)
def test_the_fitted_noise_has_the_largest_likelihood_nearby(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples, y = rng.normal(size=(10, 30, 1)), rng.normal(size=(30, 1)) * 3
    fitted = fit_noise(samples, y)
    best = log_likelihood(samples, y, fitted).mean()
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert log_likelihood(samples, y, fitted * factor).mean() < best
