"""Statistics of Monte Carlo passes: arithmetic on arrays, nothing else.

``samples [T, B, C]`` are the outputs of T passes: class probabilities, or values. Any memory order
will do; the fast one is that of ``by_pass``.

References
----------
Gal and Ghahramani (2016), Dropout as a Bayesian Approximation.
Gal (2016), Uncertainty in Deep Learning, section 3.3.
Houlsby et al. (2011), Bayesian Active Learning for Classification and Preference Learning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Floats = NDArray[np.float64]
# Computed as float64; float32 once ``join`` has put it together.
Statistic = NDArray[np.float32] | NDArray[np.float64]

# A standard error below what another order of additions changes says nothing.
ROUNDING = 1e-5
# Keeps 0 from being divided by, and from the logarithm. No float32 but 0 and subnormals is less.
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Moments:
    """What the passes say of each output, ``[B, C]`` each."""

    mean: Statistic
    std: Statistic
    standard_error: Statistic
    lower: Statistic
    upper: Statistic


@dataclass(frozen=True)
class Spreads:
    """What the passes say of a value, ``[B, C]`` each, in the target's units."""

    epistemic_std: Statistic
    aleatoric_std: Statistic
    total_std: Statistic


@dataclass(frozen=True)
class Entropies:
    """What the passes say of the class, ``[B]`` each; entropies in nats."""

    predictive_entropy: Statistic
    expected_entropy: Statistic
    mutual_information: Statistic
    variation_ratio: Statistic


Summary = TypeVar("Summary", Moments, Spreads, Entropies)


def by_pass(outputs: NDArray[np.float32], passes: int) -> Samples:
    """View outputs ``[N, C]``, the passes of a row together, as samples ``[T, B, C]``.

    The passes of an output lie side by side in memory, since statistics run along them.
    """
    grouped = outputs.reshape(-1, passes, outputs.shape[-1])  # [B, T, C]
    return np.ascontiguousarray(grouped.transpose(0, 2, 1)).transpose(2, 0, 1)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn logits ``[..., C]`` into probabilities."""
    # The ufuncs themselves: an array's methods take longer than the work, for a single row.
    # Logits further apart than float32 reaches are as good as infinitely far: their exp is 0.
    with np.errstate(over="ignore"):
        probabilities: NDArray[np.float32] = logits - np.maximum.reduce(logits, -1, keepdims=True)
    np.exp(probabilities, out=probabilities)
    probabilities /= np.add.reduce(probabilities, -1, keepdims=True)
    return probabilities


def moments(samples: Samples, level: float) -> Moments:
    """Summarise ``samples [T, B, C]``.

    ``std`` is the sample standard deviation s (divisor T - 1; of a single pass it is 0), and
    ``standard_error`` is that of the mean, s / sqrt(T); of a single pass it is not known: NaN.
    ``lower`` and ``upper`` are the quantiles (1 - level) / 2 and (1 + level) / 2 of the passes.
    """
    passes = len(samples)
    values = samples.astype(np.float64)
    mean = np.add.reduce(values) / passes
    if passes == 1:
        std, standard_error = np.zeros_like(mean), np.full_like(mean, np.nan)
    else:
        values -= mean
        values *= values
        std = np.sqrt(np.add.reduce(values) / (passes - 1))
        standard_error = std / math.sqrt(passes)
    # Cheaper than numpy's quantile, which partitions, and as float64.
    ordered = np.sort(samples, axis=0)
    lower, upper = quantile(ordered, (1 - level) / 2), quantile(ordered, (1 + level) / 2)
    return Moments(mean, std, standard_error, lower, upper)


def quantile(ordered: Samples, share: float) -> Floats:
    """Interpolate a quantile ``[B, C]`` of ``ordered [T, B, C]``.

    Hyndman and Fan (1996), Sample Quantiles in Statistical Packages, definition 7.
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    # As float64, so that the sum is one, too.
    part = np.float64(place - below)
    between: Floats = ordered[below] * (1 - part)
    if part > 0:
        between += ordered[below + 1] * part
    return between


def entropies(samples: Samples) -> Entropies:
    """Summarise class probabilities ``[T, B, C]``.

    - ``predictive_entropy``: H[mean over passes], all the uncertainty (Gal 2016, eq. 3.20).
    - ``expected_entropy``: mean over passes of H, the data's part (aleatoric).
    - ``mutual_information``: their difference, the model's part (epistemic); Houlsby et al. 2011,
      eq. 2. Never negative, since entropy is concave.
    - ``variation_ratio``: share of the passes whose class is not the commonest one (Gal 2016,
      eq. 3.19).
    """
    passes, rows, classes = samples.shape
    values = samples.astype(np.float64)
    predictive = entropy(np.add.reduce(values) / passes)
    # Rounding can put a mean of equal entropies a hair above the entropy of their mean.
    expected = np.minimum(np.add.reduce(entropy(values)) / passes, predictive)
    winners = samples.argmax(axis=2) + np.arange(rows) * classes  # [T, B], a number for each
    votes = np.bincount(winners.ravel(), minlength=rows * classes).reshape(rows, classes)
    return Entropies(
        predictive_entropy=predictive,
        expected_entropy=expected,
        mutual_information=predictive - expected,
        variation_ratio=1.0 - votes.max(axis=1) / passes,
    )


def spreads(m: Moments, noise_std: Sequence[float]) -> Spreads:
    """Split the spread of a value into the model's part and the data's.

    The predictive variance is that of the passes (epistemic) plus that of the observation noise,
    ``noise_std [C]`` = tau^(-1/2) (aleatoric): Gal and Ghahramani 2016, eq. 7.
    """
    aleatoric = np.tile(np.array(noise_std, dtype=m.std.dtype), (len(m.std), 1))
    return Spreads(m.std, aleatoric, np.hypot(m.std, aleatoric))


def entropy(probabilities: Floats) -> Floats:
    """Return ``-sum p log p`` over the last axis, in nats; 0 log 0 is 0."""
    terms = np.log(np.maximum(probabilities, TINY))
    terms *= probabilities
    # Taken from 0, 0 stays 0 and does not become -0.
    return 0.0 - np.asarray(np.add.reduce(terms, -1))


def expectation_gap(m: Moments, deterministic: Samples) -> Floats:
    """Return ``(mean of the passes - eval mode) / standard error of the mean``, ``[B, C]``.

    About 1 in size where the passes scatter around eval mode; of a single pass not known: NaN.
    The standard error is taken as at least 1e-5 of the output, where rounding begins.
    """
    floor = np.maximum(ROUNDING * np.abs(deterministic), TINY)
    gap: Floats = (m.mean - deterministic) / np.maximum(m.standard_error, floor)
    return gap


def take(summary: Summary, rows: slice) -> Summary:
    """Take the summary of some rows out of that of more."""
    return type(summary)(*[column[rows] for column in vars(summary).values()])


def join(parts: Sequence[Summary]) -> Summary:
    """Put the summaries of groups of rows together, in order, as precise as the samples were."""
    if len(parts) == 1:
        columns = [column.astype(np.float32, copy=False) for column in vars(parts[0]).values()]
    else:
        columns = [
            np.concatenate([getattr(part, field.name) for part in parts], dtype=np.float32)
            for field in fields(parts[0])
        ]
    return type(parts[0])(*columns)
