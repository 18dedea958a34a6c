"""The clients that users of KServe, Triton and MLServer have get the answers of /predict."""

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http.aio as triton_aio  # type: ignore[import-untyped] # it ships no types
from numpy.typing import NDArray
from tritonclient.http import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
)
from tritonclient.utils import (  # type: ignore[import-untyped]
    InferenceServerException,
)

from tests.conftest import ROOT, service

Json = dict[str, Any]
Array = NDArray[Any]

PASSES = {"passes": 20, "seed": 7}
ALGORITHMS = (None, "gzip", "deflate")


@pytest.fixture(scope="module")
def rows(examples: Callable[[str], list[Any]]) -> list[Any]:
    return examples("digits")[:3]


@pytest.fixture(scope="module")
def url(client: httpx.Client) -> str:
    return f"{client.base_url.host}:{client.base_url.port}"


@pytest.fixture(scope="module")
def triton(url: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(url) as triton:
        yield triton


@pytest.fixture(scope="module")
def predicted(client: httpx.Client, rows: list[Any]) -> Json:
    return ask(client, "/predict", inputs=rows, model="digits")


@pytest.fixture(scope="module")
def uncertain(client: httpx.Client, rows: list[Any]) -> Json:
    return ask(client, "/uncertainty", inputs=rows, model="digits", coverage=0.9, **PASSES)


def ask(client: httpx.Client, route: str, **body: object) -> Json:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    document: Json = answer.json()
    return document


def foreign(name: str, client: httpx.Client, rows: list[Any]) -> Json:
    """Return what a program in ``tests/clients`` gets, in the environment of its client."""
    python = ROOT / "build" / "clients" / name / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"the client is missing: make build/clients/{name}/installed")
    done = subprocess.run(
        [python, "-P", ROOT / "tests" / "clients" / f"{name}_client.py", str(client.base_url)],
        input=json.dumps(rows),
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Json = json.loads(done.stdout)
    return found


def tensor(rows: object, binary: bool = True) -> InferInput:
    values = np.array(rows, np.float32)
    made = InferInput("x", list(values.shape), "FP32")
    return made.set_data_from_numpy(values, binary_data=binary)


def same(found: object, expected: object) -> None:
    np.testing.assert_array_equal(np.asarray(found, "f4"), np.asarray(expected, "f4"))


def test_kserves_client_is_served(
    client: httpx.Client, rows: list[Any], predicted: Json, uncertain: Json
) -> None:
    found = foreign("kserve", client, rows)
    assert [found[name] for name in ("live", "ready", "model ready", "v1 ready")] == [True] * 4
    for kind in ("json", "binary"):
        same(found[kind]["probabilities"], predicted["probabilities"])
        assert found[kind]["labels"] == predicted["labels"]
    for output in ("mean", "std", "mutual_information"):
        same(found["mc"][output], uncertain[output])
    assert found["mc model"] == ["1", "digits.mc"]
    assert found["std"].keys() == {"std"}
    same(found["std"]["std"], uncertain["std"])
    many = ask(client, "/predict", inputs=rows[:1] * 100, model="digits")
    assert found["many encoding"] == "gzip"
    np.testing.assert_allclose(found["many"][:100], many["probabilities"], atol=1e-5)
    assert "model_name: must be digits, as in the path, not 'another'" in found["another model"]
    for kind in ("v1", "v1 flat"):
        assert found[kind].keys() == {"predictions"}
        same(found[kind]["predictions"], predicted["probabilities"])
    assert found["v1 unknown"].startswith("no model 'none'; served are: ")
    assert found["v1 unknown ready"].startswith("no model 'none'; served are: ")
    assert found["v1 wrong"].startswith("instances.0: must hold 64 numbers")
    assert "/v2/models/digits.mc/infer" in found["v1 mc"]


def test_mlservers_codecs_are_served(
    client: httpx.Client, rows: list[Any], predicted: Json, uncertain: Json
) -> None:
    found = foreign("mlserver", client, rows)
    # What the codec adds; the name that a request's codec makes up is not that of an input.
    assert found["written"]["parameters"] == {"content_type": "np"}
    assert found["named"] == "input-1"
    for kind in ("input", "request"):
        same(found[kind]["probabilities"], predicted["probabilities"])
        assert found[kind]["labels"] == predicted["labels"]
    assert list(found["mc"]) == ["std", "prediction_set"]
    same(found["mc"]["std"], uncertain["std"])
    assert found["mc"]["prediction_set"] == mask(uncertain["prediction_set"])


def mask(sets: list[list[str]]) -> list[list[bool]]:
    return [[str(label) in row for label in range(10)] for row in sets]


@pytest.mark.parametrize("response", ALGORITHMS)
@pytest.mark.parametrize("request_", ALGORITHMS)
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_may_compress_both_ways(
    client: httpx.Client,
    triton: InferenceServerClient,
    rows: list[Any],
    binary: bool,
    request_: str | None,
    response: str | None,
) -> None:
    many = (rows * 200)[:512]
    expected = ask(client, "/predict", inputs=many, model="digits")
    found = triton.infer(
        "digits",
        [tensor(many, binary)],
        outputs=[InferRequestedOutput("probabilities", binary)],
        request_compression_algorithm=request_,
        response_compression_algorithm=response,
    )
    same(found.as_numpy("probabilities"), expected["probabilities"])


def test_tritons_asynchronous_client_may_compress_both_ways(
    client: httpx.Client, url: str, rows: list[Any]
) -> None:
    many = (rows * 200)[:512]
    expected = ask(client, "/predict", inputs=many, model="digits")

    async def main() -> list[Any]:
        async with triton_aio.InferenceServerClient(url) as triton:
            assert await triton.is_model_ready("digits.mc")
            assert (await triton.get_model_config("digits"))["max_batch_size"] == 4096
            assert (await triton.get_inference_statistics("digits"))["model_stats"]
            return await asyncio.gather(
                *(
                    triton.infer(
                        "digits",
                        [tensor(many)],
                        request_compression_algorithm=each,
                        response_compression_algorithm=each,
                        timeout=30_000_000,
                        priority=2,
                    )
                    for each in ALGORITHMS
                )
            )

    for each in asyncio.run(main()):
        np.testing.assert_allclose(
            each.as_numpy("probabilities"), expected["probabilities"], atol=1e-5
        )


@pytest.mark.parametrize("name", ["digits", "digits.mc"])
def test_hints_do_not_change_an_answer(
    triton: InferenceServerClient, rows: list[Any], name: str
) -> None:
    parameters = PASSES if name == "digits.mc" else {}
    plain = triton.infer(name, [tensor(rows)], parameters=parameters)
    hinted = triton.infer(
        name,
        [tensor(rows)],
        parameters=parameters | {"content_type": "np"},
        priority=1,
        timeout=20_000_000,
        sequence_id="",
        sequence_start=True,
        sequence_end=True,
    )
    assert hinted.get_response() == plain.get_response()
    for output in plain.get_response()["outputs"]:
        assert hinted.as_numpy(output["name"]).tolist() == plain.as_numpy(output["name"]).tolist()


def test_parameters_that_a_model_without_passes_does_not_know_do_not_change_its_answer(
    triton: InferenceServerClient, rows: list[Any], predicted: Json
) -> None:
    found = triton.infer("digits", [tensor(rows)], parameters={"tenant": "a", "temperature": 2})
    same(found.as_numpy("probabilities"), predicted["probabilities"])


def failed(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status(), caught.value.message()


def test_a_sequence_is_refused_as_no_state_is_kept(
    triton: InferenceServerClient, rows: list[Any]
) -> None:
    for each in (7, "mine"):
        says = "parameters.sequence_id: must be 0: requests do not depend on others"
        assert failed(lambda: triton.infer("digits", [tensor(rows)], sequence_id=each)) == (  # noqa: B023 # called at once
            "400",
            says,
        )


@pytest.mark.parametrize("name", ["digits", "digits.mc"])
def test_a_timeout_is_the_deadline(
    triton: InferenceServerClient, rows: list[Any], name: str
) -> None:
    status, says = failed(lambda: triton.infer(name, [tensor(rows)], timeout=1))
    assert (status, says.partition(" ms,")[0]) == ("504", "the answer was not ready within 0.001")


def test_of_a_timeout_and_the_header_the_smaller_one_counts(
    triton: InferenceServerClient, rows: list[Any]
) -> None:
    def ask(header: str, timeout: int) -> object:
        # Too many passes for a millisecond.
        return triton.infer(
            "digits.mc",
            [tensor(rows * 30)],
            headers={"x-request-timeout-ms": header},
            timeout=timeout,
            parameters={"passes": 10_000},
        )

    for header, timeout in (("1", 3_600_000_000), ("3600000", 1000), ("1", 0)):
        status, says = failed(lambda: ask(header, timeout))  # noqa: B023 # called at once
        assert (status, says.partition(" ms,")[0]) == ("504", "the answer was not ready within 1")


@pytest.mark.parametrize("timeout", [-1, 3_600_000_001, 0.5, "1000", True])
def test_a_timeout_out_of_bounds_is_refused(
    triton: InferenceServerClient, rows: list[Any], timeout: object
) -> None:
    assert failed(lambda: triton.infer("digits", [tensor(rows)], timeout=timeout)) == (
        "400",
        "parameters.timeout: must be a whole number of microseconds from 0 to 3600000000",
    )


def named(client: httpx.Client, path: str, rows: list[Any], **more: object) -> httpx.Response:
    """Send a request with fields that only KServe's client writes."""
    inputs = [{"name": "x", "shape": [3, 8, 8], "datatype": "FP32", "data": rows}]
    return client.post(path, json={"inputs": inputs, **more})


def test_a_body_may_name_the_model_of_its_path_and_no_other(
    client: httpx.Client, rows: list[Any]
) -> None:
    newest, first = "/v2/models/digits/infer", "/v2/models/digits/versions/1/infer"
    for path in (newest, first):
        for same_model in ({"model_name": "digits", "model_version": "1"}, {"model_version": ""}):
            assert named(client, path, rows, **same_model).status_code == 200
    for wrong, says in (
        ({"model_name": "digits.mc"}, "model_name: must be digits, as in the path, not"),
        ({"model_version": "2"}, "model_version: must be 1, which the path means, not '2'"),
        ({"model_name": 1}, "model_name: must be a string, not a number"),
    ):
        answer = named(client, newest, rows, **wrong)
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(says)


# Intervals and coverage


def test_an_interval_adds_its_bounds(
    client: httpx.Client, triton: InferenceServerClient, rows: list[Any]
) -> None:
    for level in (0.5, 0.99):
        asked = {**PASSES, "interval": level}
        expected = ask(client, "/uncertainty", inputs=rows, model="digits", **asked)
        found = triton.infer("digits.mc", [tensor(rows)], parameters=asked)
        assert names(found) == ["mean", "std", "mutual_information", "lower", "upper"]
        for bound in ("lower", "upper"):
            same(found.as_numpy(bound), expected["interval"][bound])


@pytest.mark.parametrize("binary", [True, False])
def test_a_coverage_adds_a_set_or_an_interval(
    client: httpx.Client,
    triton: InferenceServerClient,
    examples: Callable[[str], list[Any]],
    binary: bool,
) -> None:
    sizes = []
    bounds = ["prediction_lower", "prediction_upper"]
    for name, added, coverages in (
        ("digits", ["prediction_set"], (0.5, 0.995)),
        ("diabetes", bounds, (0.5, 0.98)),
    ):
        for coverage in coverages:
            rows = examples(name)
            body = {**PASSES, "coverage": coverage}
            expected = ask(client, "/uncertainty", inputs=rows, model=name, **body)
            outputs = [InferRequestedOutput(each, binary) for each in added]
            found = triton.infer(f"{name}.mc", [tensor(rows)], outputs=outputs, parameters=body)
            by_default = triton.infer(f"{name}.mc", [tensor(rows)], parameters=body)
            assert names(by_default)[-len(added) :] == added
            assert "lower" not in names(by_default)
            for each in added:
                got = found.as_numpy(each)
                assert by_default.as_numpy(each).tolist() == got.tolist()
                if name == "digits":
                    assert got.dtype == np.bool_
                    assert got.tolist() == mask(expected[each])
                    sizes.append(int(got.sum()))
                else:
                    bound = each.removeprefix("prediction_")
                    same(got, expected["prediction_interval"][bound])
    assert sizes[0] < sizes[1]


def test_bounds_and_sets_asked_for_by_name_have_a_level(
    client: httpx.Client, triton: InferenceServerClient, rows: list[Any]
) -> None:
    expected = ask(client, "/uncertainty", inputs=rows, model="digits", coverage=0.9, **PASSES)
    outputs = [InferRequestedOutput(each) for each in ("upper", "prediction_set")]
    found = triton.infer("digits.mc", [tensor(rows)], outputs=outputs, parameters=PASSES)
    same(found.as_numpy("upper"), expected["interval"]["upper"])
    assert found.as_numpy("prediction_set").tolist() == mask(expected["prediction_set"])


def names(result: Any) -> list[str]:
    return [output["name"] for output in result.get_response()["outputs"]]


# What tools that drive a server read


@pytest.mark.parametrize("version", ["", "1"])
@pytest.mark.parametrize("name", ["digits", "digits.mc", "diabetes", "diabetes.mc"])
def test_the_configuration_agrees_with_the_metadata(
    triton: InferenceServerClient, name: str, version: str
) -> None:
    described = triton.get_model_metadata(name, version)
    configured = triton.get_model_config(name, version)
    assert configured["name"] == name
    assert configured["platform"] == described["platform"] == "onnxruntime_onnx"
    assert configured["max_batch_size"] == 4096
    for ours, theirs in (("inputs", "input"), ("outputs", "output")):
        assert configured[theirs] == [
            {
                "name": each["name"],
                "data_type": "TYPE_" + each["datatype"].replace("BYTES", "STRING"),
                "dims": each["shape"][1:],
            }
            for each in described[ours]
        ]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_statistics_count_requests_rows_and_runs_of_all_workers(
    client: httpx.Client, rows: list[Any], workers: int, built: Any
) -> None:
    with service(
        built / "models", DROPSERVE_WORKERS=str(workers), DROPSERVE_MAX_ROW_PASSES="5000000"
    ) as fresh:
        url = f"{fresh.base_url.host}:{fresh.base_url.port}"
        for _ in range(6):
            # Each client has a connection of its own, and so may have another worker.
            with InferenceServerClient(url) as triton:
                triton.infer("digits", [tensor(rows)])
                triton.infer("digits.mc", [tensor(rows[:2])], parameters=PASSES)
        ask(fresh, "/predict", inputs=rows, model="digits")
        late = fresh.post(
            "/uncertainty",
            json={"inputs": rows * 100, "model": "digits", "passes": 10_000},
            headers={"x-request-timeout-ms": "1"},
        )
        assert late.status_code == 504
        with InferenceServerClient(url) as triton:
            (plain,) = triton.get_inference_statistics("digits")["model_stats"]
            (passes,) = triton.get_inference_statistics("digits.mc", "1")["model_stats"]
            every = triton.get_inference_statistics()["model_stats"]
            status, says = failed(lambda: triton.get_inference_statistics("none"))
            assert (status, says[:15]) == ("404", "no model 'none'")
            assert failed(lambda: triton.get_inference_statistics("digits", "9"))[0] == "404"
    assert (plain["name"], plain["version"], plain["inference_count"]) == ("digits", "1", 7 * 3)
    assert (passes["name"], passes["inference_count"]) == ("digits.mc", 6 * 2)
    assert 1 <= plain["execution_count"] <= 7
    stats = plain["inference_stats"]
    assert {name: each["count"] for name, each in stats.items()} == {
        **dict.fromkeys(("success", "queue", "compute_infer"), 7),
        **dict.fromkeys(("compute_input", "compute_output"), 7),
        "fail": 0,
    }
    assert 0 < stats["compute_infer"]["ns"] < stats["success"]["ns"] < 60e9
    assert (passes["inference_stats"]["success"]["count"]) == 6
    assert (passes["inference_stats"]["fail"]["count"]) == 1
    assert [each["name"] for each in every] == [
        name for model in ("diabetes", "digits", "double") for name in (model, f"{model}.mc")
    ]
    assert plain in every


# KServe's first protocol, where its client does not reach


def test_the_first_protocol_lists_models_and_answers_values(
    client: httpx.Client, examples: Callable[[str], list[Any]]
) -> None:
    rows = examples("diabetes")
    expected = ask(client, "/predict", inputs=rows, model="diabetes")
    assert ask(client, "/v1/models/diabetes:predict", instances=rows) == {
        "predictions": expected["values"]
    }
    assert client.get("/v1/models").json() == {"models": ["diabetes", "digits", "double"]}
    assert client.get("/v1/models/digits").json() == {"name": "digits", "ready": True}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("digits:predict", {"inputs": []}, 400, "inputs: allowed are instances, signature_name"),
        ("digits:predict", {}, 400, "instances: Field required"),
        ("digits:predict", {"instances": []}, 400, "instances: at least one row is needed"),
        (
            "digits:predict",
            {"instances": [["1"] * 64]},
            400,
            "instances.0.0: must be a number, not ",
        ),
        ("none:predict", {"instances": [[1]]}, 404, "no model 'none'; served are: "),
        (
            "digits.mc:predict",
            {"instances": [[1]]},
            404,
            "this protocol answers predictions alone; ",
        ),
        ("digits:explain", {"instances": [[1]]}, 405, "Method Not Allowed"),
    ],
)
def test_errors_of_the_first_protocol_are_in_its_form(
    client: httpx.Client, path: str, body: Json, status: int, says: str
) -> None:
    answer = client.post(f"/v1/models/{path}", json=body)
    assert answer.status_code == status
    (error,) = answer.json().values()
    assert error.startswith(says)
    assert answer.json() == {"error": error}


