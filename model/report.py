"""Eval mode beside 10, 30 and 100 passes, independent and stratified: how good, how sure.

What is measured of the held-out rows, and how it is printed. ``plots`` draws it.
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
# Shifts triple the work; their AUROCs need no more rows than this.
SHIFTED_ROWS = 1000
INTERVAL = 0.9
LEVELS = np.linspace(0.05, 0.95, 19)
# For curves and plots of many rows.
POINTS = 200


@dataclass(frozen=True)
class Curve:
    """Points of a line."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """What is measured of one way to answer.

    ``calibration`` is the reliability diagram, accuracy against confidence in the bins that hold
    rows (classes), or the coverage of intervals against their level (values). ``risk`` is the error
    rate (classes) or mean squared error (values) against coverage, the surest rows first, by the
    maximal probability or the total std; ``aurc`` the area under it (``uncertainties``).
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
    """What is measured of the held-out rows of a network."""

    data: str
    task: Task
    outputs: tuple[str, ...]
    rows: int
    answers: dict[str, Answer]  # eval mode first
    # NLL of 100 passes - NLL of eval mode, paired by row; below 0 the passes are better.
    nll_difference: Estimate
    predictions: Predictions | None  # regression only


@dataclass(frozen=True)
class Judged:
    """What one way to answer says of rows, beside the truth."""

    statistics: dict[str, Statistic]
    nll: Floats  # [B]
    calibration: Curve
    loss: Floats  # [B]


