"""Clients that read long responses slowly, or not at all."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import overload
from tests.conftest import events, memory, service, wait_for

Examples = Callable[[str], list[Any]]


@contextmanager
def reader(client: httpx.Client, request: bytes) -> Iterator[socket.socket]:
    """Send a request from a client whose system holds little of the response."""
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.settimeout(60)
        own.connect(("127.0.0.1", client.base_url.port or 80))
        own.sendall(request)
        yield own


def long_request(examples: Examples) -> bytes:
    """Return a request whose response is of some 12 MB."""
    body = {"model": "digits", "inputs": examples("digits")[:10], "passes": 10_000, "seed": 7}
    return overload.post("/debug/mc", body)


def test_a_response_that_is_read_more_slowly_than_the_idle_timeout_comes_whole(
    built: Path, examples: Examples, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        service(built / "models", DROPSERVE_KEEP_ALIVE_SECONDS="0.2") as client,
        reader(client, long_request(examples)) as slow,
    ):
        received = slow.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        length = int(overload.header(head, b"content-length", 0))
        assert length > 10e6
        parts = [body]
        while sum(map(len, parts)) < length:
            # For 3 s in all, some ten times the idle timeout.
            if len(parts) % 50 == 0 and len(parts) < 1000:
                time.sleep(0.15)
            more = slow.recv(65536)
            assert more, "cut short"
            parts.append(more)
        assert len(json.loads(b"".join(parts))["samples"]) == 10_000
        assert slow.recv(1) == b""
    (line,) = [each for each in events(capfd.readouterr().out) if each.get("passes") == 10_000]
    assert line["status"] == 200


def test_clients_that_do_not_read_hold_neither_connections_nor_memory_for_good(
    built: Path, examples: Examples
) -> None:
    most = 30 * 2**20
    settings = {
        "DROPSERVE_MAX_CONNECTIONS": "6",
        "DROPSERVE_MAX_UNREAD_BYTES": str(most),
        "DROPSERVE_SEND_SECONDS": "3",
    }
    row = {"model": "digits", "inputs": examples("digits")[:1]}
    with service(built / "models", **settings) as client, ExitStack() as stack:
        assert client.post("/predict", json=row).status_code == 200
        before = memory(client, "VmHWM")
        silent = [stack.enter_context(reader(client, long_request(examples))) for _ in range(5)]

        def answered(status: int) -> float:
            found = re.search(
                rf'requests_total{{.*route="/debug/mc",status="{status}".* ([0-9.]+)\n',
                client.get("/metrics").text,
            )
            return float(found[1]) if found else 0

        # The responses of two fit within the limit, and short ones are not held up.
        wait_for(lambda: answered(503) == 3)
        found = re.search(r"\ndropserve_unread_bytes (\S+)\n", client.get("/metrics").text)
        assert found
        assert 20e6 < float(found[1]) <= most
        assert client.post("/predict", json=row).status_code == 200
        wait_for(lambda: answered(499) == 2)
        assert 'dropserve_rejected_total{reason="unread"} 2.0' in client.get("/metrics").text
        assert "dropserve_unread_bytes 0.0" in client.get("/metrics").text
        # Responses, the samples that they are made of, and copies on their way to the socket.
        assert memory(client, "VmHWM") < before + 6 * most
        received = [rest(each) for each in silent]
        assert sum(b"HTTP/1.1 200 OK" in each for each in received) == 2
        assert sum(b"yet to read" in each for each in received) == 3
        # All connections but the client's own, which can thus be used again.
        wait_for(lambda: "dropserve_connections 1.0" in client.get("/metrics").text)


def rest(client: socket.socket) -> bytes:
    """Receive until the connection ends, in order or by a reset."""
    received = b""
    try:
        while more := client.recv(2**20):
            received += more
    except ConnectionResetError:
        pass
    return received


def test_the_work_for_a_client_that_has_left_is_not_gone_on_with(
    built: Path, examples: Examples, capfd: pytest.CaptureFixture[str]
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1] * 100, "passes": 10_000}
    with service(built / "models") as client:
        with reader(client, overload.post("/uncertainty", body)):
            wait_for(lambda: "dropserve_queue_rows 1e+06" in client.get("/metrics").text)
        wait_for(lambda: "dropserve_queue_rows 0.0" in client.get("/metrics").text)
    (line,) = [each for each in events(capfd.readouterr().out) if each.get("rows") == 100]
    assert line["status"] == 499


def test_a_long_query_of_a_client_that_will_send_no_more_is_answered(
    built: Path, examples: Examples
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:1] * 10, "passes": 10_000}
    with (
        service(built / "models") as client,
        reader(client, overload.post("/uncertainty", body)) as half,
    ):
        half.shutdown(socket.SHUT_WR)
        received = rest(half)
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    head, _, content = received[received.rindex(interim) + len(interim) :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert json.loads(content)["passes"] == 10_000
