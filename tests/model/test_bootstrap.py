"""The bootstrap: valid resamples, and intervals of the right width."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from dropserve.model import bootstrap
from dropserve.model.bootstrap import Estimate, estimate, mean_of, resamples
from dropserve.model.evaluation import (
    classification_metrics,
    classification_statistics,
    regression_metrics,
    regression_statistics,
)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    rows = 400
    scores = np.random.default_rng(1).normal(5.0, 2.0, rows)
    found = estimate({"mean": mean_of(scores)}, rows)["mean"]
    assert found.value == pytest.approx(scores.mean())
    error = scores.std() / math.sqrt(rows)
    # A quantile of 1,000 draws is known within a few percent of the standard deviation.
    assert found.lower == pytest.approx(scores.mean() - 1.96 * error, abs=0.3 * error)
    assert found.upper == pytest.approx(scores.mean() + 1.96 * error, abs=0.3 * error)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = estimate({0: mean_of(rng.exponential(1.0, 100))}, 100)[0]
        held += found.lower <= 1.0 <= found.upper
    # Slightly below 95 % for the mean of 100 skewed rows; minus 4 standard errors of 200 tries.
    assert 0.93 - 4 * math.sqrt(0.95 * 0.05 / 200) < held / 200


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_a_resample_draws_as_many_rows_as_there_are(rows: int) -> None:
    blocks = list(resamples(rows))
    assert sum(len(block) for block in blocks) == bootstrap.RESAMPLES
    for block in blocks:
        assert block.shape[1] == rows
        assert (block.sum(axis=1) == rows).all()
        assert block.size <= bootstrap.WEIGHTS_AT_ONCE


def test_statistics_of_the_same_rows_share_the_same_resamples() -> None:
    scores = np.random.default_rng(0).normal(size=50)
    found = estimate({"low": mean_of(scores), "high": mean_of(scores + 3)}, 50)
    assert found["high"].lower == pytest.approx(found["low"].lower + 3)
    difference = estimate({"": mean_of((scores + 3) - scores)}, 50)[""]
    assert difference.lower == pytest.approx(3)
    assert difference.upper == pytest.approx(3)


def test_a_metric_of_a_resample_is_the_metric_of_its_rows() -> None:
    rng = np.random.default_rng(0)
    rows = 60
    p, y = softmax(rng.normal(size=(rows, 3)) * 2, axis=1), rng.integers(3, size=rows)
    samples, values = rng.normal(size=(5, rows, 2)), rng.normal(size=(rows, 2))
    noise = np.array([0.5, 2.0])
    weights = next(resamples(rows))[:3]
    for row in weights:
        drawn: NDArray[np.int64] = np.repeat(np.arange(rows), row.astype(int))
        classes = classification_metrics(p[drawn], y[drawn])
        for name, statistic in classification_statistics(p, y).items():
            assert statistic(row[None]).item() == pytest.approx(classes[name])
        regression = regression_metrics(samples[:, drawn], values[drawn], noise)
        for name, statistic in regression_statistics(samples, values, noise).items():
            assert statistic(row[None]).item() == pytest.approx(regression[name])


def test_the_intervals_of_a_number_of_rows_are_always_the_same() -> None:
    scores = np.arange(20.0)
    first: Estimate = estimate({"": mean_of(scores)}, 20)[""]
    assert estimate({"": mean_of(scores)}, 20)[""] == first
