"""Split-conformal prediction: sets and intervals that contain the truth as often as stated.

The bundle has the scores of n held-out rows that nothing was fitted to (``export/conformal.py``).
A new row that is exchangeable with them has a score of at most the k-th smallest with a probability
of at least k / (n + 1). So with k = ceil((n + 1) coverage), the set of answers with scores up to it
contains the truth with at least that probability: on average over rows, for any model. There is
no such guarantee for rows of another distribution than the held-out ones.

References
----------
Papadopoulos, Proedrou, Vovk and Gammerman (2002), Inductive Confidence Machines for Regression.
Lei, G'Sell, Rinaldo, Tibshirani and Wasserman (2018), Distribution-Free Predictive Inference for
Regression, section 5.2 (residuals relative to a spread).
Sadinle, Lei and Wasserman (2019), Least Ambiguous Set-Valued Classifiers with Bounded Error Levels.
"""

import math

import numpy as np
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.uncertainty.statistics import Spreads
from dropserve.app.uncertainty.summary import Summary, to_float32
from dropserve.export.bundle import Manifest


def check(manifest: Manifest, coverage: float) -> None:
    """Raise InputError if the bundle has too few scores for a coverage, or none."""
    if manifest.conformal_scores is None:
        raise InputError("coverage", "this version's bundle holds no scores; export it anew")
    n = len(manifest.conformal_scores[0])
    if rank(n, coverage) > n:
        most = math.floor(1e6 * n / (n + 1)) / 1e6
        raise InputError("coverage", f"may be at most {most} here, as the bundle holds {n} scores")


def rank(n: int, coverage: float) -> int:
    """Return the rank, from 1, of the bound among ``n`` ascending scores."""
    # A number that is whole but for rounding errors must not be rounded up.
    return max(1, math.ceil(round((n + 1) * coverage, 9)))


def thresholds(manifest: Manifest, coverage: float) -> NDArray[np.float64]:
    """Return the greatest covered score: a single one for all classes, or ``[C]``."""
    scores = manifest.conformal_scores
    assert scores is not None  # checked
    place = rank(len(scores[0]), coverage) - 1
    return np.array([each[place] for each in scores])


def prediction_region(manifest: Manifest, coverage: float, summary: Summary) -> dict[str, object]:
    """Return the set or interval that contains the truth with probability ``coverage``.

    For classes ``prediction_set``: for each row the labels whose score, 1 - mean, is covered, and
    always the likeliest. For values ``prediction_interval``: mean -+ threshold x total_std.
    """
    moments, _, parts = summary
    greatest = thresholds(manifest, coverage)
    if not isinstance(parts, Spreads):
        covered = 1 - moments.mean.astype(np.float64) <= greatest[0]
        covered[np.arange(len(covered)), moments.mean.argmax(axis=1)] = True
        labels = manifest.outputs.labels
        sets = [[labels[place] for place in np.flatnonzero(row)] for row in covered]
        return {"prediction_set": sets}
    margin = greatest * parts.total_std
    lower, upper = to_float32(manifest, moments.mean - margin, moments.mean + margin)
    return {"prediction_interval": {"coverage": coverage, "lower": lower, "upper": upper}}