@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS"])
def test_predictions_of_the_first_protocol_are_posted(client: httpx.Client, method: str) -> None:
    answer = client.request(method, "/v1/models/digits:predict")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_the_first_protocol_is_counted_and_guarded_like_any_other(
    built: Any, rows: list[Any], tmp_path: Any
) -> None:
    with service(built / "models") as fresh:
        ask(fresh, "/v1/models/digits:predict", instances=rows)
        text = fresh.get("/metrics").text
    labels = 'model="digits",route="/v1/models/{name}:predict",status="200",version="1"'
    assert f"dropserve_requests_total{{{labels}}} 1.0" in text
    from tests.conftest import run

    file = tmp_path / "keys.json"
    run("app", "key", "new", "--scope", "debug", "--name", "me", "--file", str(file))
    with service(built / "models", DROPSERVE_API_KEYS_FILE=str(file)) as guarded:
        for answer in (
            guarded.post("/v1/models/digits:predict", json={"instances": rows}),
            guarded.get("/v1/models"),
            guarded.get("/v1/models/digits"),
            guarded.get("/v2/models/digits/config"),
            guarded.get("/v2/models/digits/stats"),
            guarded.get("/v2/models/stats"),
        ):
            assert answer.status_code == 401
            assert answer.json().keys() == {"error"}
