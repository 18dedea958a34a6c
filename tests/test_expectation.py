"""The expectation gap: its unit, and the two floors of the standard error."""

import numpy as np
import pytest

from dropserve.expectation import TINY, expectation_gap


def gap(mean: float, standard_error: float, deterministic: float) -> float:
    arrays = (np.array([[value]]) for value in (mean, standard_error, deterministic))
    return float(expectation_gap(*arrays).item())


def test_the_gap_counts_standard_errors_and_has_a_sign() -> None:
    assert gap(2.5, 0.25, 2.0) == 2.0
    assert gap(1.5, 0.25, 2.0) == -2.0


def test_a_standard_error_below_rounding_counts_as_rounding() -> None:
    assert gap(-2.0 - 4e-5, 1e-12, -2.0) == pytest.approx(-2.0)


def test_outputs_that_are_zero_throughout_have_no_gap() -> None:
    assert gap(0.0, 0.0, 0.0) == 0.0
    assert gap(TINY, 0.0, 0.0) == 1.0


def test_the_gap_of_a_single_pass_is_unknown() -> None:
    assert np.isnan(gap(1.0, float("nan"), 1.0))
