"""Answers of the real service, each statistic recomputed from the samples it comes with."""

import json
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from scipy import stats

from dropserve.app.bundles import loader
from dropserve.app.http import schemas
from dropserve.app.uncertainty.masks import KINDS, Kind, MaskStream
from dropserve.model import checkpoint, evaluation
from tests.conftest import service

Examples = Callable[[str], list[Any]]
Json = dict[str, Any]
# How much rounding may change an answer at another batch size.
ROUNDING = 1e-5


def ask(client: httpx.Client, route: str, **body: object) -> Json:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    document: Json = answer.json()
    return document


def close(one: object, other: object, tolerance: float = ROUNDING) -> None:
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


def test_a_prediction_equals_torchs_eval_mode(
    client: httpx.Client, built: Path, examples: Examples
) -> None:
    inputs = examples("digits")
    answer = ask(client, "/predict", inputs=inputs, model="digits")
    model = checkpoint.load(built / "runs" / "digits").model
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor(inputs)), dim=1)
    close(answer["probabilities"], expected)
    assert answer["labels"] == [str(digit) for digit in expected.argmax(1).tolist()]
    schemas.ClassPrediction.model_validate(answer)


def test_a_regression_answers_values_in_the_targets_unit(
    client: httpx.Client, built: Path, examples: Examples
) -> None:
    inputs = examples("diabetes")
    answer = ask(client, "/predict", inputs=inputs, model="diabetes")
    model = checkpoint.load(built / "runs" / "diabetes").model
    with torch.no_grad():
        close(answer["values"], model(torch.tensor(inputs)))
    assert set(answer) == {"model", "version", "values"}
    schemas.ValuePrediction.model_validate(answer)


def test_the_default_digits_model_is_right_on_97_of_100_held_out_rows(
    client: httpx.Client, built: Path
) -> None:
    holdout = checkpoint.load(built / "runs" / "digits").holdout
    answer = ask(client, "/predict", inputs=holdout.x.tolist(), model="digits")
    right = np.array(answer["labels"], int) == holdout.y
    assert right.mean() >= 0.97


def test_a_flat_row_is_the_row_nested_to_the_inputs_shape(
    client: httpx.Client, examples: Examples
) -> None:
    nested = examples("digits")[:2]
    flat = [[value for line in row for value in line] for row in nested]
    one = ask(client, "/predict", inputs=nested, model="digits")
    assert one == ask(client, "/predict", inputs=flat, model="digits", version=1)


@pytest.mark.parametrize("route", ["/uncertainty", "/debug/mc"])
def test_the_same_seed_gives_the_same_answer_and_another_seed_another(
    client: httpx.Client, examples: Examples, route: str
) -> None:
    body = {"inputs": examples("digits")[:3], "model": "digits", "passes": 20}
    one = ask(client, route, **body, seed=7)
    assert one == ask(client, route, **body, seed=7)
    assert one["mean"] != ask(client, route, **body, seed=8)["mean"]


def test_a_drawn_seed_is_returned_and_reproduces_the_answer(
    client: httpx.Client, examples: Examples
) -> None:
    body = {"inputs": examples("digits")[:3], "model": "digits"}
    drawn = ask(client, "/uncertainty", **body)
    assert drawn["passes"] == 100
    assert drawn == ask(client, "/uncertainty", **body, seed=drawn["seed"])
    seeds = {ask(client, "/uncertainty", **body)["seed"] for _ in range(20)}
    assert len(seeds) == 20
    # JavaScript reads whole numbers up to 2^53 without loss.
    assert max(seeds) < 2**53


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_50_passes_are_the_first_50_of_100(
    client: httpx.Client, examples: Examples, name: str, kind: Kind
) -> None:
    body = {"inputs": examples(name)[:4], "model": name, "seed": 7, "masks": kind}
    few = ask(client, "/debug/mc", **body, passes=50)["samples"]
    many = ask(client, "/debug/mc", **body, passes=100)["samples"]
    close(few, many[:50])


