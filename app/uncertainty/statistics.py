"""Statistics of Monte Carlo passes: arithmetic on arrays.

``samples [T, B, C]`` are the outputs of T passes: class probabilities or values. Any memory order
works; that of ``by_pass`` is fast.

References
----------
Gal and Ghahramani (2016), Dropout as a Bayesian Approximation.
Gal (2016), Uncertainty in Deep Learning, section 3.3.
Kendall and Gal (2017), What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?
McKay, Beckman and Conover (1979), A Comparison of Three Methods for Selecting Values of Input
Variables in the Analysis of Output from a Computer Code.
Owen (1992), A Central Limit Theorem for Latin Hypercube Sampling.
Houlsby et al. (2011), Bayesian Active Learning for Classification and Preference Learning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dropserve.expectation import TINY

Samples = NDArray[np.float32]
Floats = NDArray[np.float64]
# Computed as float64; float32 after ``join``.
Statistic = NDArray[np.float32] | NDArray[np.float64]

EPSILON = float(np.finfo(np.float32).eps)
# The search for the quantile of a mixture ends with a step below this many standard deviations of
# the noise; the next Newton step would be about its square. Bisection takes fewer than 60 steps
# even if passes are 2^50 standard deviations apart.
CLOSE, MOST_STEPS = 1e-3, 60
# Table of the normal distribution function: steps for each standard deviation, and its end.
NORMAL_STEPS, NORMAL_END = 512, 38


@dataclass(frozen=True)
class Moments:
    """Moments of the passes for each output, ``[B, C]`` each."""

    mean: Statistic
    std: Statistic
    standard_error: Statistic


@dataclass(frozen=True)
class Interval:
    """Bounds of an interval for each output, ``[B, C]`` each."""

    lower: Statistic
    upper: Statistic


@dataclass(frozen=True)
class Spreads:
    """Epistemic and aleatoric spread of a value, ``[B, C]`` each, in the target's units."""

    epistemic_std: Statistic
    aleatoric_std: Statistic
    total_std: Statistic


@dataclass(frozen=True)
class Entropies:
    """Uncertainty about the class, ``[B]`` each; entropies in nats."""

    predictive_entropy: Statistic
    expected_entropy: Statistic
    mutual_information: Statistic
    variation_ratio: Statistic


Group = TypeVar("Group", bound=Moments | Interval | Spreads | Entropies)


def by_pass(outputs: NDArray[np.float32], passes: int) -> Samples:
    """Return outputs ``[N, C]``, with the passes of a row together, as samples ``[T, B, C]``."""
    return side_by_side(outputs.reshape(-1, passes, outputs.shape[-1]).swapaxes(0, 1))


def side_by_side(samples: Samples) -> Samples:
    """Make the passes of an output contiguous in memory, since statistics run along them."""
    return np.ascontiguousarray(samples.transpose(1, 2, 0)).transpose(2, 0, 1)


def moments(samples: Samples, replicate: int = 1) -> Moments:
    """Return the moments of ``samples [T, B, C]``, drawn ``replicate`` passes at a time.

    ``std`` is the sample standard deviation s (divisor T - 1; 0 for a single pass).
    ``standard_error`` is that of the mean: s / sqrt(T) for independent passes, else see
    ``replicated_error``; NaN for a single pass.
    """
    passes = len(samples)
    values = samples.astype(np.float64)
    mean = np.add.reduce(values) / passes
    if passes == 1:
        return Moments(mean, np.zeros_like(mean), np.full_like(mean, np.nan))
    values -= mean
    sums = replicate_sums(values, replicate) if replicate > 1 else None
    values *= values
    std = np.sqrt(np.add.reduce(values) / (passes - 1))
    if sums is None:
        return Moments(mean, std, std / math.sqrt(passes))
    return Moments(mean, std, replicated_error(sums, mean, std, passes, replicate))


def replicate_sums(deviations: Floats, replicate: int) -> Floats:
    """Sum the deviations ``[T, B, C]`` within each replicate: ``[R, B, C]``."""
    return np.add.reduceat(deviations, np.arange(0, len(deviations), replicate))


