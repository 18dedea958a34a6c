"""The temperature: found in synthetic logits, moderate with few rows, folded into the network."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax

from dropserve.model.calibration import fit_temperature
from dropserve.model.datasets import split
from dropserve.model.evaluation import (
    class_probabilities,
    classification_metrics,
    eval_outputs,
    evaluate,
    mc_outputs,
)
from dropserve.model.training import TrainingConfig, train
from tests.model.toys import config, two_classes, two_targets

reproducible = settings(derandomize=True, deadline=None, max_examples=30)
Floats = NDArray[np.float64]


def nll(logits: Floats, y: NDArray[np.int64]) -> float:
    return classification_metrics(class_probabilities(logits), y)["nll"]


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_of_logits_that_are_off_by_a_factor_is_found(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 4)) * 2
    p = softmax(logits, axis=1)
    y = (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1)
    assert fit_temperature(y, logits * true) == pytest.approx(true, rel=0.05)


@reproducible
@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans())
def test_the_nll_of_the_fitted_rows_is_never_worse(seed: int, rows: int, of_passes: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, rows, 3) if of_passes else (rows, 3)) * rng.uniform(0, 20)
    y = rng.integers(3, size=rows)
    assert nll(logits / fit_temperature(y, logits), y) <= nll(logits, y)


def test_rows_without_errors_give_no_extreme_temperature() -> None:
    logits = np.tile([4.0, 0.0, 0.0], (30, 1))
    y = np.zeros(30, dtype=np.int64)
    assert 0.5 < fit_temperature(y, logits) < 1.0


def test_two_outputs_are_fitted_together() -> None:
    rng = np.random.default_rng(0)
    cold, hot = rng.normal(size=(2, 500, 3)) * [[[1.0]], [[9.0]]]
    y = rng.integers(3, size=500)
    apart = sorted(fit_temperature(y, logits) for logits in (cold, hot))
    assert apart[0] < fit_temperature(y, cold, hot) < apart[1]


def test_training_folds_the_temperature_into_the_last_layer() -> None:
    parts = split(two_classes(), 0)
    shape = config(parts.train, p=0.5)
    how = TrainingConfig(epochs=3, batch_size=32)
    plain = train(shape, parts, how, progress=False)
    calibrated = train(
        shape, parts, TrainingConfig(epochs=3, batch_size=32, calibrate=True), progress=False
    )
    assert plain.temperature is None
    t = calibrated.temperature
    assert t is not None
    assert t != 1.0
    x, y = torch.from_numpy(parts.validation.x), parts.validation.y.astype(np.int64)
    before, after = eval_outputs(plain.model, x), eval_outputs(calibrated.model, x)
    np.testing.assert_allclose(after, before / t, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.argmax(axis=1), before.argmax(axis=1))
    assert nll(after, y) <= nll(before, y)
    passes = (mc_outputs(trained.model, x, 10, 0) for trained in (calibrated, plain))
    np.testing.assert_allclose(next(passes), next(passes) / t, rtol=1e-5, atol=1e-6)
    # The metrics are those of the calibrated network.
    assert calibrated.metrics == evaluate(calibrated.model, parts.test, None, None)
    assert calibrated.losses == plain.losses


def test_values_have_no_temperature() -> None:
    parts = split(two_targets(), 0)
    with pytest.raises(ValueError, match="this is a regression"):
        train(config(parts.train), parts, TrainingConfig(calibrate=True), progress=False)
