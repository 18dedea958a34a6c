"""The head that predicts the noise: learned, in the targets' unit, saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dropserve.model import checkpoint, datasets, evaluation, training
from dropserve.model.datasets import Dataset
from dropserve.model.networks import LOG_STD_LIMIT, Model, NetworkConfig, Noise
from dropserve.model.training import Trained, TrainingConfig
from tests.model import toys

EPOCHS = 60


def train(dataset: Dataset, noise: Noise) -> Trained:
    network = NetworkConfig(
        "mlp", dataset.x.shape[1:], len(dataset.outputs), (64, 64), 0.05, "classic", noise=noise
    )
    parts = datasets.split(dataset, 0)
    return training.train(network, parts, TrainingConfig(epochs=EPOCHS), progress=False)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(toys.noisy_targets(2000), "input")


def outputs(trained: Trained, x: np.ndarray) -> np.ndarray:
    return evaluation.eval_outputs(trained.model, torch.from_numpy(x))


def test_the_noise_is_learned_where_it_is_large_and_where_it_is_small(trained: Trained) -> None:
    x = np.linspace(-1.8, 1.8, 13, dtype=np.float32)[:, None]
    found = np.exp(outputs(trained, x)[:, 2])
    # The scatter of the passes explains some of the residuals, so allow a factor of 2.5 of 10.
    ratio = found / toys.noisy_targets_std(x)[:, 0]
    assert (np.abs(np.log(ratio)) < np.log(2.5)).all()
    assert stats.spearmanr(found, x[:, 0]).statistic > 0.9


def test_it_gives_held_out_rows_a_larger_likelihood_than_a_constant_noise(trained: Trained) -> None:
    dataset = toys.noisy_targets(2000)
    constant = train(dataset, "constant")
    assert constant.noise_std is not None
    assert trained.noise_std is None
    gain = trained.metrics["mc"]["log_likelihood"] - constant.metrics["mc"]["log_likelihood"]
    assert gain > 0.1


def test_values_and_noise_come_in_the_targets_unit() -> None:
    dataset = toys.noisy_targets(400)
    # A power of two, so that training on standardised targets takes exactly the same steps.
    large = Dataset(
        "toy", "regression", dataset.x, dataset.y * 1024, dataset.features, dataset.outputs
    )
    small_outputs, large_outputs = (
        outputs(train(each, "input"), dataset.x[:50]) for each in (dataset, large)
    )
    np.testing.assert_allclose(large_outputs[:, :2], small_outputs[:, :2] * 1024, rtol=1e-3)
    np.testing.assert_allclose(
        large_outputs[:, 2:], small_outputs[:, 2:] + np.log(1024), rtol=0, atol=1e-2
    )


def test_the_factor_that_corrects_the_noise_is_fitted_on_the_validation_split(
    trained: Trained,
) -> None:
    part = datasets.split(toys.noisy_targets(2000), 0).validation
    samples = evaluation.mc_outputs(trained.model, torch.from_numpy(part.x), 100, seed=0)
    values, noise = evaluation.values_and_noise(samples, part, None)
    likelihoods = [
        evaluation.log_likelihood(values, part.y.astype(float), noise * factor).mean()
        for factor in (0.97, 1, 1.03)
    ]
    assert likelihoods[1] == max(likelihoods)


def test_no_row_has_a_noise_beyond_the_limit(trained: Trained) -> None:
    far = np.array([[-1e6], [1e6]], np.float32)
    log_scale = trained.model.log_scale
    assert log_scale is not None
    log_std = outputs(trained, far)[:, 2:] - log_scale.numpy()
    assert (np.abs(log_std) <= LOG_STD_LIMIT + 1e-4).all()


def test_a_checkpoint_keeps_the_head(trained: Trained, tmp_path: Path) -> None:
    dataset = toys.noisy_targets(2000)
    network = NetworkConfig("mlp", (1,), 2, (64, 64), 0.05, "classic", noise="input")
    saved = checkpoint.Checkpoint(
        model=trained.model,
        config=network,
        holdout=datasets.split(dataset, 0).test,
        feature_ranges=((-2.0, 2.0),),
        input_range=(-2.0, 2.0),
        noise_std=trained.noise_std,
        metrics=trained.metrics,
        seed=0,
        packages={},
    )
    checkpoint.save(saved, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == network
    x = torch.from_numpy(dataset.x[:20])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), trained.model(x))
    assert isinstance(loaded.model, Model)


def test_classes_have_no_noise() -> None:
    dataset = toys.two_classes()
    with pytest.raises(ValueError, match="noise is that of values; this is a classification"):
        train(dataset, "input")


def test_a_fitted_factor_is_the_scale_of_the_residuals() -> None:
    """For a single pass without bias it is the root mean square of the relative residuals."""
    rng = np.random.default_rng(0)
    shape = rng.uniform(0.5, 2, (1, 400, 2))
    y = shape[0] * rng.normal(0, [3.0, 0.1], (400, 2))
    found = evaluation.fit_noise(np.zeros((1, 400, 2)), y, shape)
    np.testing.assert_allclose(found, np.sqrt(np.mean((y / shape[0]) ** 2, axis=0)), rtol=1e-3)
