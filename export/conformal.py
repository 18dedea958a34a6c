"""Score held-out rows, so that the service can say what holds the truth as often as it should.

A score says how far an answer of 100 independent passes was off:

    classes   1 - mean probability of the true class
    values    |true - mean| / total_std, for each target

``app/conformal.py`` says what is made of them, and why. The rows are those of the test part, since
training, early stopping, noise and temperature have seen all others, and a model is surer of what
it has seen.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from dropserve.export.sites import Site
from dropserve.export.verify import ROW_PASSES_AT_ONCE, SEED, Graph, draw_masks
from dropserve.model.datasets import Dataset

PASSES = 100
# More would tell no more, and make the manifest long: n rows bound the coverage within 1 / n.
MOST_ROWS = 2000
MOST_SCORES = 100_000


def scores(
    graph: Graph,
    sites: tuple[Site, ...],
    holdout: Dataset,
    noise_std: tuple[float, ...] | None,
) -> tuple[tuple[float, ...], ...]:
    """Return the scores of held-out rows, ascending: a list for all classes, or one a target.

    Parameters
    ----------
    graph
        The train-mode graph.
    sites
        Its dropout sites.
    holdout
        Rows that nothing was fitted to, in random order.
    noise_std
        Of each target; None for classes, and where the graph itself answers it.
    """
    generator = np.random.default_rng(SEED)
    targets = len(holdout.outputs) if holdout.task == "regression" else 1
    rows = np.arange(min(MOST_ROWS, max(1, MOST_SCORES // targets), len(holdout)))
    found = [
        score(samples(graph, sites, holdout.x[some], generator), holdout.take(some), noise_std)
        for some in np.split(rows, range(0, len(rows), ROW_PASSES_AT_ONCE // PASSES)[1:])
    ]
    # Six digits are more than there is to them.
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
    """Run passes of rows ``x [B, ...]``; return their outputs ``[B, T, .]``."""
    rows = np.repeat(np.arange(len(x)), PASSES)
    outputs = graph.passes(x, rows, draw_masks(sites, len(rows), generator))
    return outputs.reshape(len(x), PASSES, -1).astype(np.float64)


def score(
    outputs: NDArray[np.float64], part: Dataset, noise_std: tuple[float, ...] | None
) -> NDArray[np.float64]:
    """Return the scores ``[B, 1]`` or ``[B, C]`` of rows whose passes answered so."""
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
