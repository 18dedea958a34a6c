"""Confidence intervals of metrics, by the bootstrap over rows.

A statistic is a function. It takes weights ``[R, B]``, the number of times that each of B rows was
drawn in each of R resamples, and returns its value in each resample, ``[R]``. With weights of 1 it
returns the metric itself. So a thousand resamples of a mean are one matrix product.

References
----------
Efron (1979), Bootstrap Methods: Another Look at the Jackknife.
Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 13 (percentile intervals).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
Key = TypeVar("Key")

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
# Bounds the memory of the weights.
WEIGHTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Estimate:
    """A metric and the interval that holds a share ``LEVEL`` of its resamples."""

    value: float
    lower: float
    upper: float


def mean_of(scores: Floats) -> Statistic:
    """Return the mean of ``scores [B]`` as a statistic."""
    return lambda weights: weights @ scores / weights.sum(axis=1)


def point_estimate(statistic: Statistic, rows: int) -> float:
    """Return a statistic of ``rows`` rows, each counted once."""
    return float(statistic(np.ones((1, rows))).item())


def estimate(statistics: Mapping[Key, Statistic], rows: int) -> dict[Key, Estimate]:
    """Return each statistic with its percentile interval.

    All statistics share the same resamples, which depend on the number of rows alone. A difference
    of two statistics, passed as a statistic of its own, is therefore a paired comparison. The ECE
    is biased upwards by resampling, as it is by few rows, so its interval may lie above it.
    """
    resampled: dict[Key, list[Floats]] = {key: [] for key in statistics}
    for weights in resamples(rows):
        for key, statistic in statistics.items():
            resampled[key].append(statistic(weights))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    found = {}
    for key, statistic in statistics.items():
        lower, upper = np.quantile(np.concatenate(resampled[key]), tails).tolist()
        found[key] = Estimate(point_estimate(statistic, rows), lower, upper)
    return found


def resamples(rows: int) -> Iterator[Floats]:
    """Draw ``RESAMPLES`` times ``rows`` rows with replacement; yield weights ``[R, rows]``."""
    rng = np.random.default_rng(SEED)
    most = max(1, WEIGHTS_AT_ONCE // rows)
    for start in range(0, RESAMPLES, most):
        count = min(most, RESAMPLES - start)
        drawn = rng.integers(rows, size=(count, rows)) + np.arange(count)[:, None] * rows
        weights = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        yield weights.astype(np.float64)
