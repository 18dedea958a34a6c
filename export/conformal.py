"""Compute the nonconformity scores of held-out rows, the calibration set of conformal prediction.

A score is the error of the mean of 100 independent passes on a row:

    classes   1 - mean probability of the true class
    values    |true - mean| / total_std, for each target

``app/uncertainty/conformal.py`` turns scores into prediction sets and intervals. They come from the
test split, since training, early stopping, noise and temperature have used all other rows, and a
model is overconfident on rows that it has been fitted to.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from dropserve.export.sites import Site
from dropserve.export.verify import ROW_PASSES_AT_ONCE, SEED, Graph, draw_masks
from dropserve.model.datasets import Dataset

PASSES = 100
# n rows fix the coverage within 1 / n; more rows would lengthen the manifest and gain little.
MOST_ROWS = 2000
MOST_SCORES = 100_000


def scores(
    graph: Graph,
    sites: tuple[Site, ...],
    holdout: Dataset,
    noise_std: tuple[float, ...] | None,
) -> tuple[tuple[float, ...], ...]:
    """Return the scores of held-out rows, ascending: one list for all classes, or one per target.

    Parameters
    ----------
    graph
        The train-mode graph.
    sites
        Its dropout sites.
    holdout
        Rows that nothing was fitted to, in random order.
    noise_std
        Noise of each target, ``[C]``; None for a classification, or if the graph outputs the noise.
    """
    generator = np.random.default_rng(SEED)
    targets = len(holdout.outputs) if holdout.task == "regression" else 1
    rows = np.arange(min(MOST_ROWS, max(1, MOST_SCORES // targets), len(holdout)))
    found = [
        score(samples(graph, sites, holdout.x[some], generator), holdout.take(some), noise_std)
        for some in np.split(rows, range(0, len(rows), ROW_PASSES_AT_ONCE // PASSES)[1:])
    ]
    # Six digits exceed the precision of the scores.
    return tuple(
        tuple(float(f"{value:.6g}") for value in np.sort(column))
        for column in np.concatenate(found).T
    )


def samples(
    graph: Graph,
    sites: tuple[Site, ...],
    x: NDArray[np.float32],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Run T = ``PASSES`` passes of rows ``x [B, ...]``; return ``[B, T, C]`` or ``[B, T, 2C]``."""
    rows = np.repeat(np.arange(len(x)), PASSES)
    outputs = graph.passes(x, rows, draw_masks(sites, len(rows), generator))
    return outputs.reshape(len(x), PASSES, -1).astype(np.float64)


def score(
    outputs: NDArray[np.float64], part: Dataset, noise_std: tuple[float, ...] | None
) -> NDArray[np.float64]:
    """Return the scores of rows, ``[B, 1]`` for classes or ``[B, C]`` for values.

    ``outputs [B, T, .]`` are those of ``samples`` for the rows of ``part``.
    """
    if part.task == "classification":
        mean = softmax(outputs, axis=-1).mean(axis=1)
        true: NDArray[np.float64] = mean[np.arange(len(part)), part.y.astype(np.int64)]
        return 1 - true[:, None]
    targets = len(part.outputs)
    values = outputs[..., :targets]
    noise = np.exp(outputs[..., targets:]) if noise_std is None else np.array(noise_std)
    aleatoric = np.sqrt(np.mean(np.broadcast_to(noise, values.shape) ** 2, axis=1))
    total_std = np.hypot(values.std(axis=1, ddof=1), aleatoric)
    relative: NDArray[np.float64] = np.abs(part.y - values.mean(axis=1)) / total_std
    return relative
