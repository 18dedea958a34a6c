"""Overload: requests that do not fit are refused at once, and all others are answered."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks import overload
from tests.conftest import events, memory, service, wait_for
from tests.end_to_end.test_access import new_key
from tests.end_to_end.test_load import held, long_query, passes_run

Examples = Callable[[str], list[Any]]
CONNECTIONS, QUEUE_ROWS, SECONDS = 400, 64, 3.0


@pytest.fixture(scope="module")
def narrow(built: Path) -> Iterator[httpx.Client]:
    """A client of a service with a small queue."""
    with service(built / "models", DROPSERVE_QUEUE_ROWS=str(QUEUE_ROWS)) as client:
        yield client


@pytest.mark.quiet
@pytest.mark.parametrize("patient", [True, False], ids=["patient", "impatient"])
def test_400_connections_get_200_or_503_and_the_live_probe_its_answer_throughout(
    narrow: httpx.Client, examples: Examples, patient: bool
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1]}
    request = overload.post("/predict", body)
    before = memory(narrow, "VmRSS")
    found = asyncio.run(
        overload.load(narrow.base_url.port or 80, request, CONNECTIONS, SECONDS, patient=patient)
    )
    assert found.lost == 0
    assert found.answers.keys() == {200, 503}
    assert len(found.answers[200]) > QUEUE_ROWS
    assert max(found.live) < 0.5
    head, _, content = found.seen[503].partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert overload.header(head, b"retry-after", 0) >= 1
    assert b"the queue is full: rows x passes of all requests may be at most 64" in content
    # The memory of all connections, and of what was read from them, is free again.
    wait_for(lambda: memory(narrow, "VmRSS") < before + 30e6)
    for _ in range(20):
        assert narrow.post("/predict", json=body).status_code == 200


def test_a_full_queue_is_an_error_of_the_protocol_under_v2(
    narrow: httpx.Client, examples: Examples
) -> None:
    # Larger than the queue, it is accepted while that is empty; later requests find it full.
    url = f"{narrow.base_url}/uncertainty"
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(httpx.post, url, json=long_query(examples, 40), timeout=60)
        wait_for(lambda: held(narrow))
        answer = narrow.post("/v2/models/digits/infer", content=b"not even read")
        assert (answer.status_code, answer.json().keys()) == (503, {"error"})
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert narrow.post("/predict", content=b"not even read").status_code == 503
        assert narrow.get("/health/ready").status_code == 200
        assert long.result().status_code == 200
    assert narrow.post("/predict", content=b"not even read").status_code == 415


def test_a_full_queue_is_disclosed_only_to_authorised_clients_counted_and_logged(
    built: Path, examples: Examples, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    headers = {"x-api-key": new_key(file, "predict")}
    settings = {"DROPSERVE_QUEUE_ROWS": "10", "DROPSERVE_API_KEYS_FILE": str(file)}
    with service(built / "models", **settings) as client, ThreadPoolExecutor(1) as pool:
        query = partial(httpx.post, f"{client.base_url}/uncertainty", headers=headers, timeout=60)
        long = pool.submit(query, json=long_query(examples, 40))
        name = {"x-request-id": "refused"}
        wait_for(lambda: client.post("/predict", headers=headers | name).status_code == 503)
        assert client.post("/predict").status_code == 401
        wrong = headers | {"x-request-timeout-ms": "soon"}
        assert client.post("/predict", headers=wrong).status_code == 400
        assert client.post("/debug/mc", headers=headers).status_code == 403
        assert long.result().status_code == 200
        text = client.get("/metrics", headers=headers).text
        assert 'dropserve_rejected_total{reason="queue"} 1.0' in text
        assert 'route="/predict",status="503",version=""} 1.0' in text
    (line,) = [each for each in events(capfd.readouterr().out) if each.get("status") == 503]
    assert (line["route"], line["request_id"]) == ("/predict", "refused")


@pytest.mark.parametrize("origins", ["", "https://a.example"], ids=["plain", "CORS"])
def test_a_request_to_a_full_queue_is_refused_before_its_body_is_sent(
    built: Path, examples: Examples, origins: str
) -> None:
    settings = {"DROPSERVE_QUEUE_ROWS": "10", "DROPSERVE_CORS_ORIGINS": origins}
    with service(built / "models", **settings) as client, ThreadPoolExecutor(1) as pool:
        url = f"{client.base_url}/uncertainty"
        long = pool.submit(httpx.post, url, json=long_query(examples, 40), timeout=60)
        wait_for(lambda: held(client))
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nOrigin: https://a.example\r\n"
        head += b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
        with socket.create_connection(("127.0.0.1", client.base_url.port or 80), 30) as sender:
            sender.sendall(head)
            received = b""
            while more := sender.recv(2**20):
                received += more
        assert received.startswith(b"HTTP/1.1 503 ")
        # The client may send the body or not, so it could not be told from a further request.
        assert b"connection: close" in received
        assert (b"access-control-allow-origin: https://a.example" in received) == bool(origins)
        assert long.result().status_code == 200


def test_hundreds_of_pipelined_requests_to_a_full_queue_are_all_answered(
    narrow: httpx.Client, examples: Examples
) -> None:
    sent = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" + 600 * overload.post(
        "/predict", {}
    )
    address = ("127.0.0.1", narrow.base_url.port or 80)
    url = f"{narrow.base_url}/uncertainty"
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(httpx.post, url, json=long_query(examples, 40), timeout=60)
        wait_for(lambda: held(narrow))
        with socket.create_connection(address, timeout=30) as client:
            client.sendall(sent)
            received = b""
            while received.count(b"HTTP/1.1 ") < 601:
                more = client.recv(2**20)
                assert more, "closed before all were answered"
                received += more
            assert received.startswith(b"HTTP/1.1 200 ")
            assert received.count(b"HTTP/1.1 503 ") > 0
        assert long.result().status_code == 200


def test_work_whose_deadline_has_passed_is_not_begun(built: Path, examples: Examples) -> None:
    with service(built / "models") as client:
        headers = {"x-request-timeout-ms": "100"}
        answer = client.post("/uncertainty", json=long_query(examples), headers=headers)
        assert answer.status_code == 504
        assert "not ready within 100 ms" in answer.json()["detail"]
        wait_for(lambda: not held(client))
        # The pieces of a tenth of a second, of a million passes that take seconds.
        ran = passes_run(client)
        assert ran < 500_000
        # And no more of them since, beside other work.
        assert client.post("/uncertainty", json=long_query(examples, 5)).status_code == 200
        assert passes_run(client) == ran + 50_000
        protocol = client.post(
            "/v2/models/digits.mc/infer",
            json={
                "inputs": [
                    {
                        "name": "x",
                        "shape": [100, 64],
                        "datatype": "FP32",
                        "data": np.ravel(long_query(examples)["inputs"]).tolist(),
                    }
                ],
                "parameters": {"passes": 10_000},
            },
            headers=headers,
        )
        assert (protocol.status_code, protocol.json().keys()) == (504, {"error"})


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "3600001", "9" * 5000])
def test_an_invalid_deadline_is_a_400(client: httpx.Client, value: str) -> None:
    body = {"model": "digits", "inputs": [[0.0] * 64]}
    answer = client.post("/predict", json=body, headers={"x-request-timeout-ms": value})
    assert answer.status_code == 400
    assert "must be a whole number from 1 to 3600000" in answer.json()["detail"]


def test_the_default_deadline_comes_from_the_settings(built: Path, examples: Examples) -> None:
    with service(built / "models", DROPSERVE_TIMEOUT_MS="50") as client:
        assert client.post("/uncertainty", json=long_query(examples)).status_code == 504
        patient = {"x-request-timeout-ms": "60000"}
        query = long_query(examples, 5)
        assert client.post("/uncertainty", json=query, headers=patient).status_code == 200


def test_short_requests_get_their_turn_between_the_pieces_of_a_long_query(
    built: Path, examples: Examples
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1], "passes": 100}
    with service(built / "models") as client, ThreadPoolExecutor(1) as pool:
        url = f"{client.base_url}/uncertainty"
        long = pool.submit(httpx.post, url, json=long_query(examples, 30), timeout=120)
        wait_for(lambda: held(client))
        answered = 0
        while not long.done():
            assert client.post("/uncertainty", json=body).status_code == 200
            answered += 1
        assert long.result().status_code == 200
        # Behind the long query only one would have been answered. At most half of more than 40 can
        # have waited a twentieth of the time.
        assert answered > 40


def test_a_client_that_leaves_makes_room_in_the_queue(
    narrow: httpx.Client, examples: Examples
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{narrow.base_url}/uncertainty", json=long_query(examples), timeout=0.3)
    wait_for(lambda: not held(narrow))
    body = {"model": "digits", "inputs": examples("digits")[:1]}
    statuses = Counter(narrow.post("/predict", json=body).status_code for _ in range(5))
    assert statuses == {200: 5}


@pytest.mark.parametrize(("rows", "clients"), [(4096, 64), (200, 900)])
def test_many_bodies_at_once_take_no_more_memory_than_a_few(
    built: Path, rows: int, clients: int
) -> None:
    inputs = np.random.default_rng(0).uniform(0, 16, (rows, 64)).round(6).tolist()
    body = {"model": "digits", "inputs": inputs}
    content = json.dumps(body).encode()
    short = {"model": "digits", "inputs": inputs[:1]}
    most = 8 * 4 * 2**20
    assert len(content) * clients > 3 * most
    with service(built / "models") as client, ThreadPoolExecutor(clients) as pool:
        before = memory(client, "VmHWM")
        request = overload.post("/predict", body)
        address = ("127.0.0.1", client.base_url.port or 80)

        def ask() -> bytes:
            """Send the request; return the beginning of the response."""
            with socket.create_connection(address, timeout=60) as own:
                own.sendall(request)
                return own.recv(1 << 16)

        asked = [pool.submit(ask) for _ in range(clients)]
        # Short requests beside them are answered throughout.
        while not all(each.done() for each in asked):
            assert client.post("/predict", json=short).status_code == 200
        answers = [each.result() for each in asked]
        assert {answer.split(b" ", 2)[1] for answer in answers} == {b"200", b"503"}
        says = f"the queue is full: bytes of bodies of all requests may be at most {most}".encode()
        assert any(says in answer for answer in answers)
        # The text, and some ten times as much for its numbers.
        assert memory(client, "VmHWM") < before + 11 * most
        # All of it is released.
        assert client.post("/predict", json=body).status_code == 200


BRACKETS = {
    "nested": b"[" * 500 + b"]" * 500,
    "empty lists": b"[]",
    "empty objects": b"{}",
    "objects": b'{"a":1}',
}


@pytest.mark.parametrize("part", BRACKETS.values(), ids=BRACKETS.keys())
@pytest.mark.parametrize("path", ["/predict", "/v2/models/digits/infer"])
def test_bodies_of_brackets_cost_little(built: Path, part: bytes, path: str) -> None:
    size = 4 * 2**20
    filled = b",".join([part] * ((size - 100) // (len(part) + 1)))
    if path == "/predict":
        content = b'{"model":"digits","inputs":[%b]}' % filled
    else:
        content = b'{"inputs":[{"name":"x","shape":[1,64],"datatype":"FP32","data":[%b]}]}' % filled
    assert len(content) <= size
    headers = {"content-type": "application/json"}
    with service(built / "models") as client, ThreadPoolExecutor(8) as pool:
        before = memory(client, "VmHWM")
        post = partial(httpx.post, headers=headers, content=content, timeout=60)
        asked = [pool.submit(post, f"{client.base_url}{path}") for _ in range(8)]
        # In between they are answered, too.
        assert client.get("/health/live").status_code == 200
        for each in asked:
            refusal = each.result()
            assert refusal.status_code in ({422, 503} if path == "/predict" else {400, 503})
        assert any("lists and objects" in each.result().text for each in asked)
        # The bodies, and copies of them on their way.
        assert memory(client, "VmHWM") < before + 3 * 8 * size


def test_a_body_of_as_many_rows_as_are_allowed_is_answered(built: Path) -> None:
    with service(built / "models") as client:
        rows = [[0.5] * 64] * 4096
        response = client.post("/predict", json={"model": "digits", "inputs": rows})
        assert (response.status_code, len(response.json()["labels"])) == (200, 4096)
        response = client.post("/predict", json={"model": "digits", "inputs": [*rows, rows[0]]})
        assert response.status_code == 422
        assert "at most 4096 rows are allowed, not 4097" in response.json()["detail"]


def test_a_request_on_a_connection_beyond_the_limit_holds_no_place_in_the_queue(
    built: Path, examples: Examples
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1]}
    request = overload.post("/predict", body)
    limits = {"DROPSERVE_MAX_CONNECTIONS": "2", "DROPSERVE_QUEUE_ROWS": "2"}
    with service(built / "models", **limits) as client:
        address = "127.0.0.1", client.base_url.port or 80
        with (
            socket.create_connection(address, timeout=10),
            socket.create_connection(address, timeout=10),
        ):
            for _ in range(3):
                with socket.create_connection(address, timeout=10) as crowding:
                    crowding.sendall(request)
                    response = b"".join(iter(partial(crowding.recv, 65536), b""))
                assert response.startswith(b"HTTP/1.1 503 ")
                assert b"too many connections are open" in response
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        counted = client.get("/metrics").text
        assert "dropserve_queue_rows 0.0" in counted
        assert 'dropserve_rejected_total{reason="connections"} 3.0' in counted
        assert client.post("/predict", json=body).status_code == 200
