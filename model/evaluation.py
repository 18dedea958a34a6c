"""Metrics on arrays, observation noise, and Monte Carlo passes in torch.

Every metric is a statistic of rows, which ``bootstrap`` resamples. ``samples`` are the outputs of T
train-mode passes; the Monte Carlo metrics are those of the mixture of the passes.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, ndtr
from torch import Tensor, nn

from dropserve.model.bootstrap import Statistic, mean_of, point_estimate
from dropserve.model.datasets import Dataset
from dropserve.model.dropout import (
    independent_uniforms,
    latin_hypercube,
    only_sites_in_train_mode,
)

Floats = NDArray[np.float64]
Masks = Literal["independent", "hypercube"]

ECE_BINS = 15
PASSES = 100
# Rows times passes, and input values of the passes, in one forward call: bounds the memory.
ROW_PASSES_AT_ONCE = 8192
INPUTS_AT_ONCE = 2**19


@torch.no_grad()
def eval_outputs(model: nn.Module, x: Tensor) -> Floats:
    """Run eval mode on ``x [B, ...]`` and return logits or values ``[B, C]``."""
    model.eval()
    parts = [model(part) for part in torch.split(x, ROW_PASSES_AT_ONCE)]
    return np.asarray(torch.cat(parts), dtype=np.float64)


@torch.no_grad()
def mc_outputs(
    model: nn.Module, x: Tensor, passes: int, seed: int, masks: Masks = "independent"
) -> Floats:
    """Run T = ``passes`` train-mode passes on ``x [B, ...]``; return outputs ``[T, B, C]``.

    A single pass has the same distribution for both kinds of ``masks``. The passes of a
    ``hypercube`` (``dropout.latin_hypercube``) depend on each other, so only all T together give
    its precise mean.
    """
    uniform = independent_uniforms if masks == "independent" else latin_hypercube(passes)
    with torch.random.fork_rng(devices=[]), only_sites_in_train_mode(model, uniform):
        torch.manual_seed(seed)
        parts = []
        at_once = min(ROW_PASSES_AT_ONCE, INPUTS_AT_ONCE // x[0].numel())
        for part in torch.split(x, max(1, at_once // passes)):
            tiled = part.repeat(passes, *(1,) * (x.ndim - 1))  # [T * b, ...]
            parts.append(model(tiled).reshape(passes, len(part), -1))
    return np.asarray(torch.cat(parts, dim=1), dtype=np.float64)


def class_probabilities(logits: Floats) -> Floats:
    """Return the probabilities ``[B, C]`` of logits ``[B, C]``, or the mean of ``[T, B, C]``."""
    probabilities: Floats = np.exp(log_softmax(logits, axis=-1))
    return probabilities.mean(axis=0) if logits.ndim == 3 else probabilities


def classification_statistics(probabilities: Floats, y: NDArray[np.int64]) -> dict[str, Statistic]:
    """Return the metrics of ``probabilities [B, C]`` for true classes ``y [B]``, as statistics.

    - ``accuracy``: share of rows whose most probable class is the true one.
    - ``nll``: mean of -log p(true class), in nats.
    - ``brier``: mean of sum_c (p_c - [c is true])^2, the multi-class score of Brier (1950),
      Verification of Forecasts Expressed in Terms of Probability, from 0 to 2.
    - ``ece``: expected calibration error, the sum over ``ECE_BINS`` equally wide bins of confidence
      of |accuracy - mean confidence| in the bin times its share of rows: Guo et al. (2017), On
      Calibration of Modern Neural Networks, eq. 3.
    """
    correct = probabilities.argmax(axis=1) == y
    onehot = np.eye(probabilities.shape[1])[y]
    confidence = probabilities.max(axis=1)
    gaps = np.zeros((len(y), ECE_BINS))
    gaps[np.arange(len(y)), confidence_bins(confidence)] = correct - confidence
    return {
        "accuracy": mean_of(correct.astype(np.float64)),
        "nll": mean_of(class_nll(probabilities, y)),
        "brier": mean_of(((probabilities - onehot) ** 2).sum(axis=1)),
        "ece": lambda weights: np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1),
    }


def class_nll(probabilities: Floats, y: NDArray[np.int64]) -> Floats:
    """Return ``-log p(true class)`` of each row, ``[B]``."""
    true = probabilities[np.arange(len(y)), y]
    nll: Floats = -np.log(np.maximum(true, np.finfo(np.float64).tiny))
    return nll


def classification_metrics(probabilities: Floats, y: NDArray[np.int64]) -> dict[str, float]:
    """Return the values of ``classification_statistics``."""
    statistics = classification_statistics(probabilities, y)
    return {name: point_estimate(statistic, len(y)) for name, statistic in statistics.items()}


def confidence_bins(confidence: Floats) -> NDArray[np.int64]:
    """Return the bin of each of ``confidence [B]``, of ``ECE_BINS`` equally wide ones."""
    bins: NDArray[np.int64] = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    return bins


def reliability(
    probabilities: Floats, y: NDArray[np.int64]
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Return the reliability diagram: mean confidence, accuracy and rows of each non-empty bin.

    DeGroot and Fienberg (1983), The Comparison and Evaluation of Forecasters. The bins are those of
    the ECE.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == y
    bins = confidence_bins(confidence)
    count = np.bincount(bins, minlength=ECE_BINS)
    filled = count > 0
    mean_confidence = np.bincount(bins, confidence, ECE_BINS)[filled] / count[filled]
    accuracy = np.bincount(bins, correct, ECE_BINS)[filled] / count[filled]
    return mean_confidence, accuracy, count[filled]


def values_and_noise(
    outputs: Floats, part: Dataset, noise_std: Floats | None
) -> tuple[Floats, Floats]:
    """Return values ``[..., C]`` and their noise's standard deviation, ``[C]`` or ``[..., C]``.

    ``noise_std [C]`` is None if the network's ``outputs [..., 2C]`` hold the noise.
    """
    targets = len(part.outputs)
    noise = np.exp(outputs[..., targets:]) if noise_std is None else noise_std
    return outputs[..., :targets], noise


def regression_statistics(samples: Floats, y: Floats, noise_std: Floats) -> dict[str, Statistic]:
    """Return RMSE, MAE (in target units) and log-likelihood (in nats per row), as statistics.

    The prediction is the mean of the passes ``samples [T, B, C]``; eval mode is a single pass. The
    log-likelihood of ``y [B, C]`` is that of the mixture of the passes with the observation noise,
    ``noise_std [C]`` or ``[T, B, C]``.
    """
    error = samples.mean(axis=0) - y
    mean_square = mean_of((error**2).mean(axis=1))
    return {
        "rmse": lambda weights: np.sqrt(mean_square(weights)),
        "mae": mean_of(np.abs(error).mean(axis=1)),
        "log_likelihood": mean_of(log_likelihood(samples, y, noise_std).sum(axis=1)),
    }


def regression_metrics(samples: Floats, y: Floats, noise_std: Floats) -> dict[str, float]:
    """Return the values of ``regression_statistics``."""
    statistics = regression_statistics(samples, y, noise_std)
    return {name: point_estimate(statistic, len(y)) for name, statistic in statistics.items()}


def log_likelihood(samples: Floats, y: Floats, noise_std: Floats) -> Floats:
    """Return ``log 1/T sum_t N(y; f_t, noise_std^2)``, ``[B, C]``.

    Gal and Ghahramani (2016), eq. 8 of the appendix; ``noise_std``, ``[C]`` or ``[T, B, C]``, is
    their tau^(-1/2).
    """
    z = (y - samples) / noise_std  # [T, B, C]
    log_density = -0.5 * z**2 - np.log(noise_std) - 0.5 * np.log(2 * np.pi)
    result: Floats = logsumexp(log_density, axis=0) - np.log(len(samples))
    return result


def central_level(samples: Floats, y: Floats, noise_std: Floats) -> Floats:
    """Return the level ``[B, C]`` of the central interval of the mixture that just reaches ``y``.

    It is |2 F(y) - 1| with F(y) = 1/T sum_t Phi((y - f_t) / noise_std): the interval of level q
    contains y if the result is at most q. For a calibrated model it is uniform on [0, 1]: Kuleshov,
    Fenner and Ermon (2018), Accurate Uncertainties for Deep Learning Using Calibrated Regression,
    with central intervals in place of one-sided ones.
    """
    below: Floats = ndtr((y - samples) / noise_std).mean(axis=0)
    return np.abs(2 * below - 1)


def fit_noise(samples: Floats, y: Floats, shape: Floats | None = None) -> Floats:
    """Return the observation noise std ``[C]`` that maximizes the likelihood of ``y [B, C]``.

    With a noise std ``shape [T, B, C]``, return the factor ``[C]`` that scales it best.
    """
    shape = np.ones_like(samples) if shape is None else shape
    error = (y - samples.mean(axis=0)) / np.sqrt((shape**2).mean(axis=0))
    spread = np.sqrt((error**2).mean(axis=0))  # [C]
    # A perfect fit still has float32 rounding, in the target's own unit.
    least = 1e-6 * np.abs(y).max(axis=0) / shape.max(axis=(0, 1))
    spread = np.maximum(spread, np.maximum(least, 1e-30))

    def fit_one(output: int) -> float:
        column = slice(output, output + 1)

        def loss(log_std: float) -> float:
            noise = np.exp(log_std) * shape[..., column]
            return -float(log_likelihood(samples[..., column], y[:, column], noise).mean())

        # A point prediction needs the spread of the residuals; scattered passes need less.
        centre = float(np.log(spread[output]))
        return float(np.exp(minimize_scalar(loss, bounds=(centre - 5, centre + 1)).x))

    return np.array([fit_one(output) for output in range(y.shape[1])])


def evaluate(
    model: nn.Module, part: Dataset, noise_std: Floats | None, eval_noise_std: Floats | None
) -> dict[str, dict[str, float]]:
    """Return the metrics of ``part`` in eval mode (``"eval"``) and of 100 passes (``"mc"``).

    For a regression, ``noise_std [C]`` is the noise around the passes and ``eval_noise_std [C]``
    that around eval mode; None for a classification, or if the network outputs its noise.
    """
    x = torch.from_numpy(part.x)
    point = eval_outputs(model, x)
    samples = mc_outputs(model, x, PASSES, seed=0)
    if part.task == "classification":
        y = part.y.astype(np.int64)
        return {
            "eval": classification_metrics(class_probabilities(point), y),
            "mc": classification_metrics(class_probabilities(samples), y),
        }
    values = part.y.astype(np.float64)
    found = {}
    for mode, outputs, noise in (("eval", point[None], eval_noise_std), ("mc", samples, noise_std)):
        passes, std = values_and_noise(outputs, part, noise)
        found[mode] = regression_metrics(passes, values, std)
    return found
