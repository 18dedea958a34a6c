"""The page of plots that ``train`` and ``evaluate`` write."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dropserve.model.report import EVAL_MODE, INTERVAL, MOST, Predictions, Report

COLUMNS = 3
# Methods that a plot of curves has room for.
SHOWN = (EVAL_MODE, "10 passes", MOST, "100 hypercube")
METRICS = {
    "classification": ("nll", "brier", "ece"),
    "regression": ("rmse", "log_likelihood"),
}


def write_page(
    found: Report, path: Path, losses: Sequence[tuple[float, float]] | None = None
) -> None:
    """Draw a report, and the training and validation loss of each epoch if given, to ``path``."""
    panels: list[Callable[[Axes], None]] = []
    if losses is not None:
        panels.append(partial(draw_losses, losses=losses))
    if found.predictions is not None:
        panels.append(
            partial(draw_predictions, predictions=found.predictions, name=found.outputs[0])
        )
    panels += [partial(draw_calibration, found=found), partial(draw_risk, found=found)]
    panels += [partial(draw_metric, found=found, name=name) for name in METRICS[found.task]]
    shifts = found.answers[MOST].auroc
    panels += [partial(draw_auroc, found=found, shift=shift) for shift in shifts]
    rows = -(-len(panels) // COLUMNS)
    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": "small"}):
        figure = Figure(figsize=(5 * COLUMNS, 4 * rows), layout="constrained")
        places = figure.subplots(rows, COLUMNS).flat
        for draw, axes in zip(panels, places, strict=False):
            draw(axes)
        for axes in places:
            axes.set_axis_off()
        figure.savefig(path, dpi=80)


def draw_losses(axes: Axes, losses: Sequence[tuple[float, float]]) -> None:
    """Draw the training and validation loss of each epoch."""
    epochs = np.arange(1, len(losses) + 1)
    training, validation = zip(*losses, strict=True)
    axes.plot(epochs, training, label="training (dropout on)")
    axes.plot(epochs, validation, label="validation (eval mode)")
    # The loss of a regression with noise may be negative.
    scale = "log" if min(training + validation) > 0 else "linear"
    axes.set(title="Loss", xlabel="epoch", ylabel="loss", yscale=scale)
    axes.legend()


def draw_calibration(axes: Axes, found: Report) -> None:
    """Draw accuracy against confidence, or the coverage of intervals against their level."""
    classes = found.task == "classification"
    for method in SHOWN:
        curve = found.answers[method].calibration
        axes.plot(curve.x, curve.y, marker="." if classes else None, label=method)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="perfect")
    if classes:
        axes.set(title="Reliability", xlabel="confidence", ylabel="accuracy")
    else:
        axes.set(title="Coverage of intervals", xlabel="level", ylabel="share of rows inside")
    axes.legend()


def draw_risk(axes: Axes, found: Report) -> None:
    """Draw the error of the most certain rows against their share."""
    for method in SHOWN:
        answer = found.answers[method]
        axes.plot(answer.risk.x, answer.risk.y, label=f"{method} (area {answer.aurc:.3g})")
    risk = "error rate" if found.task == "classification" else "mean squared error"
    axes.set(title="Risk against coverage", xlabel="coverage, most certain first", ylabel=risk)
    axes.legend()


def draw_metric(axes: Axes, found: Report, name: str) -> None:
    """Draw a metric of every method, with its interval."""
    estimates = [answer.metrics[name] for answer in found.answers.values()]
    values = np.array([estimate.value for estimate in estimates])
    # The interval of a biased metric need not contain it.
    below = np.maximum([e.value - e.lower for e in estimates], 0.0)
    above = np.maximum([e.upper - e.value for e in estimates], 0.0)
    axes.errorbar(values, range(len(values)), xerr=[below, above], fmt="o", capsize=3)
    axes.set_yticks(range(len(values)), list(found.answers))
    axes.invert_yaxis()
    axes.set(title=name.replace("_", " "))


def draw_auroc(axes: Axes, found: Report, shift: str) -> None:
    """Draw how well each uncertainty of every method detects shifted rows."""
    methods = list(found.answers)
    for name in found.answers[MOST].auroc[shift]:
        known = [method for method in methods if name in found.answers[method].auroc[shift]]
        y = [found.answers[method].auroc[shift][name] for method in known]
        axes.plot([methods.index(m) for m in known], y, "o-", label=name.replace("_", " "))
    axes.set_xticks(range(len(methods)), methods, rotation=30)
    axes.axhline(0.5, color="grey", linestyle="--")
    axes.set(title=f"AUROC, {shift} rows", ylim=(min(0.45, axes.get_ylim()[0]), 1.01))
    axes.legend()


def draw_predictions(axes: Axes, predictions: Predictions, name: str) -> None:
    """Draw predicted against true values of the first target, with prediction intervals."""
    p = predictions
    below = np.maximum(np.subtract(p.mean, p.lower), 0.0)
    above = np.maximum(np.subtract(p.upper, p.mean), 0.0)
    axes.errorbar(
        p.true, p.mean, yerr=[below, above], fmt="o", alpha=0.6, label=f"{INTERVAL:.0%} interval"
    )
    span = [min(p.true), max(p.true)]
    axes.plot(span, span, color="grey", linestyle="--", label="perfect")
    # A dollar sign in a target's name must not begin a formula.
    axes.set_title(name, parse_math=False)
    axes.set(xlabel="true", ylabel=f"mean of {MOST}")
    axes.legend()
