"""Train a network with early stopping, fit its noise or temperature, and measure it.

Weights come from the training split; early stopping, noise and temperature from the validation
split; metrics from the test split.

References
----------
Loshchilov and Hutter (2017), SGDR (the cosine schedule); (2019), Decoupled Weight Decay.
Prechelt (1998), Early Stopping - But When?
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dropserve.model import calibration, evaluation
from dropserve.model.datasets import Dataset, Split
from dropserve.model.networks import Model, NetworkConfig

Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Literal["cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class TrainingConfig:
    """The options of training."""

    epochs: int = 100
    batch_size: int = 64
    seed: int = 0
    # Chosen, with the number of epochs, on the validation data of six splits of digits.
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"  # of the learning rate; cosine: falls to 0 over the epochs
    # Epochs without a better validation loss before training stops and restores the best weights.
    # None: train all epochs and keep the last weights.
    patience: int | None = 25
    calibrate: bool = False  # classification only


@dataclass(frozen=True)
class Trained:
    """A trained network and the measurements of its training."""

    model: Model
    metrics: dict[str, dict[str, float]]  # on the test split, by mode: "eval" and "mc"
    # [C], std of the targets around the passes; only for a regression with constant noise
    noise_std: tuple[float, ...] | None
    eval_noise_std: tuple[float, ...] | None  # [C], as noise_std, around eval mode
    temperature: float | None  # divides the logits; None if not calibrated
    losses: tuple[tuple[float, float], ...]  # training and validation loss of each epoch


def train(config: NetworkConfig, parts: Split, how: TrainingConfig, *, progress: bool) -> Trained:
    """Train the network of ``config``; the same seed gives the same weights.

    Raises
    ------
    ValueError
        If the network does not fit the data, the loss becomes NaN or infinite, or an option does
        not suit the task (``calibrate`` a regression, noise ``input`` a classification).
    """
    if how.calibrate and parts.train.task == "regression":
        raise ValueError("a temperature calibrates class probabilities; this is a regression")
    if config.noise == "input" and parts.train.task == "classification":
        raise ValueError("noise is that of values; this is a classification")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model = Model(config)
        model.learn_input_scale(torch.from_numpy(parts.train.x))
        mean, std = target_scale(parts.train)
        losses = fit(model, parts, mean, std, how, progress=progress)
    if mean is not None and std is not None:
        model.fold_target_scale(mean, std)
    temperature = None
    if how.calibrate:
        point = evaluation.eval_outputs(model, torch.from_numpy(parts.validation.x))
        temperature = calibration.fit_temperature(parts.validation.y.astype(np.int64), point)
        model.fold_temperature(temperature)
    noise_std, eval_noise_std = observation_noise(model, parts.validation)
    return Trained(
        model=model,
        metrics=evaluation.evaluate(model, parts.test, noise_std, eval_noise_std),
        noise_std=None if noise_std is None else tuple(noise_std.tolist()),
        eval_noise_std=None if eval_noise_std is None else tuple(eval_noise_std.tolist()),
        temperature=temperature,
        losses=tuple(losses),
    )


def target_scale(part: Dataset) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return mean and standard deviation ``[C]`` of the targets; None, None for classes."""
    if part.task == "classification":
        return None, None
    y = torch.from_numpy(part.y)
    std = y.std(0, correction=0)
    return y.mean(0), torch.where(std > 0, std, torch.ones_like(std))


