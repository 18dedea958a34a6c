"""How requests affect each other: shared runs, long queries, clients that leave, workers."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dropserve.app.server.server import STOP
from tests.conftest import PATIENCE, children, service, wait_for
from tests.end_to_end.test_metrics import scrape, value

Examples = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def served(built: Path) -> Iterator[httpx.Client]:
    """A client of a service that no other test uses."""
    with service(built / "models") as client:
        yield client


def long_query(examples: Examples, rows: int = 100) -> dict[str, Any]:
    """Return a query of 10,000 passes of each row, by default seconds of work."""
    inputs = (examples("digits") * 10)[:rows]
    return {"model": "digits", "inputs": inputs, "passes": 10_000, "seed": 1}


def held(client: httpx.Client) -> bool:
    """Tell whether any request is under way."""
    return value(scrape(client), "dropserve_queue_rows") > 0


def passes_run(client: httpx.Client) -> float:
    """Return how many passes the service has run since it started."""
    return value(scrape(client), "dropserve_batch_size_sum", graph="stochastic")


def test_many_requests_at_once_get_the_answers_they_get_alone(
    served: httpx.Client, examples: Examples
) -> None:
    rows = examples("digits")
    bodies = [
        (route, {"model": "digits", "inputs": rows[n % 7 : n % 7 + 1 + n % 3]} | more)
        for n in range(60)
        for route, more in (
            ("/predict", {}),
            ("/uncertainty", {"passes": 1 + 7 * (n % 5), "seed": n}),
        )
    ]

    def ask(each: tuple[str, dict[str, Any]]) -> Any:
        answer = served.post(each[0], json=each[1])
        assert answer.status_code == 200
        return answer.json()

    alone = [ask(each) for each in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, bodies))
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        name = "probabilities" if "probabilities" in one else "mean"
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_bad_rows_in_a_shared_run_are_refused_alone(
    served: httpx.Client, examples: Examples
) -> None:
    row = examples("digits")[0]
    good = {"model": "digits", "inputs": [row]}
    kinds = [good, good | {"inputs": [row, [1.0]]}, good | {"inputs": [["x"] * 64]}]

    def ask(number: int) -> tuple[int, Any]:
        answer = served.post("/predict", json=kinds[number % 3])
        return answer.status_code, answer.json()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(90)))
    assert [status for status, _ in found] == [200, 422, 422] * 30
    assert {body["errors"][0]["path"] for _, body in found[1::3]} == {"inputs.1"}
    assert {body["errors"][0]["path"] for _, body in found[2::3]} == {"inputs.0.0"}


def test_short_requests_are_answered_while_a_long_query_runs(
    served: httpx.Client, examples: Examples
) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(
            httpx.post, f"{served.base_url}/uncertainty", json=long_query(examples), timeout=120
        )
        wait_for(lambda: held(served))
        for _ in range(5):
            assert served.get("/health/live").status_code == 200
            short = {"model": "digits", "inputs": examples("digits")[:1], "passes": 10}
            assert served.post("/uncertainty", json=short).status_code == 200
            assert served.post("/predict", json=short | {"passes": 1}).status_code == 422
        assert not long.done()
        assert long.result().status_code == 200


def test_a_client_that_leaves_costs_nothing_more(served: httpx.Client, examples: Examples) -> None:
    body = json.dumps(long_query(examples)).encode()
    head = "POST /uncertainty HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    before = passes_run(served)
    for _ in range(5):
        with socket.create_connection((served.base_url.host, served.base_url.port or 80)) as gone:
            gone.sendall(request)
            wait_for(lambda: held(served))
        wait_for(lambda: not held(served))
    ran = passes_run(served)
    # Five million, were they all run.
    assert ran - before < 2_000_000
    # And no more of them since, beside other work.
    assert served.post("/uncertainty", json=long_query(examples, 5)).status_code == 200
    assert passes_run(served) == ran + 50_000


@pytest.mark.parametrize("number", [signal.SIGKILL, STOP])
def test_workers_share_a_port_and_one_that_dies_or_ends_is_replaced(
    built: Path, served: httpx.Client, examples: Examples, number: signal.Signals
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:2], "seed": 5}
    expected = served.post("/uncertainty", json=body).json()

    def check(answer: Any) -> None:
        # Workers may cut a query into other pieces, whose products round differently.
        assert answer.keys() == expected.keys()
        np.testing.assert_allclose(answer["mean"], expected["mean"], atol=1e-5)
        np.testing.assert_allclose(answer["std"], expected["std"], atol=1e-5)

    with service(built / "models", DROPSERVE_WORKERS="2") as client:
        pid = int(client.headers["x-test-pid"])
        wait_for(lambda: len(children(pid)) == 2)
        url = f"{client.base_url}/uncertainty"
        for _ in range(10):
            check(httpx.post(url, json=body, timeout=PATIENCE).json())
        first, _ = children(pid)
        os.kill(first, number)
        wait_for(lambda: len(children(pid) - {first}) == 2)
        for _ in range(10):
            check(httpx.post(url, json=body, timeout=PATIENCE).json())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_run_takes_as_many_threads_as_it_is_told(built: Path, threads: int) -> None:
    def count(client: httpx.Client) -> int:
        return len(list(Path(f"/proc/{client.headers['x-test-pid']}/task").iterdir()))

    with service(built / "models", DROPSERVE_THREADS="1") as client:
        base = count(client)
    models = len(list((built / "models").iterdir()))
    with service(built / "models", DROPSERVE_THREADS=str(threads)) as client:
        # Each of a model's two sessions adds its own threads to the one that calls it.
        assert count(client) - base == 2 * models * (threads - 1)
