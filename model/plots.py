"""The page of plots that training leaves for a person."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model import evaluation
from model.datasets import Dataset
from model.training import Trained

INTERVAL = 0.9


def write_page(trained: Trained, test: Dataset, path: Path) -> None:
    """Draw loss curves beside calibration (classes) or predictions (values) of the test part."""
    with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_losses(left, trained)
        if trained.noise_std is None:
            draw_reliability(right, trained, test)
        else:
            draw_predictions(right, trained, test)
        figure.savefig(path, dpi=120)


def draw_losses(axes: Axes, trained: Trained) -> None:
    """Draw the training and validation loss of each epoch."""
    epochs = np.arange(1, len(trained.losses) + 1)
    training, validation = zip(*trained.losses, strict=True)
    axes.plot(epochs, training, label="training (dropout on)")
    axes.plot(epochs, validation, label="validation (eval mode)")
    axes.set(title="Loss", xlabel="epoch", ylabel="loss", yscale="log")
    axes.legend()


def draw_reliability(axes: Axes, trained: Trained, test: Dataset) -> None:
    """Draw accuracy against confidence, eval mode beside the Monte Carlo mean."""
    x, y = torch.from_numpy(test.x), test.y.astype(np.int64)
    samples = evaluation.mc_outputs(trained.model, x, evaluation.PASSES, seed=0)
    answers = {"eval": evaluation.eval_outputs(trained.model, x), "mc": samples}
    names = {"eval": "eval mode", "mc": f"{evaluation.PASSES} passes"}
    for mode, logits in answers.items():
        confidence, accuracy, _ = evaluation.reliability(evaluation.class_probabilities(logits), y)
        ece = trained.metrics[mode]["ece"]
        axes.plot(confidence, accuracy, marker="o", label=f"{names[mode]} (ECE {ece:.3f})")
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="perfect")
    axes.set(title="Reliability, test part", xlabel="confidence", ylabel="accuracy")
    axes.legend()


def draw_predictions(axes: Axes, trained: Trained, test: Dataset) -> None:
    """Draw predicted against true values of the first target, with noise and model intervals."""
    if trained.noise_std is None:
        raise ValueError("predictions are drawn for regression only")
    x, truth = torch.from_numpy(test.x), test.y[:, 0]
    samples = evaluation.mc_outputs(trained.model, x, evaluation.PASSES, seed=0)[..., 0]  # [T, B]
    # The predictive mixture: a pass plus observation noise, here drawn with a fixed seed.
    noise = np.random.default_rng(0).normal(0.0, trained.noise_std[0], samples.shape)
    tails = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    lower, upper = np.quantile(samples + noise, tails, axis=0)
    mean = samples.mean(axis=0)
    spread = np.maximum(np.stack([mean - lower, upper - mean]), 0.0)
    axes.errorbar(truth, mean, yerr=spread, fmt="o", alpha=0.6, label=f"{INTERVAL:.0%} interval")
    span = [float(truth.min()), float(truth.max())]
    axes.plot(span, span, color="grey", linestyle="--", label="perfect")
    # A target's name is no formula, whatever dollar signs it holds.
    axes.set_title(f"{test.outputs[0]}, test part", parse_math=False)
    axes.set(
        xlabel="true",
        ylabel=f"mean of {evaluation.PASSES} passes",
    )
    axes.legend()
