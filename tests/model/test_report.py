"""The report: every prediction method with its metrics, printed and drawn."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dropserve.model import checkpoint, plots
from dropserve.model.bootstrap import Estimate
from dropserve.model.datasets import Dataset, split
from dropserve.model.evaluation import (
    class_probabilities,
    classification_metrics,
    eval_outputs,
    mc_outputs,
    regression_metrics,
)
from dropserve.model.networks import Model
from dropserve.model.report import Report, report, table_lines, verdict
from dropserve.model.training import TrainingConfig, train
from tests.model.toys import config, two_classes, two_targets

METHODS = [
    "eval mode",
    *(f"{passes} {masks}" for masks in ("passes", "hypercube") for passes in (10, 30, 100)),
]
NOISE, EVAL_NOISE = np.array([0.5, 0.7]), np.array([0.6, 0.8])


@cache
def of_classes() -> tuple[Model, Dataset, Report]:
    parts = split(two_classes(400), 0)
    trained = train(config(parts.train, p=0.5), parts, TrainingConfig(epochs=3), progress=False)
    return trained.model, parts.test, report(trained.model, parts.test, None, None)


@cache
def of_values() -> tuple[Model, Dataset, Report]:
    parts = split(two_targets(400), 0)
    trained = train(config(parts.train, p=0.5), parts, TrainingConfig(epochs=3), progress=False)
    return trained.model, parts.test, report(trained.model, parts.test, NOISE, EVAL_NOISE)


def test_eval_mode_stands_beside_independent_passes_and_hypercubes() -> None:
    model, test, found = of_classes()
    x, y = torch.from_numpy(test.x), test.y.astype(np.int64)
    assert list(found.answers) == METHODS
    samples = mc_outputs(model, x, 100, seed=0)
    outputs = {
        "eval mode": eval_outputs(model, x),
        "10 passes": samples[:10],
        "100 passes": samples,
        "30 hypercube": mc_outputs(model, x, 30, 0, "hypercube"),
    }
    for method, logits in outputs.items():
        expected = classification_metrics(class_probabilities(logits), y)
        values = {name: e.value for name, e in found.answers[method].metrics.items()}
        assert values == pytest.approx(expected)
        for name in ("accuracy", "nll", "brier"):
            estimate = found.answers[method].metrics[name]
            assert estimate.lower <= estimate.value <= estimate.upper


def test_the_nll_of_the_passes_is_compared_with_that_of_eval_mode() -> None:
    _, _, found = of_classes()
    nll = [found.answers[method].metrics["nll"] for method in ("100 passes", "eval mode")]
    assert found.nll_difference.value == pytest.approx(nll[0].value - nll[1].value)
    # The difference is paired: rows that are hard for one are hard for the other.
    d = found.nll_difference
    assert d.upper - d.lower < nll[1].upper - nll[1].lower


def test_each_method_has_the_uncertainties_that_it_can_have() -> None:
    _, _, found = of_classes()
    both = ["max_probability", "predictive_entropy"]
    passes = ["expected_entropy", "mutual_information", "variation_ratio"]
    for method, answer in found.answers.items():
        assert list(answer.auroc) == ["noisy", "shuffled", "stretched"]
        for aurocs in answer.auroc.values():
            assert list(aurocs) == (both if method == "eval mode" else both + passes)
            assert all(0 <= auroc <= 1 for auroc in aurocs.values())


def test_the_risk_ends_at_that_of_all_rows() -> None:
    for _, _, found in (of_classes(), of_values()):
        for answer in found.answers.values():
            assert answer.risk.x[-1] == 1.0
            whole = (
                1 - answer.metrics["accuracy"].value
                if found.task == "classification"
                else answer.metrics["rmse"].value ** 2
            )
            assert answer.risk.y[-1] == pytest.approx(whole)


def test_each_method_of_a_regression_is_evaluated_with_its_own_noise() -> None:
    model, test, found = of_values()
    x, y = torch.from_numpy(test.x), test.y.astype(np.float64)
    for method, samples, noise in (
        ("eval mode", eval_outputs(model, x)[None], EVAL_NOISE),
        ("100 passes", mc_outputs(model, x, 100, seed=0), NOISE),
    ):
        values = {name: e.value for name, e in found.answers[method].metrics.items()}
        assert 0 <= values.pop("coverage_90") <= 1
        assert values == pytest.approx(regression_metrics(samples, y, noise))
    # Eval mode is equally certain of every row.
    assert found.answers["eval mode"].auroc["stretched"] == {"total_std": 0.5}
    assert found.answers["100 passes"].auroc["stretched"]["epistemic_std"] > 0.8


def test_the_intervals_of_a_true_model_have_their_nominal_coverage() -> None:
    model, test, _ = of_values()
    many = replace(test, x=np.tile(test.x, (60, 1)))
    point = eval_outputs(model, torch.from_numpy(many.x))
    noise = np.random.default_rng(0).normal(size=point.shape) * EVAL_NOISE
    found = report(model, replace(many, y=(point + noise).astype(np.float32)), NOISE, EVAL_NOISE)
    curve = found.answers["eval mode"].calibration
    np.testing.assert_allclose(curve.y, curve.x, atol=4 * 0.5 / np.sqrt(2 * len(many)))


@pytest.mark.parametrize("made", [of_classes, of_values])
def test_a_report_is_json_and_a_page(
    made: Callable[[], tuple[Model, Dataset, Report]], tmp_path: Path
) -> None:
    _, _, found = made()
    document = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert list(document["answers"]) == METHODS
    for losses in (None, [(1.0, 2.0), (0.5, 1.0)]):
        plots.write_page(found, tmp_path / "page.png", losses)
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_hold_a_line_for_each_method_and_each_uncertainty() -> None:
    _, _, found = of_classes()
    printed = list(table_lines(found))
    metrics = found.answers["eval mode"].metrics
    nll = f"{metrics['nll'].value:.3g} [{metrics['nll'].lower:.3g}, {metrics['nll'].upper:.3g}]"
    assert nll in next(line for line in printed if line.startswith("eval mode"))
    assert [line[:14].strip() for line in printed[1:8]] == METHODS
    (line,) = [line for line in printed if line.startswith("noisy       mutual_information")]
    first, *rest = line.split()[2:]
    assert first == "-"
    assert float(rest[2]) == pytest.approx(
        found.answers["100 passes"].auroc["noisy"]["mutual_information"], abs=5e-4
    )


@pytest.mark.parametrize(
    ("lower", "upper", "said"),
    [
        (-0.2, -0.1, "the passes are better"),
        (0.1, 0.2, "the passes are worse"),
        (-0.1, 0.2, "these 60 rows show no difference"),
    ],
)
def test_the_verdict_follows_the_interval(lower: float, upper: float, said: str) -> None:
    _, _, found = of_classes()
    judged = replace(found, nll_difference=Estimate((lower + upper) / 2, lower, upper))
    assert verdict(judged).endswith(said)


def test_the_passes_are_no_worse_than_eval_mode_on_digits_by_more_than_their_interval(
    built: Path,
) -> None:
    run = checkpoint.load(built / "runs" / "digits")
    difference = report(run.model, run.holdout, None, None).nll_difference
    assert difference.lower <= 0


def test_a_handful_of_rows_can_be_reported_on() -> None:
    model, test, _ = of_classes()
    found = report(model, test.take(np.arange(1)), None, None)
    assert found.rows == 1
    assert list(found.answers) == METHODS
