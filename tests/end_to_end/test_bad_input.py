"""Whatever a client sends, it gets a problem document, and the service goes on answering."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropserve.app.http.schemas import Problem
from dropserve.model.datasets import Dataset
from dropserve.model.training import TrainingConfig
from tests.bundles import train_and_export
from tests.conftest import events, memory, service
from tests.model import toys

ROW = [0] * 64
JSON = {"content-type": "application/json"}
ROUTES = ["/predict", "/uncertainty", "/debug/mc"]
LEAK = re.compile(r"Traceback|\.py|site-packages|/tmp|/usr|/home|File \"|0x[0-9a-f]{6}")


@pytest.fixture(scope="module")
def small(built: Path) -> Iterator[httpx.Client]:
    """A client of a service with small limits and several models."""
    limits = {
        "DROPSERVE_MAX_BODY_BYTES": "20000",
        "DROPSERVE_MAX_ROWS": "8",
        "DROPSERVE_MAX_PASSES": "1000",
        "DROPSERVE_MAX_ROW_PASSES": "2000",
    }
    with service(built / "models", **limits) as client:
        yield client


def problem(answer: httpx.Response, status: int) -> Problem:
    """Check that an answer is a problem document that leaks nothing."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert not LEAK.search(answer.text), answer.text
    document = Problem.model_validate(answer.json())
    assert document.status == status
    assert document.request_id == answer.headers["x-request-id"]
    return document


def send(client: httpx.Client, route: str, text: str | bytes) -> httpx.Response:
    answer = client.post(route, content=text, headers=JSON)
    assert client.get("/health/live").status_code == 200
    return answer


def body(**change: object) -> str:
    """Return a valid body with fields changed, or left out by the value ``...``."""
    document = {"inputs": [ROW], "model": "digits"} | change
    return json.dumps({key: value for key, value in document.items() if value is not ...})


