"""Graceful shutdown: accepted requests are answered, and readiness keeps new ones away."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import children, service, wait_for

Examples = Callable[[str], list[Any]]
WORKERS = ["1", "2"]
# Beyond `PATIENCE`: a service whose end a test has seen did not wait for its limit.
NO_LIMIT = {"DROPSERVE_DRAIN_SECONDS": "300"}
DELAY_SECONDS = 3


def tell_to_end(client: httpx.Client) -> None:
    os.kill(int(client.headers["x-test-pid"]), signal.SIGTERM)


def status(client: httpx.Client, path: str) -> int:
    """Return the status of a GET over a new connection, for any worker; 0 if refused."""
    try:
        return httpx.get(f"{client.base_url}{path}", timeout=10).status_code
    except httpx.ConnectError:
        return 0


def ended(client: httpx.Client) -> Callable[[], bool]:
    """Return a condition: all processes of the service, as they are now, have ended."""
    pid = int(client.headers["x-test-pid"])
    those = {pid} | children(pid)

    def check() -> bool:
        # Nobody has waited for the first process, so it stays as a zombie.
        return all(
            "Z" in Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0]
            for each in those
            if Path(f"/proc/{each}/stat").exists()
        )

    return check


@pytest.mark.parametrize("workers", WORKERS)
def test_while_draining_the_service_is_not_ready_but_accepts_requests(
    built: Path, examples: Examples, workers: str
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1]}
    environment = NO_LIMIT | {
        "DROPSERVE_WORKERS": workers,
        "DROPSERVE_DRAIN_DELAY_SECONDS": str(DELAY_SECONDS),
    }
    with service(built / "models", **environment) as client:
        wait_for(lambda: {status(client, "/health/ready") for _ in range(6)} == {200})
        told = time.monotonic()
        tell_to_end(client)
        wait_for(lambda: {status(client, "/health/ready") for _ in range(6)} == {503})
        assert status(client, "/v2/health/ready") == 503
        assert status(client, "/health/live") == status(client, "/v2/health/live") == 200
        answer = httpx.post(f"{client.base_url}/predict", json=body)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        wait_for(ended(client))
        assert time.monotonic() - told >= DELAY_SECONDS
        assert status(client, "/health/live") == 0


@pytest.mark.quiet
@pytest.mark.parametrize("workers", WORKERS)
def test_accepted_requests_are_answered_and_then_the_service_ends(
    built: Path, examples: Examples, workers: str
) -> None:
    inputs = (examples("digits") * 10)[:20]
    body = {"model": "digits", "inputs": inputs, "passes": 10_000, "seed": 1}
    with service(built / "models", DROPSERVE_WORKERS=workers) as client:
        url = f"{client.base_url}/uncertainty"
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(httpx.post, url, json=body, timeout=120) for _ in range(4)]
            wait_for(lambda: "dropserve_queue_rows 0.0" not in client.get("/metrics").text)
            time.sleep(0.3)
            tell_to_end(client)
            answers = [each.result() for each in asked]
        answered = time.monotonic()
        assert {answer.status_code for answer in answers} == {200}
        first, *others = (np.array(answer.json()["mean"]) for answer in answers)
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-5)
        wait_for(ended(client))
        assert time.monotonic() - answered < 3


def test_a_request_that_exceeds_the_drain_limit_is_cut_off(built: Path, examples: Examples) -> None:
    inputs = (examples("digits") * 10)[:100]
    body = {"model": "digits", "inputs": inputs, "passes": 10_000}
    with service(built / "models", DROPSERVE_DRAIN_SECONDS="0.5") as client:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{client.base_url}/uncertainty", json=body, timeout=60)
            wait_for(lambda: "dropserve_queue_rows 0.0" not in client.get("/metrics").text)
            tell_to_end(client)
            wait_for(ended(client))
            answer = asked.result()
        # It would have been 200 after some seconds more.
        assert answer.status_code == 503
        assert answer.json()["detail"] == "the service ended before the answer was ready"


def test_a_service_that_is_told_to_end_while_it_starts_ends(built: Path) -> None:
    with service(built / "models", DROPSERVE_WORKERS="2") as client:
        tell_to_end(client)
        wait_for(ended(client))