def report(
    model: nn.Module, part: Dataset, noise_std: Floats | None, eval_noise_std: Floats | None
) -> Report:
    """Measure every way to answer on ``part``.

    For regression ``noise_std [C]`` is the noise around the passes and ``eval_noise_std [C]`` that
    around eval mode; None where the network answers it itself.
    """
    classes = part.task == "classification"
    judged: dict[str, Judged] = {}
    clean: dict[str, dict[str, Floats]] = {}  # by way and uncertainty: [B]
    predictions = None
    for way, outputs in ways(model, part.x):
        noise = eval_noise_std if way == EVAL_MODE else noise_std
        if classes:
            probabilities = softmax(outputs, axis=-1)
            judged[way] = judge_classes(probabilities.mean(axis=0), part.y.astype(np.int64))
        else:
            samples, std = evaluation.values_and_noise(outputs, part, noise)
            judged[way] = judge_values(samples, part.y.astype(np.float64), std)
            if way == MOST:
                predictions = predict(samples, part.y.astype(np.float64), std)
        clean[way] = doubts(outputs, part, noise)
    auroc: dict[str, dict[str, dict[str, float]]] = {way: {} for way in judged}
    for shift, x in shifts.shifted(part.x[:SHIFTED_ROWS]).items():
        for way, outputs in ways(model, x):
            shifted = doubts(outputs, part, eval_noise_std if way == EVAL_MODE else noise_std)
            auroc[way][shift] = {
                name: uncertainties.auroc(clean[way][name], doubt)
                for name, doubt in shifted.items()
            }
    statistics = {
        (way, name): statistic
        for way, found in judged.items()
        for name, statistic in found.statistics.items()
    }
    difference = bootstrap.mean_of(judged[MOST].nll - judged[EVAL_MODE].nll)
    estimates = bootstrap.estimate(statistics | {("", "nll difference"): difference}, len(part))
    answers = {}
    for way, found in judged.items():
        # Both end on what a service would order by: the confidence, or the total std.
        doubt = clean[way]["max_probability" if classes else "total_std"]
        risk = uncertainties.risk_coverage(found.loss, doubt)
        answers[way] = Answer(
            metrics={name: estimates[way, name] for name in found.statistics},
            calibration=found.calibration,
            risk=thinned(risk),
            aurc=float(risk.mean()),
            auroc=auroc[way],
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


def ways(model: nn.Module, rows: NDArray[np.float32]) -> Iterator[tuple[str, Floats]]:
    """Yield each way to answer with its outputs ``[T, B, C]``; eval mode is one pass.

    Of independent passes the first 10 and 30 of 100 are taken. Stratified ones only make sense
    together, so each number of them is run on its own.
    """
    x = torch.from_numpy(rows)
    yield EVAL_MODE, evaluation.eval_outputs(model, x)[None]
    samples = evaluation.mc_outputs(model, x, max(PASSES), seed=0)
    for passes in PASSES:
        yield f"{passes} passes", samples[:passes]
    for passes in PASSES:
        yield f"{passes} stratified", evaluation.mc_outputs(model, x, passes, 0, "stratified")


def doubts(outputs: Floats, part: Dataset, noise_std: Floats | None) -> dict[str, Floats]:
    """Return the uncertainties ``[B]`` of logits or values ``[T, B, C]``."""
    if part.task == "classification":
        return uncertainties.of_classes(softmax(outputs, axis=-1))
    return uncertainties.of_values(*evaluation.values_and_noise(outputs, part, noise_std))


def judge_classes(probabilities: Floats, y: NDArray[np.int64]) -> Judged:
    """Hold ``probabilities [B, C]`` against the true classes."""
    confidence, accuracy, _ = evaluation.reliability(probabilities, y)
    return Judged(
        statistics=evaluation.classification_statistics(probabilities, y),
        nll=evaluation.class_nll(probabilities, y),
        calibration=Curve(tuple(confidence.tolist()), tuple(accuracy.tolist())),
        loss=(probabilities.argmax(axis=1) != y).astype(np.float64),
    )


def judge_values(samples: Floats, y: Floats, noise_std: Floats) -> Judged:
    """Hold passes ``[T, B, C]`` against the true values ``[B, C]``."""
    level = evaluation.central_level(samples, y, noise_std)
    covered = [float((level <= expected).mean()) for expected in LEVELS]
    held = bootstrap.mean_of((level <= INTERVAL).mean(axis=1))
    return Judged(
        statistics=evaluation.regression_statistics(samples, y, noise_std)
        | {f"coverage_{INTERVAL * 100:.0f}": held},
        nll=-evaluation.log_likelihood(samples, y, noise_std).sum(axis=1),
        calibration=Curve(tuple(LEVELS.tolist()), tuple(covered)),
        loss=((samples.mean(axis=0) - y) ** 2).mean(axis=1),
    )


def predict(samples: Floats, y: Floats, noise_std: Floats) -> Predictions:
    """Return mean and interval of the first target for some rows of ``samples [T, B, C]``."""
    passes, true = samples[:, :POINTS, 0], y[:POINTS, 0]
    # The predictive mixture: a pass plus observation noise, here drawn with a fixed seed.
    std = np.broadcast_to(noise_std, samples.shape)[:, :POINTS, 0]
    noise = np.random.default_rng(0).normal(0.0, std)
    tails = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    lower, upper = np.quantile(passes + noise, tails, axis=0).tolist()
    mean = passes.mean(axis=0)
    return Predictions(tuple(true.tolist()), tuple(mean.tolist()), tuple(lower), tuple(upper))


def thinned(risk: Floats) -> Curve:
    """Return the risk against coverage at no more than ``POINTS`` coverages, 1 the last."""
    covered = np.unique(np.linspace(1, len(risk), min(len(risk), POINTS)).round().astype(np.int64))
    return Curve(tuple((covered / len(risk)).tolist()), tuple(risk[covered - 1].tolist()))


def lines(found: Report) -> Iterator[str]:
    """Yield the lines of the tables that the command line prints."""
    first = found.answers[EVAL_MODE]
    yield (
        f"{f'{bootstrap.LEVEL:.0%} intervals':<16}"
        + "".join(f"{name:<25}" for name in first.metrics)
        + "aurc"
    )
    for way, answer in found.answers.items():
        cells = "".join(f"{described(estimate):<25}" for estimate in answer.metrics.values())
        yield f"{way:<16}{cells}{answer.aurc:.3g}"
    yield verdict(found)
    yield ""
    yield f"{'AUROC of shifted rows':<34}{'eval':>6}{'passes':^21}{'stratified':^21}".rstrip()
    numbers = "".join(f"{passes:>7}" for passes in PASSES)
    yield f"{'':<34}{'mode':>6}{numbers}{numbers}"
    for shift, names in found.answers[MOST].auroc.items():
        for name in names:
            cells = "".join(
                f"{answer.auroc[shift][name]:>7.3f}" if name in answer.auroc[shift] else f"{'-':>7}"
                for answer in found.answers.values()
            )
            yield f"{shift:<12}{name:<21}{cells}"


def described(estimate: Estimate) -> str:
    """Write a figure with its interval."""
    return f"{estimate.value:.3g} [{estimate.lower:.3g}, {estimate.upper:.3g}]"


def verdict(found: Report) -> str:
    """Say whether passes are better than eval mode."""
    d = found.nll_difference
    if d.upper < 0 or d.lower > 0:
        said = f"the passes are {'better' if d.upper < 0 else 'worse'}"
    else:
        said = f"these {found.rows} rows show no difference"
    interval = f"{d.value:+.3g} [{d.lower:+.3g}, {d.upper:+.3g}]"
    return f"NLL of {MOST} - NLL of {EVAL_MODE}: {interval}: {said}"