def replicated_error(
    sums: Floats, mean: Floats, std: Floats, passes: int, replicate: int
) -> Floats:
    """Estimate the standard error of the mean of passes drawn ``replicate`` at a time.

    The passes of a replicate depend on each other, so s / sqrt(T) is not the standard error; but
    the R replicates are independent (McKay, Beckman and Conover 1979; Owen 1992). With d_r, the
    deviation of the mean of replicate r, of n_r passes, from the mean of all, the standard error is

        sqrt(sum_r n_r d_r^2 / (R - 3) / T)

    With the divisor R - 1 the sum would be unbiased. But with few replicates the error of the mean,
    in units of that estimate, follows Student's t with R - 1 degrees of freedom, whose variance is
    (R - 1) / (R - 3). With R - 3 the error in such units has variance 1, as with a true standard
    error.

    Three replicates are too few. Stratified masks raise the variance of a replicate's mean by at
    most n / (n - 1), so the bound for independent masks, raised by as much, takes its place.

    Parameters
    ----------
    sums
        Sums of the deviations from the mean within each replicate, n_r d_r: ``[R, B, C]``.
    mean, std
        Moments of the passes, ``[B, C]``.
    passes
        T.
    replicate
        Passes of a replicate; the last may be shorter.
    """
    replicates = len(sums)
    last = passes - (replicates - 1) * replicate
    lengths = [*[replicate] * (replicates - 1), last]
    # A replicate of one pass is an ordinary pass.
    raised = sum(n * n / max(1, n - 1) for n in lengths) / passes
    bound: Floats = std * math.sqrt(raised / passes)
    if replicates <= 3:
        return bound
    squares = sums * sums / replicate
    squares[-1] *= replicate / last
    error = np.sqrt(np.add.reduce(squares) / ((replicates - 3) * passes))
    # If an output is linear in the masks, only the rounding of its passes is left.
    rounding = EPSILON * np.hypot(mean, std)
    floored: Floats = np.maximum(error, np.minimum(rounding, bound))
    return floored


def passes_interval(samples: Samples, level: float) -> Interval:
    """Return the quantiles (1 - level) / 2 and (1 + level) / 2 of the passes ``[T, B, C]``."""
    # Cheaper than numpy's quantile, which partitions in float64.
    ordered = np.sort(samples, axis=0)
    return Interval(quantile(ordered, (1 - level) / 2), quantile(ordered, (1 + level) / 2))