NOT_JSON = {
    "empty": "",
    "text": "hello",
    "cut off": '{"inputs": [[1, 2',
    "NaN": '{"inputs": [[NaN]], "model": "digits"}',
    "Infinity": '{"inputs": [[-Infinity]], "model": "digits"}',
    "1e999": '{"inputs": [[1e999]], "model": "digits"}',
    "deeply nested": '{"inputs": ' + "[" * 9000,
    "deeply nested and closed": '{"inputs": ' + "[" * 9000 + "]" * 9000 + "}",
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "two documents": body() + body(),
    "trailing comma": '{"inputs": [[1,]]}',
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_body_that_is_not_json_is_a_400(
    small: httpx.Client, route: str, text: str | bytes
) -> None:
    assert problem(send(small, route, text), 400).detail.startswith("the body is not JSON: ")


BIG = 3.5e38
INVALID: dict[str, tuple[str, str]] = {
    "a list": ("[1]", "body"),
    "null": ("null", "body"),
    "a string": ('"x"', "body"),
    "nothing in it": ("{}", "inputs"),
    "inputs is null": (body(inputs=None), "inputs"),
    "inputs is an object": (body(inputs={"0": ROW}), "inputs"),
    "inputs is a number": (body(inputs=3), "inputs"),
    "no rows": (body(inputs=[]), "inputs"),
    "a row that is a number": (body(inputs=ROW[:2]), "inputs.0"),
    "a row that is null": (body(inputs=[ROW, None]), "inputs.1"),
    "an empty row": (body(inputs=[[]]), "inputs.0"),
    "one feature too few": (body(inputs=[ROW, ROW[1:]]), "inputs.1"),
    "one feature too many": (body(inputs=[[*ROW, 0]]), "inputs.0"),
    "ragged nesting": (body(inputs=[[[0] * 8] * 7 + [[0] * 7]]), "inputs.0.7"),
    "one list too few": (body(inputs=[[[0] * 8] * 7]), "inputs.0"),
    "nested too deep": (body(inputs=[[[[0]] * 8] * 8]), "inputs.0.0.0"),
    "a string for a number": (body(inputs=[["1", *ROW[1:]]]), "inputs.0.0"),
    "a boolean for a number": (body(inputs=[[*ROW[:63], True]]), "inputs.0.63"),
    "null for a number": (body(inputs=[[*ROW[:63], None]]), "inputs.0.63"),
    "an object for a number": (body(inputs=[[{}, *ROW[1:]]]), "inputs.0.0"),
    "beyond float32": (body(inputs=[ROW, [*ROW[:5], BIG, *ROW[6:]]]), "inputs.1.5"),
    "far below float32": (body(inputs=[[-1e308, *ROW[1:]]]), "inputs.0.0"),
    "a whole number beyond float32": (body(inputs=[[10**40, *ROW[1:]]]), "inputs.0.0"),
    "too many rows": (body(inputs=[ROW] * 9), "inputs"),
    "an unknown field": (body(colour="red"), "colour"),
    "no model where several are served": (body(model=...), "model"),
    "a model that is a number": (body(model=3), "model"),
    "a version that is a text": (body(version="1"), "version"),
    "a version that is a boolean": (body(version=True), "version"),
    "a version of 0": (body(version=0), "version"),
}
INVALID_PASSES: dict[str, tuple[str, str]] = {
    "passes 0": (body(passes=0), "passes"),
    "passes -1": (body(passes=-1), "passes"),
    "passes 1.5": (body(passes=1.5), "passes"),
    "passes 10.0": (body(passes=10.0), "passes"),
    "passes as text": (body(passes="10"), "passes"),
    "passes as boolean": (body(passes=True), "passes"),
    "passes null": (body(passes=None), "passes"),
    "passes over the limit": (body(passes=1001), "passes"),
    "passes beyond 64 bits": (body(passes=10**30), "passes"),
    "rows x passes over the budget": (body(inputs=[ROW] * 3, passes=700), "passes"),
    "seed -1": (body(seed=-1), "seed"),
    "seed 2^63": (body(seed=2**63), "seed"),
    "seed 2^64": (body(seed=2**64), "seed"),
    "seed 1.5": (body(seed=1.5), "seed"),
    "seed as text": (body(seed="7"), "seed"),
    "seed as boolean": (body(seed=False), "seed"),
    "interval 0": (body(interval=0), "interval"),
    "interval 1": (body(interval=1), "interval"),
    "interval 1.5": (body(interval=1.5), "interval"),
    "interval as text": (body(interval="0.9"), "interval"),
    "an unknown kind of mask": (body(masks="striped"), "masks"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("text", "path"), INVALID.values(), ids=INVALID.keys())
def test_content_that_is_not_allowed_is_a_422_that_names_the_field(
    small: httpx.Client, route: str, text: str, path: str
) -> None:
    document = problem(send(small, route, text), 422)
    assert document.errors is not None
    assert document.errors[0].path == path
    assert document.detail.startswith(f"{path}: ")


@pytest.mark.parametrize("route", ROUTES[1:])
@pytest.mark.parametrize(("text", "path"), INVALID_PASSES.values(), ids=INVALID_PASSES.keys())
def test_passes_seed_and_interval_have_their_bounds(
    small: httpx.Client, route: str, text: str, path: str
) -> None:
    document = problem(send(small, route, text), 422)
    assert document.errors is not None
    assert document.errors[0].path == path


@pytest.mark.parametrize("field", ["passes", "seed", "interval", "masks"])
def test_a_prediction_accepts_no_passes(small: httpx.Client, field: str) -> None:
    document = problem(send(small, "/predict", body(**{field: 1})), 422)
    assert document.errors is not None
    assert document.errors[0].path == field


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": [ROW] * 9}, "at most 8 rows are allowed, not 9"),
        ({"passes": 1001}, "must be at most 1000, not 1001"),
        ({"inputs": [ROW] * 3, "passes": 700}, "rows x passes may be at most 2000, not 3 x 700"),
        ({"model": ...}, "is needed, one of: diabetes, digits, double"),
        ({"inputs": [ROW[1:]]}, "must hold 64 numbers, flat or nested as [8, 8], not 63 values"),
    ],
)
def test_an_error_names_the_limit(small: httpx.Client, change: Any, says: str) -> None:
    assert says in problem(send(small, "/uncertainty", body(**change)), 422).detail


