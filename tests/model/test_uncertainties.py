"""Uncertainties per row, compared with the service's and results by hand; AURC and AUROC."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from dropserve.app.uncertainty import statistics
from dropserve.model.uncertainties import auroc, of_classes, of_values, risk_coverage

reproducible = settings(derandomize=True, deadline=None, max_examples=50)


@reproducible
@given(st.integers(0, 2**32), st.integers(2, 12), st.integers(1, 9), st.integers(2, 5))
def test_the_uncertainties_of_classes_are_those_of_the_service(
    seed: int, passes: int, rows: int, classes: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(passes, rows, classes)) * 3
    probabilities = softmax(logits, axis=-1)
    ours = of_classes(probabilities)
    theirs = statistics.entropies(probabilities.astype(np.float32))
    for name, expected in vars(theirs).items():
        np.testing.assert_allclose(ours.pop(name), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        ours.pop("max_probability"), 1 - probabilities.mean(axis=0).max(axis=1)
    )
    assert not ours


def test_a_single_pass_has_no_epistemic_uncertainty() -> None:
    assert list(of_classes(np.full((1, 3, 2), 0.5))) == ["max_probability", "predictive_entropy"]
    assert list(of_values(np.zeros((1, 3, 2)), np.ones(2))) == ["total_std"]


def test_classes_of_probability_zero_have_finite_entropies() -> None:
    certain = np.array([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert {name: value.tolist() for name, value in of_classes(certain).items()} == {
        "max_probability": [0.0],
        "predictive_entropy": [0.0],
        "expected_entropy": [0.0],
        "mutual_information": [0.0],
        "variation_ratio": [0.0],
    }


def test_the_spread_of_values_is_that_computed_by_hand() -> None:
    samples = np.array([[[0.0, 1.0]], [[2.0, 1.0]]])  # variances 2 and 0
    found = of_values(samples, np.array([1.0, 3.0]))
    assert found["epistemic_std"] == pytest.approx([np.sqrt((2 + 0) / 2)])
    assert found["total_std"] == pytest.approx([np.sqrt((2 + 1 + 0 + 9) / 2)])


def test_the_most_certain_rows_come_first() -> None:
    loss, uncertainty = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.9, 0.1, 0.5, 0.4])
    assert risk_coverage(loss, uncertainty).tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])


def test_equally_uncertain_rows_count_with_their_mean_loss() -> None:
    loss = np.array([1.0, 0.0, 0.0, 0.0])
    assert risk_coverage(loss, np.ones(4)).tolist() == [0.25] * 4
    tied = risk_coverage(loss, np.array([2.0, 2.0, 1.0, 3.0]))
    assert tied.tolist() == pytest.approx([0, 0.25, 1 / 3, 1 / 4])


@reproducible
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_no_order_has_less_risk_than_that_of_the_losses(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    loss, uncertainty = rng.random(rows), rng.integers(5, size=rows).astype(np.float64)
    risk = risk_coverage(loss, uncertainty)
    assert risk[-1] == pytest.approx(loss.mean())
    assert risk_coverage(loss, loss).mean() <= risk.mean() + 1e-12
    assert risk.mean() <= risk_coverage(loss, -loss).mean() + 1e-12


def test_the_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    assert auroc(np.array([0.0, 2.0]), np.array([1.0, 3.0])) == 0.75
    assert auroc(np.array([0.0, 0.0]), np.array([0.0])) == 0.5
    assert auroc(np.array([1.0]), np.array([0.0])) == 0.0
