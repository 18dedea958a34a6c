"""From samples to a summary: the statistics of a model's passes, by its task.

Samples ``[T, B, C]`` are class probabilities or values. Where a regression model has a noise head,
``log noise_std`` follows the values on the last axis: ``[T, B, 2C]``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.uncertainty import statistics
from dropserve.app.uncertainty.statistics import (
    Entropies,
    Floats,
    Interval,
    Moments,
    Samples,
    Spreads,
    Statistic,
)
from dropserve.export.bundle import Manifest


class Summary(NamedTuple):
    """Statistics over the passes of some rows."""

    moments: Moments
    interval: Interval
    parts: Entropies | Spreads  # for classes, for values


def summarize(manifest: Manifest, samples: Samples, level: float, replicate: int) -> Summary:
    """Summarize the samples of some rows.

    Parameters
    ----------
    manifest
        The model's manifest.
    samples
        ``[T, B, C]``, or ``[T, B, 2C]`` with a noise head.
    level
        Share of the passes, or of the predictive distribution, inside the interval.
    replicate
        Number of consecutive passes whose masks were drawn together; 1 if each stands alone.

    Raises
    ------
    InputError
        If a statistic is beyond float32.
    """
    if manifest.task == "classification":
        return Summary(
            statistics.join([statistics.moments(samples, replicate)]),
            statistics.join([statistics.passes_interval(samples, level)]),
            statistics.join([statistics.entropies(samples)]),
        )
    outputs = values(manifest, samples)
    moments = statistics.moments(outputs, replicate)
    noise = noise_std(manifest, samples)
    spreads = statistics.spreads(moments, noise)
    interval = statistics.mixture_interval(outputs, noise, spreads.total_std, level)
    to_float32(manifest, spreads.total_std, interval.lower, interval.upper)
    return Summary(
        statistics.join([moments]), statistics.join([interval]), statistics.join([spreads])
    )


def take_rows(summary: Summary, rows: slice) -> Summary:
    """Return the summary of the given rows."""
    return Summary(
        statistics.take(summary.moments, rows),
        statistics.take(summary.interval, rows),
        statistics.take(summary.parts, rows),
    )


def join_rows(summaries: Sequence[Summary]) -> Summary:
    """Concatenate the summaries of consecutive groups of rows."""
    return Summary(
        statistics.join([summary.moments for summary in summaries]),
        statistics.join([summary.interval for summary in summaries]),
        statistics.join([summary.parts for summary in summaries]),
    )


def largest_standard_error(manifest: Manifest, samples: Samples, replicate: int) -> float:
    """Return the largest standard error among the means of all outputs and rows."""
    moments = statistics.moments(values(manifest, samples), replicate)
    return float(moments.standard_error.max())


def values(manifest: Manifest, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Drop the noise head from outputs ``[..., C or 2C]``."""
    return outputs[..., : len(manifest.outputs.labels)]


def noise_std(manifest: Manifest, samples: Samples) -> Floats:
    """Return the standard deviation of the observation noise: ``[C]``, or ``[T, B, C]``."""
    if manifest.noise_std is not None:
        return np.array(manifest.noise_std)
    return np.exp(samples[..., len(manifest.outputs.labels) :], dtype=np.float64)


def is_finite(numbers: NDArray[np.floating]) -> bool:
    """Tell whether all numbers are finite."""
    return bool(np.logical_and.reduce(np.isfinite(numbers), axis=None))


def to_float32(manifest: Manifest, *arrays: Statistic) -> list[NDArray[np.float32]]:
    """Return arrays as float32; raise InputError if a number does not fit."""
    if not all(np.abs(array).max() <= np.finfo(np.float32).max for array in arrays):
        raise overflow(manifest)
    return [array.astype(np.float32, copy=False) for array in arrays]


def overflow(manifest: Manifest) -> InputError:
    """Return the error of a request whose answer would hold infinity or NaN."""
    return InputError("inputs", f"values so large that the result is beyond {manifest.precision}")