def test_the_debug_endpoint_has_a_limit_of_its_own(client: httpx.Client) -> None:
    text = body(inputs=[ROW] * 11, passes=10_000)
    assert (
        "at most 1000000 here, not 1100000" in problem(send(client, "/debug/mc", text), 422).detail
    )
    assert send(client, "/uncertainty", text).status_code == 200


NAMES = ["none", "", "../digits", "/etc/passwd", "digits/1", "digits\0", ".", "digits/../digits"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_or_path_like_model_is_a_404(small: httpx.Client, route: str, name: str) -> None:
    detail = problem(send(small, route, body(model=name)), 404).detail
    assert detail.endswith("served are: diabetes, digits, double")


def test_long_names_are_not_repeated_at_length(small: httpx.Client) -> None:
    long = "x" * 10_000
    assert len(send(small, "/predict", body(model=long)).content) < 1000
    assert len(send(small, "/predict", body(**{long: 1})).content) < 1000


def test_an_unknown_version_is_a_404(small: httpx.Client) -> None:
    document = problem(send(small, "/predict", body(version=7)), 404)
    assert document.detail == "no version 7 of model digits; served are: 1"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_a_415(small: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = small.post("/predict", content=body(), headers=headers)
    assert "must be application/json, not" in problem(answer, 415).detail


def test_a_json_content_type_may_have_parameters(small: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert small.post("/predict", content=body(), headers=headers).status_code == 200


def test_a_long_body_is_refused_from_its_header_before_it_is_sent(small: httpx.Client) -> None:
    address = (small.base_url.host, small.base_url.port or 80)
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000\r\n\r\n"
        )
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"the body may be at most 20000 bytes long" in answer


def test_a_long_body_of_unknown_length_is_refused_while_it_comes_in(small: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"[" * 1000

    answer = small.post("/predict", content=endless(), headers=JSON)
    assert "at most 20000 bytes" in problem(answer, 413).detail


def test_a_body_as_long_as_the_limit_is_read(small: httpx.Client) -> None:
    text = body().ljust(20000)
    assert send(small, "/predict", text).status_code == 200
    assert send(small, "/predict", text + " ").status_code == 413


def test_a_body_that_breaks_off_leaves_one_line_in_the_log(
    built: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with service(built / "models") as client:
        address = (client.base_url.host, client.base_url.port or 80)
        for _ in range(3):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\n"
                    b"Content-Length: 1000\r\n\r\n{"
                )
        assert send(client, "/predict", body()).status_code == 200
    found = events(capfd.readouterr().out)
    assert {each["level"] for each in found} == {"info"}
    asked = [each["status"] for each in found if each.get("route") == "/predict"]
    assert sorted(asked) == [200, 499, 499, 499]


def test_a_million_unknown_fields_cost_little_memory_and_are_one_problem(
    client: httpx.Client,
) -> None:
    text = "{" + ",".join(f'"{n}":0' for n in range(300_000)) + "}"
    before = memory(client, "VmHWM")
    document = problem(send(client, "/predict", text), 422)
    assert document.detail == "0: allowed are inputs, model, version"
    # The parsed body itself takes 60 MB; describing each field took 500 MB.
    assert memory(client, "VmHWM") - before < 150e6


def test_a_long_list_of_errors_is_cut_short(small: httpx.Client) -> None:
    text = body(inputs=3, model=4, version="x", passes=0, seed=-1, interval=7, masks="no")
    document = problem(send(small, "/uncertainty", text), 422)
    assert document.errors is not None
    assert [error.path for error in document.errors] == [
        "inputs",
        "model",
        "version",
        "passes",
        "seed",
        "interval",
        "masks",
    ]
    assert document.detail.endswith("(and 6 more)")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_numbers_that_lead_beyond_float32_are_refused(
    client: httpx.Client, route: str, name: str
) -> None:
    row = [3.4e38] * (64 if name == "digits" else 10)
    document = problem(send(client, route, body(inputs=[row], model=name)), 422)
    assert document.detail.startswith("inputs: values so large")


def test_unknown_routes_and_methods_are_problem_documents(small: httpx.Client) -> None:
    problem(small.get("/nothing"), 404)
    problem(small.post("/predict/", content=body(), headers=JSON), 404)
    answer = small.get("/predict")
    problem(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_requests_own_id_is_repeated_if_it_is_harmless(small: httpx.Client) -> None:
    given = small.get("/nothing", headers={"x-request-id": "order-66"})
    assert problem(given, 404).request_id == "order-66"
    for bad in ("a b", "x" * 200, "<script>"):
        made = small.get("/nothing", headers={"x-request-id": bad})
        assert re.fullmatch("[0-9a-f]{32}", problem(made, 404).request_id)


def test_debug_is_off_by_default(built: Path) -> None:
    with service(built / "models", DROPSERVE_DEBUG="0") as client:
        detail = problem(send(client, "/debug/mc", body()), 404).detail
        assert detail == "the debug endpoint is off; DROPSERVE_DEBUG=1 switches it on"
        assert send(client, "/uncertainty", body()).status_code == 200


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)
FIELDS = st.sampled_from(["inputs", "model", "version", "passes", "seed", "interval", "masks"])


@settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from(ROUTES), st.dictionaries(FIELDS, ANY_JSON, max_size=4))
def test_whatever_the_body_the_service_does_not_fail(
    small: httpx.Client, route: str, document: dict[str, object]
) -> None:
    answer = send(small, route, json.dumps({"inputs": [ROW], "model": "digits"} | document))
    if answer.status_code != 200:
        problem(answer, answer.status_code)
    assert answer.status_code in (200, 400, 404, 422)
    assert "NaN" not in answer.text


def test_memory_is_bounded_whatever_rows_and_passes_are_allowed(
    client: httpx.Client, examples: Callable[[str], list[Any]]
) -> None:
    def ask(rows: int, passes: int) -> None:
        inputs = (examples("digits") * rows)[:rows]
        text = json.dumps({"inputs": inputs, "model": "digits", "passes": passes, "seed": 1})
        assert send(client, "/uncertainty", text).status_code == 200

    ask(40, 100)  # one full chunk
    before = memory(client, "VmRSS")
    ask(1, 10_000)
    ask(100, 2_000)
    ask(2_000, 100)
    # 200,000 passes at once would take 205 MB for the activations of one layer alone.
    assert memory(client, "VmHWM") - before < 60e6


def test_memory_is_bounded_for_a_network_whose_masks_are_small_and_activations_large(
    tmp_path: Path,
) -> None:
    images = np.random.default_rng(0).random((20, 64, 64), dtype=np.float32)
    dataset = Dataset("images", "classification", images, np.arange(20) % 2, (), ("a", "b"))
    network = toys.config(dataset, "convnet", p=0.5, hidden=(8,))
    # The train command would evaluate it by passes of all kinds, which takes longer than the rest.
    train_and_export(dataset, network, TrainingConfig(epochs=1), tmp_path, "images")
    with service(tmp_path / "models") as client:
        before = memory(client, "VmRSS")
        text = json.dumps({"inputs": [images[0].tolist()], "passes": 300})
        assert send(client, "/uncertainty", text).status_code == 200
        # 300 passes at once would take 500 MB. A run computes at most 2^24 numbers, 67 MB.
        assert memory(client, "VmHWM") - before < 150e6
