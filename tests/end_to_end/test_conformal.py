"""Split-conformal sets and intervals hold the truth of fresh rows as often as requested."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dropserve.app.bundles import loader
from dropserve.app.uncertainty.masks import KINDS, Kind
from dropserve.model.training import TrainingConfig
from tests.bundles import publish, train_and_export
from tests.conftest import service
from tests.model import toys

TRAIN_ROWS, FRESH_ROWS = 2000, 2000
EPOCHS = 30


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service of a network of each task, whose data are noisy, and bundles without scores."""
    folder = tmp_path_factory.mktemp("noisy")
    for name, dataset in (
        ("classes", toys.noisy_classes(TRAIN_ROWS)),
        ("values", toys.noisy_targets(TRAIN_ROWS)),
    ):
        network = toys.config(dataset, hidden=(32, 32))
        train_and_export(dataset, network, TrainingConfig(epochs=EPOCHS), folder, name)
    models = folder / "models"
    publish(models / "classes" / "1", models / "older" / "1", conformal_scores=None)
    with service(models) as client:
        client.headers["x-test-models"] = str(models)
        yield client


def ask(client: httpx.Client, name: str, x: Any, **asked: object) -> Any:
    body = {"inputs": x.tolist(), "model": name, "seed": 1} | asked
    answer = client.post("/uncertainty", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def slack(client: httpx.Client, name: str, coverage: float) -> float:
    """Return three standard deviations of the share of fresh rows that is covered.

    Given n scores, it scatters as a beta variable does (Vovk 2012), and again with the fresh rows.
    """
    place = Path(client.headers["x-test-models"]) / name / "1"
    scores = loader.read_manifest(place).conformal_scores
    assert scores
    variance = coverage * (1 - coverage) * (1 / (len(scores[0]) + 2) + 1 / FRESH_ROWS)
    return 3 * float(np.sqrt(variance))


@pytest.mark.parametrize("coverage", [0.6, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_classes_holds_the_true_one_as_often_as_asked(
    noisy: httpx.Client, kind: Kind, coverage: float
) -> None:
    fresh = toys.noisy_classes(FRESH_ROWS, seed=1)
    answer = ask(noisy, "classes", fresh.x, coverage=coverage, masks=kind)
    sets = answer["prediction_set"]
    truths = [fresh.outputs[label] for label in fresh.y]
    held = np.mean([truth in labels for truth, labels in zip(truths, sets, strict=True)])
    assert held > coverage - slack(noisy, "classes", coverage)
    # The likeliest class is right two times of three and always in the set, so more may be covered.
    alone = np.mean([truth == label for truth, label in zip(truths, answer["labels"], strict=True)])
    assert held < max(coverage, alone) + slack(noisy, "classes", coverage)
    for labels, likeliest, mean in zip(sets, answer["labels"], answer["mean"], strict=True):
        # In the model's order; no class that is left out is likelier than one in the set.
        assert likeliest in labels
        places = [fresh.outputs.index(label) for label in labels]
        assert places == sorted(places)
        assert sorted(mean)[-len(labels)] == min(mean[place] for place in places)
    assert 1 < np.mean([len(labels) for labels in sets]) < 3 or coverage < 0.7


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_holds_the_true_value_of_each_target_as_often_as_asked(
    noisy: httpx.Client, kind: Kind, coverage: float
) -> None:
    fresh = toys.noisy_targets(FRESH_ROWS, seed=1)
    answer = ask(noisy, "values", fresh.x, coverage=coverage, masks=kind)
    interval = answer["prediction_interval"]
    assert interval["coverage"] == coverage
    held = (interval["lower"] <= fresh.y) & (fresh.y <= interval["upper"])
    for share in held.mean(axis=0):
        assert abs(share - coverage) < slack(noisy, "values", coverage)


def test_without_coverage_there_is_no_set_or_interval(noisy: httpx.Client) -> None:
    x = toys.noisy_classes(3).x
    assert "prediction_set" not in ask(noisy, "classes", x)
    assert "prediction_interval" not in ask(noisy, "values", x[:, :1])
    assert "prediction_interval" not in ask(noisy, "classes", x, coverage=0.9)


def test_a_set_grows_with_the_coverage(noisy: httpx.Client) -> None:
    x = toys.noisy_classes(200, seed=2).x
    small, large = (
        ask(noisy, "classes", x, coverage=coverage)["prediction_set"] for coverage in (0.7, 0.99)
    )
    assert all(set(few) <= set(many) for few, many in zip(small, large, strict=True))


@pytest.mark.parametrize(
    ("name", "coverage", "said"),
    [
        ("classes", 1.0, "coverage: Input should be less than 1"),
        ("classes", 0, "coverage: Input should be greater than 0"),
        (
            "classes",
            0.999,
            "coverage: may be at most 0.996677 here, as the bundle holds 300 scores",
        ),
        ("older", 0.9, "coverage: this version's bundle holds no scores; export it anew"),
    ],
)
def test_a_coverage_beyond_what_the_scores_can_promise_is_refused(
    noisy: httpx.Client, name: str, coverage: float, said: str
) -> None:
    body = {"inputs": [[0.5, 0.5]], "model": name, "coverage": coverage}
    answer = noisy.post("/uncertainty", json=body)
    assert (answer.status_code, answer.json()["detail"]) == (422, said)


def test_the_greatest_coverage_that_the_refusal_names_is_allowed(noisy: httpx.Client) -> None:
    body = {"inputs": [[0.5, 0.5]], "model": "classes", "coverage": 0.9999}
    said = noisy.post("/uncertainty", json=body).json()["detail"]
    found = re.search(r"at most (\S+) here", said)
    assert found
    ask(noisy, "classes", toys.noisy_classes(1).x, coverage=float(found[1]))


def test_the_greatest_coverage_takes_the_greatest_of_the_scores(
    noisy: httpx.Client,
) -> None:
    place = Path(noisy.headers["x-test-models"]) / "values" / "1" / "manifest.json"
    scores = json.loads(place.read_text())["conformal_scores"]
    x = toys.noisy_targets(3).x
    answer = ask(noisy, "values", x, coverage=300 / 301)
    half = np.array(answer["prediction_interval"]["upper"]) - answer["mean"]
    greatest = [max(each) for each in scores]
    np.testing.assert_allclose(half, np.array(answer["total_std"]) * greatest, rtol=1e-4)