def fit(
    model: Model,
    parts: Split,
    mean: Tensor | None,
    std: Tensor | None,
    how: TrainingConfig,
    *,
    progress: bool,
) -> list[tuple[float, float]]:
    """Run the epochs and return the training and validation loss of each.

    ``mean`` and ``std``, ``[C]``, standardize the targets of a regression; both are None for
    classes. ``model`` ends in eval mode with the weights to keep.
    """

    def tensors(part: Dataset) -> tuple[Tensor, Tensor]:
        y = torch.from_numpy(part.y)
        return torch.from_numpy(part.x), y if mean is None or std is None else (y - mean) / std

    loss_of: Loss = functional.cross_entropy if mean is None else functional.mse_loss
    validation_loss_of = loss_of
    if model.log_scale is not None:
        loss_of, validation_loss_of = attenuated_loss, gaussian_nll
    x, y = tensors(parts.train)
    x_val, y_val = tensors(parts.validation)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs)
    best_loss, best_epoch, best_weights = float("inf"), 0, copy.deepcopy(model.state_dict())
    losses: list[tuple[float, float]] = []
    with tqdm(range(how.epochs), unit="epoch", disable=not progress) as bar:
        for epoch in bar:
            model.train()
            total = 0.0
            for rows in torch.split(torch.randperm(len(x)), how.batch_size):
                outputs = model(x[rows])
                loss = loss_of(outputs, y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
                optimizer.step()
                if loss_of is not validation_loss_of:
                    loss = validation_loss_of(outputs.detach(), y[rows])
                total += loss.item() * len(rows)
            if how.schedule == "cosine":
                schedule.step()
            validation_loss = eval_loss(model, validation_loss_of, x_val, y_val)
            losses.append((total / len(x), validation_loss))
            bar.set_postfix(train=f"{losses[-1][0]:.4f}", validation=f"{validation_loss:.4f}")
            if not np.isfinite(losses[-1]).all():
                raise ValueError(
                    f"the loss is {losses[-1]} in epoch {epoch + 1}: training diverged"
                )
            if how.patience is None:
                continue
            if validation_loss < best_loss:
                best_loss, best_epoch = validation_loss, epoch
                best_weights = copy.deepcopy(model.state_dict())
            elif epoch - best_epoch >= how.patience:
                break
    if how.patience is not None:
        model.load_state_dict(best_weights)
    model.eval()
    return losses


@torch.no_grad()
def eval_loss(model: nn.Module, loss_of: Loss, x: Tensor, y: Tensor) -> float:
    """Return the mean loss of eval mode on ``x [B, ...]``."""
    model.eval()
    total = 0.0
    for rows in torch.split(torch.arange(len(x)), evaluation.ROW_PASSES_AT_ONCE):
        total += loss_of(model(x[rows]), y[rows]).item() * len(rows)
    return total / len(x)


def gaussian_nll(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of ``y [B, C]``, up to a constant.

    ``outputs [B, 2C]`` are values, then the logarithms of their noise's standard deviations: Nix
    and Weigend (1994), eq. 4; Kendall and Gal (2017), eq. 5.
    """
    return gaussian_nlls(outputs, y).mean()


def attenuated_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Return ``gaussian_nll`` with the term of each value weighted by its noise's std.

    The weights make training fit the values of noisy rows too: Seitzer et al. (2022), On the
    Pitfalls of Heteroscedastic Uncertainty Estimation with Probabilistic Neural Networks, eq. 9,
    beta = 1/2.
    """
    weight = outputs.chunk(2, dim=1)[1].detach().exp()
    return (weight * gaussian_nlls(outputs, y)).mean()


def gaussian_nlls(outputs: Tensor, y: Tensor) -> Tensor:
    """Return ``log std + (y - value)^2 / (2 std^2)``, ``[B, C]``."""
    values, log_std = outputs.chunk(2, dim=1)
    return log_std + 0.5 * ((y - values) * torch.exp(-log_std)) ** 2


def observation_noise(
    model: Model, part: Dataset
) -> tuple[evaluation.Floats, evaluation.Floats] | tuple[None, None]:
    """Fit the noise std ``[C]`` around the passes, and that around eval mode, on ``part``.

    If the network predicts the noise itself, fit a correcting factor for each target, fold it into
    the network, and return None, None; so also for a classification.
    """
    if part.task == "classification":
        return None, None
    x, y = torch.from_numpy(part.x), part.y.astype(np.float64)
    samples = evaluation.mc_outputs(model, x, evaluation.PASSES, seed=0)
    if model.log_scale is not None:
        values, std = evaluation.values_and_noise(samples, part, None)
        model.log_scale.add_(torch.from_numpy(np.log(evaluation.fit_noise(values, y, std))))
        return None, None
    point = evaluation.eval_outputs(model, x)
    return evaluation.fit_noise(samples, y), evaluation.fit_noise(point[None], y)
