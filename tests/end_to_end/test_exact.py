"""The service's statistics of networks so small that every mask can be tried, and the exact ones.

Each statistic of T passes scatters about the exact one with a standard error that follows from the
masks, too, all 2^12 or 2^14 of them. Some 300 numbers are held to 5 standard errors: a chance of 1
in 5,000 that any fails.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dropserve.app.bundles import loader
from dropserve.app.uncertainty.masks import KINDS, Kind
from dropserve.export import bundle
from tests import enumerated
from tests.conftest import service
from tests.enumerated import Exact

Floats = NDArray[np.float64]

PASSES = 8000
# Rounding errors of a float32 answer, and of a float32 network.
ROUNDING = 1e-6
CLASSES = [name for name in enumerated.NAMES if name.startswith("classes")]
VALUES = [name for name in enumerated.NAMES if name.startswith("values")]


@pytest.fixture(scope="module")
def asked(tiny: Path) -> Iterator[Callable[..., Any]]:
    with service(tiny / "models") as client:

        def ask(name: str, known: Exact, **body: object) -> Any:
            return answer(client, name, known, **body)

        yield ask


def answer(client: httpx.Client, name: str, known: Exact, **body: object) -> Any:
    inputs = known.x.tolist()
    found = client.post("/uncertainty", json={"inputs": inputs, "model": name, "seed": 1} | body)
    assert found.status_code == 200, found.text
    return found.json()


@cache
def exact(tiny: Path, name: str) -> tuple[Exact, bundle.Manifest]:
    manifest = loader.read_manifest(tiny / "models" / name / "1")
    return enumerated.exact(name, tiny, manifest), manifest


def close(found: object, known: Floats, error: Floats, scale: float = 1.0) -> None:
    """Hold a statistic to 5 of its standard errors."""
    assert (np.abs(np.asarray(found) - known) <= 5 * error + ROUNDING * scale).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", enumerated.NAMES)
def test_mean_and_std_are_the_exact_ones_within_the_stated_standard_error(
    asked: Callable[..., Any], tiny: Path, name: str, kind: Kind
) -> None:
    known, _ = exact(tiny, name)
    found = asked(name, known, passes=PASSES, masks=kind)
    scale = float(np.abs(known.outputs).max())
    # The stated standard error is itself off by far less than a tenth, of T passes or R replicates.
    close(found["mean"], known.mean, 1.1 * np.array(found["standard_error"]), scale)
    exact_error = np.sqrt(known.variance / PASSES)
    if kind == "independent":
        np.testing.assert_allclose(found["standard_error"], exact_error, rtol=0.1)
    else:
        assert (np.array(found["standard_error"]) < exact_error).all()
    fourth = known.average((known.outputs - known.mean) ** 4)
    error_of_variance = np.sqrt((fourth - known.variance**2) / PASSES)
    close(np.square(found["std"]), known.variance, error_of_variance, scale**2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_entropies_and_votes_are_the_exact_ones(
    asked: Callable[..., Any], tiny: Path, name: str, kind: Kind
) -> None:
    known, _ = exact(tiny, name)
    found = asked(name, known, passes=PASSES, masks=kind)
    of_pass: Floats = np.asarray(stats.entropy(known.outputs, axis=2))  # [M, B]
    expected = known.average(of_pass)
    expected_error = np.sqrt(known.average((of_pass - expected) ** 2) / PASSES)
    close(found["expected_entropy"], expected, expected_error)
    predictive: Floats = np.asarray(stats.entropy(known.mean, axis=1))
    # To first order the entropy of the mean moves with -(log m + 1) times the mean.
    moved = ((known.outputs - known.mean) * -(np.log(known.mean) + 1)).sum(axis=2)
    predictive_error = np.sqrt(known.average(moved**2) / PASSES)
    close(found["predictive_entropy"], predictive, predictive_error)
    both = moved - (of_pass - expected)
    information_error = np.sqrt(known.average(both**2) / PASSES)
    # Of second order: the entropy of the mean of T passes is (C - 1) / 2T too low, at most.
    slack = known.mean.shape[1] / PASSES
    close(found["mutual_information"], predictive - expected, information_error, slack / ROUNDING)
    votes = known.average(np.eye(known.mean.shape[1])[known.outputs.argmax(axis=2)])
    vote_error = np.sqrt(votes.max(axis=1) * (1 - votes.max(axis=1)) / PASSES)
    close(found["variation_ratio"], 1 - votes.max(axis=1), vote_error)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_interval_holds_as_many_of_all_passes_as_it_says(
    asked: Callable[..., Any], tiny: Path, name: str, kind: Kind, level: float
) -> None:
    known, _ = exact(tiny, name)
    interval = asked(name, known, passes=PASSES, masks=kind, interval=level)["interval"]
    share = (1 - level) / 2
    error = 5 * np.sqrt(share * (1 - share) / PASSES)
    lower, upper = (np.array(interval[end]) for end in ("lower", "upper"))
    # Many masks give the same answer, on which an end of the interval then lies: with these masks
    # the share beyond the end is larger than stated, without them smaller.
    for inside in (known.outputs - lower, upper - known.outputs):
        outside = known.average(np.where(inside < -ROUNDING, 1.0, 0.0))
        with_end = known.average(np.where(inside <= ROUNDING, 1.0, 0.0))
        assert (outside <= share + error).all()
        assert (with_end >= share - error).all()


@pytest.mark.parametrize("level", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VALUES)
def test_the_interval_of_values_holds_as_much_of_the_predictive_distribution_as_it_says(
    asked: Callable[..., Any], tiny: Path, name: str, kind: Kind, level: float
) -> None:
    known, manifest = exact(tiny, name)
    found = asked(name, known, passes=PASSES, masks=kind, interval=level)
    noise_std = np.array(manifest.noise_std)
    lower, upper = (np.array(found["interval"][end]) for end in ("lower", "upper"))
    below = stats.norm.cdf((lower - known.outputs) / noise_std)  # [M, B, C]
    above = stats.norm.sf((upper - known.outputs) / noise_std)
    for outside in (below, above):
        average = known.average(outside)
        error = np.sqrt(known.average((outside - average) ** 2) / PASSES)
        # An end is found within 1e-3 of the noise's standard deviation.
        close(average, np.full_like(average, (1 - level) / 2), error, 4e-4 / ROUNDING)
    close(found["aleatoric_std"], np.tile(noise_std, (len(lower), 1)), np.zeros_like(lower))
    close(np.square(found["total_std"]), np.square(found["std"]) + noise_std**2, 0 * lower, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tolerance_is_met_with_as_few_passes_as_it_takes(
    asked: Callable[..., Any], tiny: Path, kind: Kind
) -> None:
    known, _ = exact(tiny, "classes-two-classic")
    # Stratified masks leave less than a tenth of the variance.
    std = np.sqrt(known.variance.max() * (0.1 if kind == "stratified" else 1))
    passes = {}
    for title, wanted in (("loose", 300), ("tight", 3000)):
        tolerance = float(std / np.sqrt(wanted))
        ask = {"passes": 10_000, "tolerance": tolerance}
        found = asked("classes-two-classic", known, masks=kind, **ask)
        assert found["converged"] is True
        assert np.max(found["standard_error"]) <= tolerance
        passes[title] = found["passes"]
        # The same as a request for as many passes without a tolerance.
        same = asked("classes-two-classic", known, masks=kind, passes=passes[title])
        assert same == found | {"converged": None}
        # Half as many did not meet it.
        fewer = asked("classes-two-classic", known, masks=kind, passes=passes[title] // 2)
        assert np.max(fewer["standard_error"]) > tolerance
    assert 50 < passes["loose"] < passes["tight"] < 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_tolerance_out_of_reach_takes_all_passes_and_says_so(
    asked: Callable[..., Any], tiny: Path, kind: Kind
) -> None:
    known, _ = exact(tiny, "classes-two-classic")
    found = asked("classes-two-classic", known, masks=kind, passes=130, tolerance=1e-9)
    assert (found["passes"], found["converged"]) == (130, False)
    one = asked("classes-two-classic", known, masks=kind, passes=1, tolerance=1.0)
    assert (one["passes"], one["converged"], one["standard_error"]) == (1, False, None)


def test_stratified_masks_need_a_fraction_of_the_passes_for_a_tolerance(
    asked: Callable[..., Any], tiny: Path
) -> None:
    known, _ = exact(tiny, "classes-two-classic")
    ask = {"passes": 10_000, "tolerance": float(np.sqrt(known.variance.max() / 2000))}
    independent, stratified = (
        asked("classes-two-classic", known, masks=kind, **ask)["passes"] for kind in KINDS
    )
    assert 4 * stratified <= independent
