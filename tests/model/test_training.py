"""Training: reproducible by seed, early stopping with the best weights, units of the targets."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dropserve.model import datasets
from dropserve.model.datasets import Dataset, Split, split
from dropserve.model.networks import NETWORKS, NetworkName
from dropserve.model.training import Schedule, Trained, TrainingConfig, train
from tests.model.toys import config, two_classes, two_targets


def fit(dataset: Dataset, epochs: int = 3, seed: int = 0, batch_size: int = 32) -> Trained:
    how = TrainingConfig(epochs, batch_size, seed)
    return train(config(dataset), split(dataset, 0), how, progress=False)


@cache
def some_digits() -> Split:
    digits = datasets.load("digits")
    return split(digits.take(np.arange(500)), 0)


def same_weights(one: Trained, other: Trained) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dataset", [two_classes(), two_targets()], ids=["classes", "values"])
def test_the_seed_alone_decides_weights_metrics_and_curves(dataset: Dataset) -> None:
    torch.manual_seed(1)
    first = fit(dataset)
    torch.manual_seed(2)
    again = fit(dataset)
    assert same_weights(first, again)
    assert (first.metrics, first.losses, first.noise_std) == (
        again.metrics,
        again.losses,
        again.noise_std,
    )
    assert not same_weights(fit(dataset, seed=1), first)


def test_torchs_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit(two_classes())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_digits_are_learned(network: NetworkName) -> None:
    parts = some_digits()
    shape = config(parts.train, network, p=0.2, hidden=(64,))
    trained = train(shape, parts, TrainingConfig(epochs=20), progress=False)
    # Chance is 0.1; some 0.9 is normal with a sixth of the default number of rows.
    assert trained.metrics["eval"]["accuracy"] > 0.7
    assert trained.metrics["mc"]["accuracy"] > 0.7
    assert trained.noise_std is None


def test_values_are_learned_with_their_noise() -> None:
    dataset = two_targets(rows=600)
    trained = fit(dataset, epochs=100)
    # The targets are linear with a noise of 0.1; predicting their mean gives an RMSE of about 2.7.
    assert trained.metrics["eval"]["rmse"] < 0.7
    assert trained.noise_std is not None
    assert len(trained.noise_std) == 2
    assert all(0.05 < std < 0.7 for std in trained.noise_std)


def test_training_stops_when_patience_runs_out_and_keeps_the_best_weights() -> None:
    # Random classes, so that overfitting makes the validation loss worse.
    dataset = two_classes(rows=80)
    labels = np.random.default_rng(5).integers(2, size=80)
    parts = split(replace(dataset, y=labels), 0)
    trained = train(
        config(dataset, p=0.0, hidden=(128,)), parts, TrainingConfig(epochs=2000), progress=False
    )
    validation = [loss for _, loss in trained.losses]
    assert len(validation) < 2000
    assert TrainingConfig.patience == 25
    assert len(validation) == 1 + int(np.argmin(validation)) + 25
    assert validation[-1] > min(validation)
    with torch.no_grad():
        logits = trained.model(torch.from_numpy(parts.validation.x))
    loss = functional.cross_entropy(logits, torch.from_numpy(parts.validation.y)).item()
    assert loss == pytest.approx(min(validation), rel=1e-5)


def test_without_patience_all_epochs_are_trained_and_the_last_weights_kept() -> None:
    dataset = two_classes(rows=80)
    labels = np.random.default_rng(5).integers(2, size=80)
    parts = split(replace(dataset, y=labels), 0)
    how = TrainingConfig(epochs=150, patience=None)
    trained = train(config(dataset, p=0.0, hidden=(128,)), parts, how, progress=False)
    validation = [loss for _, loss in trained.losses]
    assert len(validation) == 150
    assert validation[-1] > min(validation)
    with torch.no_grad():
        logits = trained.model(torch.from_numpy(parts.validation.x))
    loss = functional.cross_entropy(logits, torch.from_numpy(parts.validation.y)).item()
    assert loss == pytest.approx(validation[-1], rel=1e-5)


def test_a_constant_learning_rate_still_learns_where_the_cosine_has_ended() -> None:
    dataset = two_targets()

    def last_change(schedule: Schedule) -> float:
        how = TrainingConfig(epochs=30, schedule=schedule, patience=None)
        trained = train(config(dataset, p=0.0), split(dataset, 0), how, progress=False)
        return abs(trained.losses[-1][1] - trained.losses[-2][1])

    assert last_change("cosine") < last_change("constant") / 10


def test_weights_move_as_fast_as_the_learning_rate_says() -> None:
    dataset = two_classes()

    def after(learning_rate: float) -> torch.Tensor:
        # The first step of Adam is as long as the learning rate, whatever the gradient.
        how = TrainingConfig(1, len(dataset), learning_rate=learning_rate, weight_decay=0.0)
        trained = train(config(dataset), split(dataset, 0), how, progress=False)
        return trained.model.network.output.bias

    for rate in (1e-4, 1e-2):
        torch.testing.assert_close((after(rate) - after(0.0)).abs(), torch.full((2,), rate))


def test_weight_decay_makes_weights_smaller() -> None:
    dataset = two_classes()

    def size(weight_decay: float) -> float:
        how = TrainingConfig(epochs=20, weight_decay=weight_decay, patience=None)
        trained = train(config(dataset), split(dataset, 0), how, progress=False)
        return sum(float((p**2).sum()) for p in trained.model.state_dict().values())

    assert size(10.0) < size(0.0) / 2


@pytest.mark.parametrize("network", NETWORKS)
def test_the_best_weights_of_a_regression_answer_in_target_units(network: NetworkName) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(120, 4, 4)).astype(np.float32)
    y = (images.mean(axis=(1, 2))[:, None] * [1.0, -50.0] + [0.0, 1000.0]).astype(np.float32)
    parts = split(Dataset("toy", "regression", images, y, (), ("u", "v")), 0)
    how = TrainingConfig(epochs=8, batch_size=32)
    trained = train(config(parts.train, network), parts, how, progress=False)

    def answers(part: Dataset) -> NDArray[np.float64]:
        with torch.no_grad():
            return np.asarray(trained.model(torch.from_numpy(part.x)), dtype=np.float64)

    # The loss is that of targets standardised by the training part.
    error = (answers(parts.validation) - parts.validation.y) / parts.train.y.std(axis=0)
    assert (error**2).mean() == pytest.approx(min(loss for _, loss in trained.losses), rel=1e-3)
    rmse = np.sqrt(((answers(parts.test) - parts.test.y) ** 2).mean())
    assert trained.metrics["eval"]["rmse"] == pytest.approx(rmse, rel=1e-5)


def test_targets_in_other_units_give_the_same_errors_in_those_units() -> None:
    dataset = two_targets()
    # A power of two changes no digit of a float.
    larger = replace(dataset, y=dataset.y * np.float32(1024))
    small, large = fit(dataset), fit(larger)
    assert small.losses == large.losses
    for mode in ("eval", "mc"):
        for metric in ("rmse", "mae"):
            expected = small.metrics[mode][metric] * 1024
            assert large.metrics[mode][metric] == pytest.approx(expected, rel=1e-6)
    assert small.noise_std is not None
    # The search for the noise stops within 1e-5 in its logarithm.
    assert large.noise_std == pytest.approx([std * 1024 for std in small.noise_std], rel=1e-4)


def test_the_curves_hold_a_pair_of_losses_for_each_epoch() -> None:
    trained = fit(two_classes(), epochs=4)
    assert len(trained.losses) == 4
    assert np.isfinite(trained.losses).all()
    assert not trained.model.training


def test_a_constant_target_is_learned() -> None:
    dataset = two_targets()
    constant = np.full_like(dataset.y, 7.0)
    trained = fit(replace(dataset, y=constant), epochs=40)
    assert trained.metrics["eval"]["rmse"] < 1.0


@pytest.mark.parametrize("batch_size", [1, 27, 1000])
def test_any_batch_size_works(batch_size: int) -> None:
    # 28 rows to train on: with 27, the last batch is a single row, which batch norm must handle.
    images = np.random.default_rng(0).normal(size=(40, 4, 4)).astype(np.float32)
    parts = split(Dataset("toy", "classification", images, np.arange(40) % 2, (), ("n", "y")), 0)
    how = TrainingConfig(epochs=1, batch_size=batch_size)
    trained = train(config(parts.train, "convnet"), parts, how, progress=False)
    assert np.isfinite(trained.losses).all()


def test_a_loss_that_becomes_infinite_or_nan_is_an_error() -> None:
    dataset = two_classes()
    beyond = replace(dataset, x=np.full_like(dataset.x, 3e38))
    with pytest.raises(ValueError, match="training diverged"):
        fit(beyond)


def test_a_network_that_does_not_fit_the_data_is_an_error() -> None:
    dataset = two_classes()
    with pytest.raises(ValueError, match="convnet needs images"):
        train(config(dataset, "convnet"), split(dataset, 0), TrainingConfig(1), progress=False)
