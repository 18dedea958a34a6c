"""The report on held-out rows: metrics and uncertainties of each prediction method, as tables.

The methods are eval mode and the mean of 10, 30 and 100 passes, with independent masks and with
masks from a Latin hypercube. ``plots`` draws the report.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn

from dropserve.model import bootstrap, evaluation, shifts, uncertainties
from dropserve.model.bootstrap import Estimate, Statistic
from dropserve.model.datasets import Dataset, Task
from dropserve.model.evaluation import Floats

EVAL_MODE = "eval mode"
PASSES = (10, 30, evaluation.PASSES)
MOST = f"{evaluation.PASSES} passes"
# Shifts triple the work, and their AUROCs need no more rows than this.
SHIFTED_ROWS = 1000
INTERVAL = 0.9
LEVELS = np.linspace(0.05, 0.95, 19)
# Maximum number of points of a curve or plot.
POINTS = 200


@dataclass(frozen=True)
class Curve:
    """Points of a line."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class MethodReport:
    """The measurements of one prediction method.

    ``calibration`` is the reliability diagram (accuracy against confidence in the bins that hold
    rows) for classes, and the coverage of intervals against their level for values. ``risk`` is the
    error rate (classes) or mean squared error (values) against coverage, with the most certain rows
    first, by maximum probability or total std; ``aurc`` is the area under it (``uncertainties``).
    """

    metrics: dict[str, Estimate]
    calibration: Curve
    risk: Curve
    aurc: float
    auroc: dict[str, dict[str, float]]  # by shift and uncertainty


@dataclass(frozen=True)
class Predictions:
    """True values of the first target, the mean of 100 passes, and its interval; ``[B]`` each."""

    true: tuple[float, ...]
    mean: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """The measurements of a network on held-out rows."""

    data: str
    task: Task
    outputs: tuple[str, ...]
    rows: int
    answers: dict[str, MethodReport]  # by method, eval mode first
    # NLL of 100 passes - NLL of eval mode, paired by row; below 0 the passes are better.
    nll_difference: Estimate
    predictions: Predictions | None  # regression only


@dataclass(frozen=True)
class Scores:
    """The outputs of one prediction method, compared with the true classes or values."""

    statistics: dict[str, Statistic]
    nll: Floats  # [B]
    calibration: Curve
    loss: Floats  # [B]


def report(
    model: nn.Module, part: Dataset, noise_std: Floats | None, eval_noise_std: Floats | None
) -> Report:
    """Measure every prediction method on ``part``.

    For a regression, ``noise_std [C]`` is the noise around the passes and ``eval_noise_std [C]``
    that around eval mode; None for a classification, or if the network outputs its noise.
    """
    classes = part.task == "classification"
    scores: dict[str, Scores] = {}
    clean: dict[str, dict[str, Floats]] = {}  # by method and uncertainty: [B]
    predictions = None
    for method, outputs in outputs_by_method(model, part.x):
        noise = eval_noise_std if method == EVAL_MODE else noise_std
        if classes:
            probabilities = softmax(outputs, axis=-1)
            scores[method] = score_classes(probabilities.mean(axis=0), part.y.astype(np.int64))
        else:
            samples, std = evaluation.values_and_noise(outputs, part, noise)
            scores[method] = score_values(samples, part.y.astype(np.float64), std)
            if method == MOST:
                predictions = predictions_of(samples, part.y.astype(np.float64), std)
        clean[method] = row_uncertainties(outputs, part, noise)
    auroc: dict[str, dict[str, dict[str, float]]] = {method: {} for method in scores}
    for shift, x in shifts.shifted(part.x[:SHIFTED_ROWS]).items():
        for method, outputs in outputs_by_method(model, x):
            noise = eval_noise_std if method == EVAL_MODE else noise_std
            auroc[method][shift] = {
                name: uncertainties.auroc(clean[method][name], shifted)
                for name, shifted in row_uncertainties(outputs, part, noise).items()
            }
    statistics = {
        (method, name): statistic
        for method, found in scores.items()
        for name, statistic in found.statistics.items()
    }
    difference = bootstrap.mean_of(scores[MOST].nll - scores[EVAL_MODE].nll)
    estimates = bootstrap.estimate(statistics | {("", "nll difference"): difference}, len(part))
    answers = {}
    for method, found in scores.items():
        uncertainty = clean[method]["max_probability" if classes else "total_std"]
        risk = uncertainties.risk_coverage(found.loss, uncertainty)
        answers[method] = MethodReport(
            metrics={name: estimates[method, name] for name in found.statistics},
            calibration=found.calibration,
            risk=thinned(risk),
            aurc=float(risk.mean()),
            auroc=auroc[method],
        )
    return Report(
        data=part.name,
        task=part.task,
        outputs=part.outputs,
        rows=len(part),
        answers=answers,
        nll_difference=estimates["", "nll difference"],
        predictions=predictions,
    )