def quantile(ordered: Samples, share: float) -> Floats:
    """Interpolate a quantile ``[B, C]`` of ``ordered [T, B, C]``.

    Hyndman and Fan (1996), Sample Quantiles in Statistical Packages, definition 7.
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    # float64, so that the sum is, too.
    part = np.float64(place - below)
    between: Floats = ordered[below] * (1 - part)
    if part > 0:
        between += ordered[below + 1] * part
    return between


def mixture_interval(
    samples: Samples, noise_std: Floats, total_std: Statistic, level: float
) -> Interval:
    """Return the quantiles (1 - level) / 2 and (1 + level) / 2 of the predictive distribution.

    It is the mixture ``1/T sum_t N(f_t, noise_std^2)`` (Gal and Ghahramani 2016, appendix, eq. 8).
    Its quantile q solves ``1/T sum_t Phi((q - f_t) / noise_std) = share``. It lies between the
    least and the greatest quantile of the components, and is found by Newton's method, safeguarded
    by bisection (Press et al. 1992, Numerical Recipes, section 9.4).

    Parameters
    ----------
    samples
        ``[T, B, C]``.
    noise_std
        ``[C]`` or ``[T, B, C]``.
    total_std
        Standard deviation of the mixture, ``[B, C]``.
    level
        Level of the interval.
    """
    passes = len(samples)
    share = (1 - level) / 2
    # The upper quantile is the lower one of the negated values: small shares keep their digits.
    values = np.stack([samples, -samples]).astype(np.float64)  # [2, T, B, C]
    tail = NormalDist().inv_cdf(share)
    ends = values + noise_std * tail
    low, high = np.minimum.reduce(ends, 1), np.maximum.reduce(ends, 1)  # [2, B, C]
    # Start as if the mixture were normal, which it nearly is in most cases.
    place = np.add.reduce(values, 1) / passes + tail * total_std
    close = CLOSE * (noise_std if noise_std.ndim == 1 else np.minimum.reduce(noise_std))
    step = high - low
    for _ in range(MOST_STEPS):
        z = (place[:, None] - values) / noise_std
        density = np.exp(z * z * -0.5) / math.sqrt(2 * math.pi)
        excess = np.add.reduce(normal_share(z, density), 1) / passes - share
        density /= noise_std
        slope = np.add.reduce(density, 1) / passes
        low, high = np.where(excess < 0, place, low), np.where(excess < 0, high, place)
        # A Newton step must halve the previous one and stay within the bounds.
        steep = 2 * np.abs(excess) < step * slope
        found = place - np.divide(excess, slope, out=np.zeros_like(slope), where=steep)
        good = steep & (found >= low) & (found <= high)
        found = np.where(good, found, (low + high) / 2)
        step = np.abs(found - place)
        place = found
        if np.logical_and.reduce(step <= close, None):
            break
    # At tiny levels the bounds may cross; order them.
    return Interval(np.minimum(place[0], -place[1]), np.maximum(place[0], -place[1]))


def normal_share(z: Floats, density: Floats) -> Floats:
    """Return the standard normal distribution function at ``z``, given its density there.

    Along the tangent from the nearest entry of a table. Relative error: 2e-6 down to z = -2, and
    z^2 times 5e-7 below.
    """
    steps = np.rint(np.clip(z, -NORMAL_END, NORMAL_END) * NORMAL_STEPS)
    found = normal_table().take(steps.astype(np.int64) + NORMAL_END * NORMAL_STEPS)
    found += density * (z - steps / NORMAL_STEPS)
    return found


@lru_cache
def normal_table() -> Floats:
    """Return the table of the standard normal distribution function."""
    most = NORMAL_END * NORMAL_STEPS
    scale = -math.sqrt(0.5) / NORMAL_STEPS
    return np.array([0.5 * math.erfc(scale * place) for place in range(-most, most + 1)])


def entropies(samples: Samples) -> Entropies:
    """Return the entropies of class probabilities ``[T, B, C]``.

    - ``predictive_entropy``: H[mean over passes], the total uncertainty (Gal 2016, eq. 3.20).
    - ``expected_entropy``: mean over passes of H, the aleatoric part (the data's).
    - ``mutual_information``: their difference, the epistemic part (the model's); Houlsby et al.
      2011, eq. 2. Never negative, since entropy is concave.
    - ``variation_ratio``: share of the passes whose class is not the most common one (Gal 2016,
      eq. 3.19).
    """
    passes, rows, classes = samples.shape
    values = samples.astype(np.float64)
    predictive = entropy(np.add.reduce(values) / passes)
    # By rounding, the mean of equal entropies can exceed the entropy of their mean.
    expected = np.minimum(np.add.reduce(entropy(values)) / passes, predictive)
    winners = samples.argmax(axis=2) + np.arange(rows) * classes  # [T, B], unique over rows
    votes = np.bincount(winners.ravel(), minlength=rows * classes).reshape(rows, classes)
    return Entropies(
        predictive_entropy=predictive,
        expected_entropy=expected,
        mutual_information=predictive - expected,
        variation_ratio=1.0 - votes.max(axis=1) / passes,
    )


def spreads(m: Moments, noise_std: Floats) -> Spreads:
    """Split the spread of a value into its epistemic and its aleatoric part.

    The predictive variance is the variance of the passes (epistemic) plus that of the observation
    noise, tau^-1 (aleatoric): Gal and Ghahramani 2016, eq. 7. If the noise differs between passes,
    its mean is taken: Kendall and Gal 2017, eq. 9.

    Parameters
    ----------
    m
        Moments of the passes.
    noise_std
        ``[C]`` or ``[T, B, C]``.
    """
    if noise_std.ndim == 1:
        aleatoric = np.tile(noise_std.astype(m.std.dtype), (len(m.std), 1))
    else:
        aleatoric = np.sqrt(np.add.reduce(noise_std * noise_std) / len(noise_std))
    return Spreads(m.std, aleatoric, np.hypot(m.std, aleatoric))


def entropy(probabilities: Floats) -> Floats:
    """Return ``-sum p log p`` over the last axis, in nats; 0 log 0 is 0."""
    terms = np.log(np.maximum(probabilities, TINY))
    terms *= probabilities
    # Subtracting from 0 avoids -0.
    return 0.0 - np.asarray(np.add.reduce(terms, -1))


def take(group: Group, rows: slice) -> Group:
    """Return the statistics of the given rows."""
    return type(group)(*[column[rows] for column in vars(group).values()])


def join(parts: Sequence[Group]) -> Group:
    """Concatenate the statistics of consecutive rows, as float32 like the samples."""
    if len(parts) == 1:
        columns = [np.ascontiguousarray(c, np.float32) for c in vars(parts[0]).values()]
    else:
        columns = [
            np.concatenate([getattr(part, field.name) for part in parts], dtype=np.float32)
            for field in fields(parts[0])
        ]
    return type(parts[0])(*columns)
