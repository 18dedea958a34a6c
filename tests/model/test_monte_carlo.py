"""Train-mode passes in torch, and their metrics beside those of eval mode."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import nn

from dropserve.model import evaluation
from dropserve.model.datasets import Dataset
from dropserve.model.dropout import CustomDropout
from dropserve.model.evaluation import (
    class_probabilities,
    classification_metrics,
    eval_outputs,
    mc_outputs,
    regression_metrics,
)

MASKS: tuple[evaluation.Masks, ...] = ("independent", "hypercube")


def network(p: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(CustomDropout(p, "classic"), nn.Linear(4, 2))


def normal(rows: int) -> torch.Tensor:
    return torch.randn((rows, 4), generator=torch.Generator().manual_seed(0))


def test_the_seed_alone_decides_the_passes() -> None:
    model, x = network(0.5), normal(5)
    torch.manual_seed(1)
    first = mc_outputs(model, x, 20, seed=7)
    torch.manual_seed(2)
    assert np.array_equal(mc_outputs(model, x, 20, seed=7), first)
    assert not np.array_equal(mc_outputs(model, x, 20, seed=8), first)
    assert first.shape == (20, 5, 2)


def test_the_passes_leave_torchs_generator_and_the_models_modes_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), network(0.5))
    model.train()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    mc_outputs(model, normal(5), 20, seed=7)
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_passes_of_a_row_stay_with_their_row() -> None:
    # Without dropout a pass equals eval mode. More rows than one forward call takes.
    model, x = network(0.0), normal(3 * evaluation.ROW_PASSES_AT_ONCE // 100)
    samples = mc_outputs(model, x, 100, seed=0)
    np.testing.assert_allclose(
        samples, np.broadcast_to(eval_outputs(model, x), samples.shape), rtol=1e-5, atol=1e-6
    )


def test_rows_and_passes_draw_masks_of_their_own() -> None:
    samples = mc_outputs(network(0.5), torch.ones(1, 4).repeat(30, 1), 30, seed=0)
    # Four units have 16 masks: 900 draws meet all of them, 30 passes of one row many.
    assert len(np.unique(samples.reshape(900, 2).round(5), axis=0)) == 16
    assert len(np.unique(samples[:, 0].round(5), axis=0)) > 4
    assert len(np.unique(samples[0].round(5), axis=0)) > 4


def test_the_mean_of_the_passes_of_a_linear_network_is_eval_mode() -> None:
    model, x, passes = network(0.5), normal(5), 20_000
    samples = mc_outputs(model, x, passes, seed=0)
    four_standard_errors = 4 * samples.std(axis=0) / math.sqrt(passes)
    assert (np.abs(samples.mean(axis=0) - eval_outputs(model, x)) < four_standard_errors).all()


def test_the_mean_of_a_hypercube_varies_less_than_that_of_independent_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 32), nn.ReLU(), CustomDropout(0.5, "classic"), nn.Linear(32, 2)
    )
    x = normal(3)

    def means(masks: evaluation.Masks) -> NDArray[np.float64]:
        return np.array([mc_outputs(model, x, 20, seed, masks).mean(axis=0) for seed in range(200)])

    independent, hypercube = means("independent"), means("hypercube")
    # Behind a single site the output is a sum over units, each of which 10 of 20 passes keep.
    np.testing.assert_allclose(hypercube.std(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(
        hypercube.mean(axis=0), np.broadcast_to(eval_outputs(model, x), (3, 2)), atol=1e-6
    )
    assert (independent.std(axis=0) > 0.01).all()


def test_a_hypercube_of_a_deeper_network_has_the_same_mean_with_less_variance() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(4 if i == 0 else 32, 32), nn.ReLU(), CustomDropout(0.5, "classic"))
        for i in range(2)
    ]
    model, x, repeats = nn.Sequential(*layers, nn.Linear(32, 2)), normal(3), 400
    means = {
        masks: np.array(
            [mc_outputs(model, x, 20, seed, masks).mean(axis=0) for seed in range(repeats)]
        )
        for masks in MASKS
    }
    independent, hypercube = means["independent"], means["hypercube"]
    # The standard deviation of 400 draws has a relative standard error of 1 / sqrt(800).
    assert (hypercube.std(axis=0) < 0.8 * independent.std(axis=0)).all()
    four_standard_errors = 4 * independent.std(axis=0) * np.sqrt(2 / repeats)
    gap = np.abs(hypercube.mean(axis=0) - independent.mean(axis=0))
    assert (gap < four_standard_errors).all()


def test_the_passes_of_a_hypercube_stay_with_their_row_and_their_seed() -> None:
    # More rows than one forward call takes.
    model, x = network(0.5), normal(3 * evaluation.ROW_PASSES_AT_ONCE // 100)
    first = mc_outputs(model, x, 100, 7, "hypercube")
    assert np.array_equal(mc_outputs(model, x, 100, 7, "hypercube"), first)
    np.testing.assert_allclose(first.mean(axis=0), eval_outputs(model, x), rtol=1e-4, atol=1e-5)


def test_each_mode_of_a_regression_is_evaluated_with_its_own_noise() -> None:
    x = normal(40)
    model = network(0.5)
    y = eval_outputs(model, x) + 1.0
    part = Dataset("toy", "regression", x.numpy(), y.astype(np.float32), ("a",) * 4, ("u", "v"))
    mc_noise, eval_noise = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    metrics = evaluation.evaluate(model, part, mc_noise, eval_noise)
    assert metrics["eval"] == pytest.approx(
        {
            "rmse": 1.0,
            "mae": 1.0,
            "log_likelihood": norm.logpdf(1, scale=3) + norm.logpdf(1, scale=4),
        },
        rel=1e-5,
    )
    samples = mc_outputs(model, x, evaluation.PASSES, seed=0)
    expected = regression_metrics(samples, part.y.astype(np.float64), mc_noise)
    assert metrics["mc"] == pytest.approx(expected)


def test_classes_have_the_same_metrics_in_both_modes() -> None:
    model, x = network(0.5), normal(40)
    y = np.arange(40) % 2
    part = Dataset("toy", "classification", x.numpy(), y, ("a",) * 4, ("u", "v"))
    metrics = evaluation.evaluate(model, part, None, None)
    point, samples = eval_outputs(model, x), mc_outputs(model, x, evaluation.PASSES, seed=0)
    assert metrics == {
        "eval": classification_metrics(class_probabilities(point), y),
        "mc": classification_metrics(class_probabilities(samples), y),
    }