def test_a_row_has_the_same_passes_whatever_rows_follow_it(
    client: httpx.Client, examples: Examples
) -> None:
    inputs = examples("digits")
    body = {"model": "digits", "seed": 7, "passes": 10}
    alone = ask(client, "/debug/mc", **body, inputs=inputs[:1])["samples"]
    beside = ask(client, "/debug/mc", **body, inputs=inputs)["samples"]
    close(np.array(alone)[:, 0], np.array(beside)[:, 0])
    # Masks depend on a row's place in the request, so equal rows have different passes.
    twice = np.array(ask(client, "/debug/mc", **body, inputs=[inputs[0]] * 2)["samples"])
    assert (twice[:, 0] != twice[:, 1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_more_passes_than_fit_one_run_are_run_in_pieces_that_change_nothing(
    client: httpx.Client, examples: Examples, kind: Kind
) -> None:
    body = {"inputs": examples("digits")[:2], "model": "digits", "seed": 7, "masks": kind}
    many = ask(client, "/debug/mc", **body, passes=9000)["samples"]
    few = ask(client, "/debug/mc", **body, passes=100)["samples"]
    close(many[:100], few)


def test_other_requests_in_flight_change_nothing(client: httpx.Client, examples: Examples) -> None:
    inputs = examples("digits")

    def query(number: int) -> Json:
        body = {
            "inputs": inputs[number % 10 :][:3],
            "model": "digits",
            "seed": number,
            "passes": 10 + number,
            "masks": KINDS[number % 2],
        }
        return ask(client, "/uncertainty", **body)

    alone = [query(number) for number in range(40)]
    with ThreadPoolExecutor(16) as pool:
        beside = list(pool.map(query, range(40)))
    for one, other in zip(alone, beside, strict=True):
        for key in ("mean", "std", "standard_error", "mutual_information"):
            close(one[key], other[key])


@pytest.fixture(scope="module", params=["digits", "double", "diabetes"])
def debugged(request: pytest.FixtureRequest, client: httpx.Client, examples: Examples) -> Json:
    inputs = examples(request.param)[:5]
    return ask(client, "/debug/mc", inputs=inputs, model=request.param, passes=200, interval=0.8)


def test_moments_are_those_of_the_samples(debugged: Json, built: Path) -> None:
    samples = np.array(debugged["samples"])  # [T, B, C]
    assert samples.shape[:2] == (200, 5)
    close(debugged["mean"], samples.mean(axis=0))
    squares = ((samples - samples.mean(axis=0)) ** 2).sum(axis=0)
    close(debugged["std"], np.sqrt(squares / 199))
    close(debugged["standard_error"], np.sqrt(squares / 199 / 200))
    assert debugged["converged"] is None
    assert debugged["interval"]["level"] == 0.8
    if debugged["model"] == "diabetes":
        # Of the predictive distribution: a tenth of the mixture lies on either side.
        (noise_std,) = loader.read_manifest(built / "models" / "diabetes" / "1").noise_std or ()
        below = stats.norm.cdf((np.array(debugged["interval"]["lower"]) - samples) / noise_std)
        above = stats.norm.sf((np.array(debugged["interval"]["upper"]) - samples) / noise_std)
        close(below.mean(axis=0), np.full((5, 1), 0.1), 1e-3)
        close(above.mean(axis=0), np.full((5, 1), 0.1), 1e-3)
        return
    ordered = np.sort(samples, axis=0)
    # 10 % of the way from number 0 to number 199: nine tenths of the way from 19 to 20.
    close(debugged["interval"]["lower"], ordered[19] + 0.9 * (ordered[20] - ordered[19]))
    close(debugged["interval"]["upper"], ordered[179] + 0.1 * (ordered[180] - ordered[179]))


@pytest.mark.parametrize("name", ["digits", "double", "diabetes"])
def test_the_standard_error_of_stratified_masks_is_that_of_their_replicates(
    client: httpx.Client, built: Path, examples: Examples, name: str
) -> None:
    body = {"inputs": examples(name)[:5], "model": name, "passes": 200, "seed": 2}
    answer = ask(client, "/debug/mc", **body, masks="stratified")
    samples = np.array(answer["samples"])  # [T, B, C]
    # 20 replicates of 10 passes, as p is 0.5 or 0.3.
    means = samples.reshape(20, 10, 5, -1).mean(axis=1)
    between = 10 * ((means - samples.mean(axis=0)) ** 2).sum(axis=0)
    close(answer["standard_error"], np.sqrt(between / 17 / 200))
    close(answer["std"], samples.std(axis=0, ddof=1))
    # Each unit was kept in just as many passes as it should be.
    for site in answer["sites"]:
        assert site["kept"] == pytest.approx(1 - site["p"], abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_debug_answer_with_a_tolerance_shows_the_passes_it_took(
    client: httpx.Client, examples: Examples, kind: Kind
) -> None:
    body = {"inputs": examples("digits")[:3], "model": "digits", "seed": 3, "masks": kind}
    answer = ask(client, "/debug/mc", **body, passes=5000, tolerance=0.01)
    assert answer["converged"] is True
    assert np.max(answer["standard_error"]) <= 0.01
    assert len(answer["samples"]) == answer["passes"] < 5000
    without = ask(client, "/debug/mc", **body, passes=answer["passes"])
    for name in ("mean", "samples", "expectation_gap"):
        close(answer[name], without[name], 1e-4)
    assert answer["sites"] == without["sites"]


def test_a_request_with_a_tolerance_is_bounded_by_the_passes_it_may_keep(
    client: httpx.Client, examples: Examples
) -> None:
    inputs = examples("digits")[:1] * 30
    body = {"inputs": inputs, "model": "digits", "passes": 5000}
    refused = client.post("/uncertainty", json=body | {"tolerance": 0.1})
    assert refused.status_code == 422
    assert refused.json()["detail"] == (
        "passes: rows x passes x outputs may be at most 1000000 with a tolerance, not 1500000"
    )
    assert client.post("/uncertainty", json=body).status_code == 200


@pytest.mark.parametrize("tolerance", [0, -0.1, "small", 1e999])
def test_an_invalid_tolerance_is_refused(
    client: httpx.Client, examples: Examples, tolerance: object
) -> None:
    body = {"inputs": examples("digits")[:1], "model": "digits", "tolerance": tolerance}
    text = json.dumps(body).replace("Infinity", "1e999")
    answer = client.post("/uncertainty", content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    if tolerance != 1e999:
        assert answer.json()["errors"][0]["path"] == "tolerance"


def test_entropies_or_spreads_are_those_of_the_samples(debugged: Json, built: Path) -> None:
    samples = np.array(debugged["samples"])
    place = built / "models" / debugged["model"] / "1"
    manifest = json.loads((place / "manifest.json").read_text())
    if debugged["model"] == "diabetes":
        noise = np.full((5, 1), manifest["noise_std"])
        close(debugged["epistemic_std"], debugged["std"])
        close(debugged["aleatoric_std"], noise)
        close(debugged["total_std"], np.sqrt(np.array(debugged["std"]) ** 2 + noise**2))
        schemas.ValueDebug.model_validate(debugged)
        return
    mean = samples.mean(axis=0)
    predictive = [-sum(p * math.log(p) for p in row if p > 0) for row in mean]
    expected = [
        sum(-sum(p * math.log(p) for p in row if p > 0) for row in samples[:, b]) / 200
        for b in range(5)
    ]
    close(debugged["predictive_entropy"], predictive)
    close(debugged["expected_entropy"], expected)
    close(debugged["mutual_information"], np.subtract(predictive, expected))
    assert min(debugged["mutual_information"]) >= 0
    for b in range(5):
        votes = [int(np.argmax(row)) for row in samples[:, b]]
        commonest = max(votes.count(label) for label in range(10))
        assert debugged["variation_ratio"][b] == pytest.approx(1 - commonest / 200)
    assert debugged["labels"] == [str(label) for label in mean.argmax(axis=1)]
    schemas.ClassDebug.model_validate(debugged)


def test_the_gap_is_the_distance_of_mean_and_eval_mode_in_standard_errors(
    debugged: Json, client: httpx.Client, examples: Examples
) -> None:
    name = debugged["model"]
    answer = ask(client, "/predict", inputs=examples(name)[:5], model=name)
    close(debugged["deterministic"], answer.get("probabilities") or answer["values"])
    point = np.array(debugged["deterministic"])
    error = np.maximum(debugged["standard_error"], 1e-5 * np.abs(point))
    close(debugged["expectation_gap"], (debugged["mean"] - point) / error, 1e-3)


def test_a_double_models_gap_is_plain_to_see(client: httpx.Client, examples: Examples) -> None:
    """Its eval mode is less sure than its passes; that of a classic model is not."""

    def largest(name: str) -> float:
        body = {"inputs": examples(name), "model": name, "seed": 1}
        gap = np.array(ask(client, "/debug/mc", **body, passes=1000)["expectation_gap"])
        return float(np.sqrt((gap**2).mean()))

    assert largest("double") > 3 * largest("digits")


def test_the_sites_kept_share_is_that_of_the_masks_and_1_minus_p_within_four_standard_errors(
    debugged: Json, built: Path
) -> None:
    sites = loader.read_manifest(built / "models" / debugged["model"] / "1").sites
    masks = MaskStream(debugged["seed"], sites).draw(range(5), range(200))
    assert [site["name"] for site in debugged["sites"]] == [
        "network.dropouts.0",
        "network.dropouts.1",
    ]
    for site, report in zip(sites, debugged["sites"], strict=True):
        mask = masks[site.mask_input]
        assert report["kept"] == pytest.approx(mask.mean(), abs=1e-12)
        p = report["p"]
        assert abs(report["kept"] - (1 - p)) < 4 * math.sqrt(p * (1 - p) / mask.size)


def test_the_passes_are_torchs_train_mode_passes_in_distribution(
    client: httpx.Client, built: Path, examples: Examples
) -> None:
    inputs = examples("digits")[:3]
    answer = ask(client, "/uncertainty", inputs=inputs, model="digits", passes=4000, seed=3)
    model = checkpoint.load(built / "runs" / "digits").model
    logits = evaluation.mc_outputs(model, torch.tensor(inputs), 4000, seed=3)
    passes = np.exp(logits - logits.max(axis=2, keepdims=True))
    passes /= passes.sum(axis=2, keepdims=True)
    error = np.hypot(answer["standard_error"], passes.std(axis=0, ddof=1) / math.sqrt(4000))
    # 30 differences: 4.5 standard errors leave a chance of 1 in 5,000 for any.
    assert (np.abs(np.array(answer["mean"]) - passes.mean(axis=0)) < 4.5 * error + 1e-7).all()


def test_a_single_pass_is_answered_without_a_standard_error(
    client: httpx.Client, examples: Examples
) -> None:
    body = {"inputs": examples("digits")[:1], "model": "digits", "passes": 1}
    answer = ask(client, "/debug/mc", **body)
    assert answer["standard_error"] is None
    assert answer["expectation_gap"] is None
    assert answer["std"] == [[0.0] * 10]
    close(answer["mean"], answer["samples"][0])
    schemas.ClassDebug.model_validate(answer)


def test_uncertainty_is_the_debug_answer_without_the_passes(
    client: httpx.Client, examples: Examples
) -> None:
    for name, schema in (
        ("digits", schemas.ClassUncertainty),
        ("diabetes", schemas.ValueUncertainty),
    ):
        body = {"inputs": examples(name)[:2], "model": name, "seed": 5, "masks": "independent"}
        answer = ask(client, "/uncertainty", **body)
        debug = ask(client, "/debug/mc", **body)
        extra = {"samples", "deterministic", "expectation_gap", "sites"}
        assert set(debug) - set(answer) == extra
        assert answer == {key: value for key, value in debug.items() if key not in extra}
        schema.model_validate(answer)


def test_the_newest_version_answers_by_default_and_an_older_one_by_number(
    built: Path, tmp_path: Path, examples: Examples
) -> None:
    for name, version in (("digits", 2), ("double", 10)):
        place = tmp_path / "digits" / str(version)
        shutil.copytree(built / "models" / name / "1", place)
        manifest = json.loads((place / "manifest.json").read_text())
        text = json.dumps(manifest | {"name": "digits", "version": version})
        (place / "manifest.json").write_text(text)
    with service(tmp_path) as client:
        newest = ask(client, "/predict", inputs=examples("digits"))
        assert newest["version"] == 10
        old = ask(client, "/predict", inputs=examples("digits"), version=2)
        assert old["version"] == 2
        assert old["probabilities"] != newest["probabilities"]


def test_the_service_says_that_it_is_ready_and_what_it_serves(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"status": "alive"}
    assert client.get("/health/ready").json() == {
        "status": "ready",
        "device": "cpu",
        "provider": "CPUExecutionProvider",
        "models": {"diabetes": [1], "digits": [1], "double": [1]},
    }


def test_the_documentation_renders_from_the_service_alone(client: httpx.Client) -> None:
    page = client.get("/docs").text
    urls = re.findall(r"""(?:src|href)="([^"]+)"|url: '([^']+)'""", page)
    assert len(urls) == 4
    for url in map("".join, urls):
        # Relative, as a proxy may serve all of it below a prefix.
        assert not url.startswith(("/", "http"))
        assert client.get(f"/{url}").status_code == 200
    document = client.get("/openapi.json").json()
    assert document["servers"] == [{"url": "."}]
    own = {path for path in document["paths"] if not path.startswith(("/v1", "/v2"))}
    health = {"/health/live", "/health/ready", "/metrics"}
    assert own == {"/predict", "/uncertainty", "/debug/mc"} | health
    model = "/v2/models/{name}"
    assert document["paths"].keys() - own == {
        *("/v1/models", "/v1/models/{name}", "/v1/models/{name}:predict"),
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        *(
            f"{model}{version}{what}"
            for version in ("", "/versions/{version}")
            for what in ("", "/ready", "/infer", "/config", "/stats")
        ),
        "/v2/models/stats",
        "/v2/repository/index",
        "/v2/repository/models/{name}/load",
        "/v2/repository/models/{name}/unload",
    }
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) <= set(
        document["components"]["schemas"]
    )