def outputs_by_method(model: nn.Module, rows: NDArray[np.float32]) -> Iterator[tuple[str, Floats]]:
    """Yield each prediction method with its outputs ``[T, B, C]``; eval mode is one pass.

    The 10 and 30 independent passes are the first of the 100. The passes of a Latin hypercube only
    make sense together, so each number of them is run separately.
    """
    x = torch.from_numpy(rows)
    yield EVAL_MODE, evaluation.eval_outputs(model, x)[None]
    samples = evaluation.mc_outputs(model, x, max(PASSES), seed=0)
    for passes in PASSES:
        yield f"{passes} passes", samples[:passes]
    for passes in PASSES:
        yield f"{passes} hypercube", evaluation.mc_outputs(model, x, passes, 0, "hypercube")


def row_uncertainties(
    outputs: Floats, part: Dataset, noise_std: Floats | None
) -> dict[str, Floats]:
    """Return the uncertainties ``[B]``, by name, of logits or values ``[T, B, C]``."""
    if part.task == "classification":
        return uncertainties.of_classes(softmax(outputs, axis=-1))
    return uncertainties.of_values(*evaluation.values_and_noise(outputs, part, noise_std))


def score_classes(probabilities: Floats, y: NDArray[np.int64]) -> Scores:
    """Compare ``probabilities [B, C]`` with the true classes ``y [B]``."""
    confidence, accuracy, _ = evaluation.reliability(probabilities, y)
    return Scores(
        statistics=evaluation.classification_statistics(probabilities, y),
        nll=evaluation.class_nll(probabilities, y),
        calibration=Curve(tuple(confidence.tolist()), tuple(accuracy.tolist())),
        loss=(probabilities.argmax(axis=1) != y).astype(np.float64),
    )


def score_values(samples: Floats, y: Floats, noise_std: Floats) -> Scores:
    """Compare passes ``samples [T, B, C]`` with the true values ``y [B, C]``."""
    level = evaluation.central_level(samples, y, noise_std)
    covered = [float((level <= expected).mean()) for expected in LEVELS]
    coverage = bootstrap.mean_of((level <= INTERVAL).mean(axis=1))
    return Scores(
        statistics=evaluation.regression_statistics(samples, y, noise_std)
        | {f"coverage_{INTERVAL * 100:.0f}": coverage},
        nll=-evaluation.log_likelihood(samples, y, noise_std).sum(axis=1),
        calibration=Curve(tuple(LEVELS.tolist()), tuple(covered)),
        loss=((samples.mean(axis=0) - y) ** 2).mean(axis=1),
    )


def predictions_of(samples: Floats, y: Floats, noise_std: Floats) -> Predictions:
    """Return the predictions of the first target for ``POINTS`` rows of ``samples [T, B, C]``."""
    passes, true = samples[:, :POINTS, 0], y[:POINTS, 0]
    # Draws from the predictive mixture: a pass plus observation noise, with a fixed seed.
    std = np.broadcast_to(noise_std, samples.shape)[:, :POINTS, 0]
    noise = np.random.default_rng(0).normal(0.0, std)
    tails = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    lower, upper = np.quantile(passes + noise, tails, axis=0).tolist()
    mean = passes.mean(axis=0)
    return Predictions(tuple(true.tolist()), tuple(mean.tolist()), tuple(lower), tuple(upper))


def thinned(risk: Floats) -> Curve:
    """Return risk ``[B]`` against coverage as a curve of at most ``POINTS`` points, up to 1."""
    covered = np.unique(np.linspace(1, len(risk), min(len(risk), POINTS)).round().astype(np.int64))
    return Curve(tuple((covered / len(risk)).tolist()), tuple(risk[covered - 1].tolist()))


def table_lines(found: Report) -> Iterator[str]:
    """Yield the lines of the tables that the command line prints."""
    first = found.answers[EVAL_MODE]
    yield (
        f"{f'{bootstrap.LEVEL:.0%} intervals':<16}"
        + "".join(f"{name:<25}" for name in first.metrics)
        + "aurc"
    )
    for method, answer in found.answers.items():
        cells = "".join(f"{with_interval(estimate):<25}" for estimate in answer.metrics.values())
        yield f"{method:<16}{cells}{answer.aurc:.3g}"
    yield verdict(found)
    yield ""
    yield f"{'AUROC of shifted rows':<34}{'eval':>6}{'passes':^21}{'hypercube':^21}".rstrip()
    numbers = "".join(f"{passes:>7}" for passes in PASSES)
    yield f"{'':<34}{'mode':>6}{numbers}{numbers}"
    for shift, names in found.answers[MOST].auroc.items():
        for name in names:
            cells = "".join(
                f"{answer.auroc[shift][name]:>7.3f}" if name in answer.auroc[shift] else f"{'-':>7}"
                for answer in found.answers.values()
            )
            yield f"{shift:<12}{name:<21}{cells}"


def with_interval(estimate: Estimate) -> str:
    """Format a metric with its interval."""
    return f"{estimate.value:.3g} [{estimate.lower:.3g}, {estimate.upper:.3g}]"


def verdict(found: Report) -> str:
    """Return a line that says whether the passes are better than eval mode."""
    d = found.nll_difference
    if d.upper < 0 or d.lower > 0:
        said = f"the passes are {'better' if d.upper < 0 else 'worse'}"
    else:
        said = f"these {found.rows} rows show no difference"
    interval = f"{d.value:+.3g} [{d.lower:+.3g}, {d.upper:+.3g}]"
    return f"NLL of {MOST} - NLL of {EVAL_MODE}: {interval}: {said}"
