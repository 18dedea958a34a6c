"""The HTTP server: its limits for clients, and its graceful shutdown, which loses no request."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypedDict, Unpack
from unittest.mock import patch

import pytest
import uvicorn

from dropserve.app.http import problems
from dropserve.app.http.bodies import PAUSE, Response, complete
from dropserve.app.server.connection import CROWD, Limits, connection_class, readable
from dropserve.app.server.server import ECHO_SECONDS, GRACE_SECONDS, Server

ROOT = Path(__file__).parents[3]
# Longest wait of a test.
WAIT_SECONDS = 10
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
SLOW = b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n"
SLOW_SECONDS = 0.45
BUSY = b"GET /busy HTTP/1.1\r\nhost: x\r\n\r\n"
BUSY_SECONDS = 1.2
LONG = b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n"
# Too much for the kernel's buffers.
LONG_BYTES = 16 * 2**20
TOO_LONG = "Request Header Fields Too Large"
# Polls of 0.1 s, and the grace period for open connections.
SOON_SECONDS = 0.6

Message = MutableMapping[str, Any]


class Options(TypedDict, total=False):
    """Settings of a server, and of the toy that it serves."""

    connections: int
    head_bytes: int
    receive_seconds: float
    send_seconds: float
    keep_alive: float
    drain_delay: float
    drain_seconds: float
    loop: str
    hesitation: float


class Toy:
    """An application that echoes bodies, waits, or answers before it has read the body."""

    draining = False

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        match scope["path"]:
            case "/health":
                await answer(send, 503 if self.draining else 200, b"health")
            case "/slow" | "/forever":
                print("begun", flush=True)
                await asyncio.sleep(SLOW_SECONDS if scope["path"] == "/slow" else 600)
                await answer(send, 200, b"slow")
            case "/full":
                scope[PAUSE] = True
                await answer(send, 503, b"full")
            case "/early":
                await answer(send, 200, b"early")
            case "/long":
                await answer(send, 200, bytes(LONG_BYTES))
                print("over", flush=True)
            case "/left":
                while (await receive())["type"] != "http.disconnect":
                    pass
                print("left", flush=True)
            case "/unread":
                await asyncio.sleep(SLOW_SECONDS)
                await echo(receive, send)
            case _:
                await echo(receive, send)

    def shed(self, scope: Message) -> Response | None:
        if scope["path"] == "/busy":
            print("begun", flush=True)
            # Blocks the event loop.
            time.sleep(BUSY_SECONDS)
        if scope["path"] != "/full":
            return None
        scope[PAUSE] = True
        return Response(503, b"full", [(b"content-length", b"4")])

    async def crowded(self, scope: Message, receive: Any, send: Any) -> None:
        await answer(send, 200 if scope["path"] == "/health" else 503, b"crowded")

    def malformed(self, status: HTTPStatus, detail: str, scope: Message | None) -> Response:
        request_id = uuid.uuid4().hex
        return complete(problems.write(problems.Problem(status, detail), request_id), request_id)

    def drain(self) -> None:
        self.draining = True
        print("draining", flush=True)


async def answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    with suppress(ConnectionError):
        await send({"type": "http.response.body", "body": body})
        return
    print("unread", flush=True)


async def echo(receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            print("disconnect", flush=True)
            break
        body += message["body"]
        more = message["more_body"]
    await answer(send, 200, body)


def hesitant(seconds: float, port: int) -> bool:
    """Tell whether clients wait at a port; if not, take long, as if other processes had the CPU."""
    found = readable(port)
    if not found:
        print("closing", flush=True)
        time.sleep(seconds)
    return found


def serve(options: Options) -> None:
    """Serve the toy, in a process of its own."""
    toy = Toy()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    limits = Limits(
        options.get("connections", 100),
        options.get("head_bytes", 4096),
        options.get("receive_seconds", 30),
        options.get("send_seconds", 30),
    )
    config = uvicorn.Config(
        toy,
        http=connection_class(toy, limits),
        loop=options.get("loop", "auto"),
        interface="asgi3",
        lifespan="off",
        proxy_headers=False,
        access_log=False,
        ws="none",
        log_level="warning",
        # Declared as an int, but only ever passed on as a timeout.
        timeout_keep_alive=options.get("keep_alive", 5),  # type: ignore[arg-type]
    )
    server = Server(
        config,
        drain_delay=options.get("drain_delay", 0),
        drain_seconds=options.get("drain_seconds", WAIT_SECONDS),
        draining=toy.drain,
        alone=True,
    )
    if "hesitation" in options:
        patch(
            "dropserve.app.server.server.readable", partial(hesitant, options["hesitation"])
        ).start()
    print(listener.getsockname()[1], flush=True)
    server.run([listener])
    print("returned", flush=True)


class Running:
    """A server's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        # When the server had ended: the interpreter takes as long again to end.
        self.returned = 0.0
        self.port = int(self.line())
        # It listens before it serves.
        self.ask(HEALTH.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))

    def line(self) -> str:
        """Wait for the next line that the process writes."""
        assert self.process.stdout
        with self.guarded():
            line = self.process.stdout.readline()
        assert line, "the process has ended"
        return line.strip()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Kill the process if the wait for it takes too long."""
        guard = threading.Timer(3 * WAIT_SECONDS, self.process.kill)
        guard.start()
        try:
            yield
        finally:
            guard.cancel()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS)

    def ask(self, sent: bytes) -> bytes:
        """Send bytes over a new connection; return everything received until it is closed."""
        with self.connect() as client:
            client.sendall(sent)
            return rest(client)

    def stop(self) -> float:
        """Send SIGTERM, wait until the server has noticed, and return the time of sending."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        while self.line() != "draining":
            pass
        return begun

    def ended(self) -> str:
        """Wait for an orderly end; return the log."""
        assert self.process.stdout
        lines = iter(self.process.stdout.readline, "")
        with self.guarded():
            assert any(line == "returned\n" for line in lines)
        self.returned = time.monotonic()
        out, log = self.process.communicate(timeout=WAIT_SECONDS)
        assert (self.process.returncode, out) == (0, ""), log
        return log


@contextmanager
def running(**options: Unpack[Options]) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.app.server.test_server", json.dumps(options)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate(timeout=WAIT_SECONDS)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(receive_seconds=0.3) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        # Nothing that these clients did may be logged.
        assert server.ended() == ""


def until(client: socket.socket, end: bytes) -> bytes:
    """Receive until ``end`` has come."""
    received = client.recv(65536)
    while end not in received:
        more = client.recv(65536)
        assert more, "closed before the response was complete"
        received += more
    return received


def one(client: socket.socket) -> bytes:
    """Receive one response."""
    received = until(client, b"\r\n\r\n")
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += until(client, b"")
    return head + b"\r\n\r\n" + body


def rest(client: socket.socket) -> bytes:
    """Receive until the connection is closed."""
    received = b""
    while more := client.recv(65536):
        received += more
    return received


def check_problem(received: bytes, status: int, title: str) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first == f"HTTP/1.1 {status} {title}"
    headers = dict(line.split(": ", 1) for line in lines)
    document = json.loads(body)
    assert headers["content-type"] == "application/problem+json"
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    assert headers["x-request-id"] == document["request_id"]
    assert len(document.pop("request_id")) == 32
    assert document.pop("detail")
    assert document == {"type": "about:blank", "title": title, "status": status}


# Requests


def test_a_kept_connection_answers_one_request_after_another(server: Running) -> None:
    with server.connect() as client:
        for number in range(3):
            client.sendall(post(b"%d" % number))
            received = one(client)
            assert received.endswith(b"\r\n\r\n%d" % number)
            assert b"connection: close" not in received


def post(body: bytes, path: bytes = b"/echo") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (path, len(body), body)


def test_a_request_may_come_in_pieces(server: Running) -> None:
    with server.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post(b"in pieces"):
            client.sendall(bytes([byte]))
        assert one(client).endswith(b"in pieces")


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"".join(post(b"<%d>" % number) for number in range(3)) + HEALTH[:9])
        received = until(client, b"<2>")
        assert received.index(b"<0>") < received.index(b"<1>") < received.index(b"<2>")
        client.sendall(HEALTH[9:])
        assert one(client).endswith(b"health")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost x\r\n\r\n",
        b"GET \xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
def test_bytes_that_are_not_http_get_a_problem_and_end_the_connection(
    server: Running, sent: bytes
) -> None:
    check_problem(server.ask(sent), 400, "Bad Request")


def test_a_body_that_stops_being_http_gets_a_problem(server: Running) -> None:
    received = server.ask(
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\nno number\r\n"
    )
    assert server.line() == "disconnect"
    check_problem(received, 400, "Bad Request")


def test_a_request_sent_before_nonsense_is_answered(server: Running) -> None:
    received = server.ask(post(b"before") + b"nonsense\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.endswith(b"before")


def test_a_request_to_upgrade_is_answered_without_upgrading(server: Running) -> None:
    asks = b"\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
    with server.connect() as client:
        for body in b"first", b"second":
            client.sendall(post(body).replace(b"\r\n", asks, 1))
            assert one(client).endswith(body)
        client.sendall(post(b"third").replace(b"\r\n", asks, 1) + post(b"fourth"))
        until(client, b"fourth")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /%b HTTP/1.1\r\nhost: x\r\n\r\n" % (b"a" * 4096),
        b"GET / HTTP/1.1\r\na: %b\r\n\r\n" % (b"a" * 4096),
        b"GET / HTTP/1.1\r\n%b\r\n" % (b"a: b\r\n" * 1000),
        b"GET /" + b"a" * 5000,
        b"GET / HTTP/1.1\r\na: " + b"a" * 5000,
    ],
    ids=["url", "value", "lines", "endless url", "endless value"],
)
def test_a_head_that_is_too_long_is_refused(server: Running, sent: bytes) -> None:
    check_problem(server.ask(sent), 431, TOO_LONG)


def test_a_head_that_is_too_long_is_refused_even_if_it_came_with_another_request(
    server: Running,
) -> None:
    head = b"GET / HTTP/1.1\r\na: %b\r\n\r\n" % (b"a" * 4096)
    with server.connect() as client:
        client.sendall(HEALTH + head[:2000])
        assert one(client).endswith(b"health")
        client.sendall(head[2000:])
        check_problem(rest(client), 431, TOO_LONG)


def test_a_long_body_does_not_count_towards_the_length_of_a_head(server: Running) -> None:
    body = b"a" * 1_000_000
    with server.connect() as client:
        for _ in range(2):
            client.sendall(post(body))
            assert one(client).endswith(body)


def test_endless_trailers_are_refused(server: Running) -> None:
    with server.connect() as client:
        client.sendall(
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"
        )
        client.sendall(b"0\r\na: ")
        assert_flood_ends(client)
    assert server.line() == "disconnect"


def assert_flood_ends(client: socket.socket) -> None:
    """Send bytes without end; the server must refuse them with a reason."""
    client.settimeout(0.01)
    end = time.monotonic() + WAIT_SECONDS
    received = b""
    while not received and time.monotonic() < end:
        client.sendall(b"a" * 1000)
        try:
            received = client.recv(65536)
        except TimeoutError:
            continue
    check_problem(received, 431, TOO_LONG)


def test_a_head_that_never_ends_is_refused_while_its_client_still_sends(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"GET /")
        assert_flood_ends(client)


def test_a_client_that_sends_nothing_is_disconnected_without_a_response(server: Running) -> None:
    assert server.ask(b"") == b""


@pytest.mark.parametrize("before", [b"", HEALTH])
def test_a_head_that_comes_late_times_out(server: Running, before: bytes) -> None:
    received = server.ask(before + HEALTH[:20])
    check_problem(received[received.index(b"HTTP/1.1 408") :], 408, "Request Timeout")


def test_a_body_that_comes_late_times_out_and_the_application_is_told(server: Running) -> None:
    received = server.ask(post(b"all of it")[:-1])
    assert server.line() == "disconnect"
    check_problem(received, 408, "Request Timeout")


def test_a_body_that_trickles_times_out_as_a_whole(server: Running) -> None:
    with server.connect() as client:
        client.settimeout(0.05)
        client.sendall(post(b"a" * 1000)[:-1000])
        end = time.monotonic() + WAIT_SECONDS
        received = b""
        while not received and time.monotonic() < end:
            client.sendall(b"a")
            try:
                received = client.recv(65536)
            except TimeoutError:
                continue
        check_problem(received, 408, "Request Timeout")
    assert server.line() == "disconnect"


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["new", "kept"])
def test_a_request_that_came_before_the_idle_timeout_is_answered(before: bytes) -> None:
    with (
        running(keep_alive=1, receive_seconds=1) as server,
        server.connect() as client,
        server.connect() as silent,
        server.connect() as busy,
    ):
        if before:
            for each in client, silent:
                each.sendall(before)
                assert one(each).endswith(b"health")
        busy.sendall(BUSY)
        assert server.line() == "begun"
        # The idle timeout passes before the server can read these, of which one is no request.
        client.sendall(post(b"in time"))
        silent.sendall(b"\r\n")
        assert one(client).endswith(b"in time")
        # After that both are idle.
        assert rest(client) == rest(silent) == b""


# Slow readers

FREE = b"POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 4\r\n\r\nfree"


@contextmanager
def slow_reader(server: Running) -> Iterator[socket.socket]:
    """Connect with a small buffer, so that what the client does not read stays with the server."""
    with socket.socket() as client:
        client.settimeout(WAIT_SECONDS)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        yield client


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_client_may_read_more_slowly_than_the_idle_timeout(loop: str) -> None:
    with running(keep_alive=0.2, loop=loop) as server, slow_reader(server) as client:
        client.sendall(LONG)
        received = b""
        # Long pauses, and several of them at a point where the kernel holds all that is left.
        for size in (2**20, LONG_BYTES - 2**22, 2**20, 2**20):
            time.sleep(0.5)
            received += exactly(client, size)
        time.sleep(0.5)
        client.sendall(HEALTH)
        received += until(client, b"health")
        body = received.partition(b"\r\n\r\n")[2]
        assert body[:LONG_BYTES] == bytes(LONG_BYTES)
        assert body[LONG_BYTES:].startswith(b"HTTP/1.1 200 OK\r\n")
        # Now it is idle.
        assert rest(client) == b""


def exactly(client: socket.socket, size: int) -> bytes:
    """Receive a number of bytes."""
    received = b""
    while len(received) < size:
        more = client.recv(min(65536, size - len(received)))
        assert more, "closed before the response was complete"
        received += more
    return received


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("close", [b"", b"connection: close\r\n"], ids=["kept", "closed"])
def test_a_client_that_does_not_read_is_disconnected(loop: str, close: bytes) -> None:
    with running(connections=2, send_seconds=0.5, loop=loop) as server, ExitStack() as stack:
        clients = [stack.enter_context(slow_reader(server)) for _ in range(2)]
        for client in clients:
            client.sendall(LONG.replace(b"\r\n", b"\r\n" + close, 1))
        assert [server.line() for _ in range(4)].count("unread") == 2
        for client in clients:
            with pytest.raises(ConnectionResetError):
                rest(client)
        # Their places are free again.
        assert server.ask(FREE).endswith(b"free")


def test_a_client_that_pipelines_short_requests_and_does_not_read_is_disconnected() -> None:
    with (
        running(connections=1, keep_alive=0.2, send_seconds=0.5) as server,
        slow_reader(server) as client,
    ):
        client.sendall(1_000 * post(b"a" * 1000))
        assert server.ask(FREE).endswith(b"crowded")
        wait_for(lambda: server.ask(FREE).endswith(b"free"))
        with pytest.raises(ConnectionResetError):
            rest(client)


def test_a_client_that_reads_steadily_may_take_long() -> None:
    with running(send_seconds=1.5) as server, slow_reader(server) as client:
        client.sendall(LONG)
        received = exactly(client, LONG_BYTES - 2**24 + 2**17)
        for _ in range(6):
            time.sleep(0.4)
            received += exactly(client, 2**17)
        received += exactly(client, LONG_BYTES - len(received))
        assert server.line() == "over"


# Clients that send no more


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_request_is_answered_though_its_client_will_send_no_more(
    loop: str, version: bytes
) -> None:
    with running(loop=loop) as server:
        for sent in (HEALTH, SLOW, HEALTH + SLOW):
            with server.connect() as client:
                client.sendall(sent.replace(b"HTTP/1.1", b"HTTP/" + version))
                client.shutdown(socket.SHUT_WR)
                received = rest(client)
            received = received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
            # A connection of HTTP/1.0 is closed after the first response.
            bodies = [b"health"] * (HEALTH in sent) + [b"slow"] * (SLOW in sent)
            bodies = bodies if version == b"1.1" else bodies[:1]
            assert received.count(b"HTTP/1.1 200 OK\r\n") == len(bodies)
            assert received.endswith(bodies[-1])


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_part_of_a_request_before_the_end_of_a_connection_is_forgotten(loop: str) -> None:
    with running(receive_seconds=2 * SLOW_SECONDS, loop=loop) as server:
        with server.connect() as client:
            client.sendall(SLOW + HEALTH[:10])
            client.shutdown(socket.SHUT_WR)
            assert rest(client).endswith(b"slow")
        # Its time to arrive is over.
        time.sleep(2 * SLOW_SECONDS)
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == ""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_the_application_is_told_that_a_client_has_left(loop: str) -> None:
    with running(loop=loop) as server:
        with server.connect() as client:
            client.sendall(LONG.replace(b"/long", b"/left"))
            time.sleep(0.1)
        assert server.line() == "left"


@pytest.mark.parametrize(
    "host", [b"", b"host: x\r\nhost: x\r\n", b"host: x\r\nHost: y\r\n"], ids=str
)
def test_a_request_without_one_host_is_refused(server: Running, host: bytes) -> None:
    received = server.ask(HEALTH.replace(b"host: x\r\n", host))
    check_problem(received, 400, "Bad Request")


def test_a_request_of_an_older_version_needs_no_host(server: Running) -> None:
    assert server.ask(b"GET /health HTTP/1.0\r\n\r\n").endswith(b"health")


@pytest.mark.parametrize(
    ("coding", "status"),
    [(b"gzip, chunked", 501), (b"gzip", 501), (b"identity", 501), (b"chunked, chunked", 400)],
)
def test_a_transfer_coding_other_than_chunked_is_refused(
    server: Running, coding: bytes, status: int
) -> None:
    head = b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: %b\r\n\r\n" % coding
    received = server.ask(head + b"1\r\na\r\n0\r\n\r\n")
    check_problem(received, status, HTTPStatus(status).phrase)


def test_a_chunked_body_is_taken(server: Running) -> None:
    head = b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: Chunked\r\n\r\n"
    with server.connect() as client:
        client.sendall(head + b"1\r\na\r\n0\r\n\r\n")
        assert one(client).endswith(b"a")


def test_a_response_may_take_longer_than_a_request(server: Running) -> None:
    with server.connect() as client:
        for _ in range(2):
            client.sendall(SLOW)
            assert server.line() == "begun"
            assert one(client).endswith(b"slow")


def test_a_body_that_the_application_does_not_read_yet_does_not_time_out(server: Running) -> None:
    body = b"a" * 1_000_000
    with server.connect() as client:
        client.sendall(post(body, b"/unread"))
        assert one(client).endswith(body)


def test_a_body_that_waits_for_100_continue_does_not_time_out(server: Running) -> None:
    head = post(b"body", b"/unread")[:-4].replace(b"\r\n", b"\r\nexpect: 100-continue\r\n", 1)
    with server.connect() as client:
        client.sendall(head)
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"body")
        assert one(client).endswith(b"body")


def test_a_connection_whose_request_was_answered_early_serves_the_next(server: Running) -> None:
    with server.connect() as client:
        client.sendall(post(b"a" * 10_000, b"/early")[:-1])
        assert one(client).endswith(b"early")
        client.sendall(b"a" + HEALTH)
        assert one(client).endswith(b"health")


def test_a_connection_is_closed_if_the_body_stays_out_after_an_early_response(
    server: Running,
) -> None:
    assert server.ask(post(b"body", b"/early")[:-1]).endswith(b"early")


def test_requests_refused_at_once_are_answered_in_order(server: Running) -> None:
    sent = [post(b"first"), post(b"none", b"/full"), post(b"none", b"/full"), HEALTH]
    for pieces in ([b"".join(sent)], sent, [b"".join(sent)[:-9], HEALTH[-9:]]):
        with server.connect() as client:
            received = b""
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.01)
            received = until(client, b"health")
        assert received.count(b"HTTP/1.1 503 ") == received.count(b"\r\n\r\nfull") == 2
        assert received.index(b"first") < received.index(b"full") < received.index(b"health")


def test_a_request_refused_at_once_may_still_send_its_body(server: Running) -> None:
    with server.connect() as client:
        client.sendall(post(b"a" * 10_000, b"/full")[:-1])
        assert one(client).endswith(b"full")
        client.sendall(b"a" + HEALTH)
        assert one(client).endswith(b"health")


@pytest.mark.quiet
def test_a_refused_client_that_keeps_sending_is_read_ever_later(server: Running) -> None:
    with server.connect() as client:
        refused = 0
        end = time.monotonic() + 1
        while time.monotonic() < end:
            client.sendall(post(b"", b"/full"))
            assert one(client).endswith(b"full")
            refused += 1
        # It pauses for 0.05, 0.1, 0.2, 0.4, 0.5 s at least.
        assert refused <= 6
        client.sendall(HEALTH)
        assert one(client).endswith(b"health")
        # After another answer it pauses for 0.1 s at most again.
        client.settimeout(0.4)
        client.sendall(post(b"", b"/full"))
        assert one(client).endswith(b"full")
        client.sendall(HEALTH)
        assert one(client).endswith(b"health")


# Number of connections


def test_connections_beyond_the_limit_get_an_answer_to_health_probes_alone() -> None:
    with running(connections=2) as server, ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(server.connect())

        for client in [connect() for _ in range(2)]:
            client.sendall(HEALTH)
            assert one(client).endswith(b"health")
        for path, status in (b"/health", b"200"), (b"/echo", b"503"):
            received = server.ask(HEALTH.replace(b"/health", path))
            assert received.startswith(b"HTTP/1.1 " + status)
            assert b"connection: close" in received
            assert received.endswith(b"crowded")
        crowd = [connect() for _ in range(CROWD)]
        for _ in range(3):
            # Closed before the request comes, it ends; afterwards, it is reset.
            received = b""
            with suppress(ConnectionError):
                received = server.ask(HEALTH)
            assert received == b""
        crowd[-1].sendall(HEALTH)
        assert rest(crowd[-1]).endswith(b"crowded")
        crowd[0].close()
        wait_for(lambda: server.ask(HEALTH).endswith(b"crowded"))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        try:
            if condition():
                return
        except ConnectionError:
            pass
        time.sleep(0.01)
    raise AssertionError("the condition never held")


# Shutdown


@pytest.mark.quiet
def test_an_idle_server_ends_soon() -> None:
    with running() as server, server.connect() as silent, server.connect() as kept:
        kept.sendall(HEALTH)
        assert one(kept).startswith(b"HTTP/1.1 200 ")
        begun = server.stop()
        assert rest(kept) == rest(silent) == b""
        assert server.ended() == ""
        assert server.returned - begun < SOON_SECONDS


@pytest.mark.quiet
def test_requests_are_accepted_during_the_drain_delay() -> None:
    with running(drain_delay=0.3) as server, server.connect() as kept:
        kept.sendall(HEALTH)
        assert one(kept).startswith(b"HTTP/1.1 200 ")
        begun = server.stop()
        for client in kept, server.connect():
            with client:
                client.sendall(HEALTH)
                received = rest(client)
                assert received.startswith(b"HTTP/1.1 503 ")
                assert b"connection: close" in received
        assert server.ask(post(b"work")).endswith(b"work")
        wait_for(lambda: refuses(server))
        assert time.monotonic() - begun > 0.3
        assert server.ended() == ""


def refuses(server: Running) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.quiet
def test_a_request_under_way_is_answered_and_then_the_process_ends() -> None:
    with running() as server, server.connect() as client:
        client.sendall(SLOW)
        assert server.line() == "begun"
        server.stop()
        received = rest(client)
        done = time.monotonic()
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in received
        assert received.endswith(b"slow")
        assert server.ended() == ""
        assert server.returned - done < SOON_SECONDS


def test_a_request_of_which_only_a_part_had_come_is_answered() -> None:
    with running() as server, server.connect() as client:
        client.sendall(HEALTH[:10])
        server.stop()
        wait_for(lambda: refuses(server))
        client.sendall(HEALTH[10:])
        assert rest(client).startswith(b"HTTP/1.1 503 ")
        assert server.ended() == ""


@pytest.mark.quiet
def test_a_response_that_exceeds_the_drain_limit_is_cancelled() -> None:
    with running(drain_seconds=0.3) as server, server.connect() as client:
        client.sendall(SLOW.replace(b"/slow", b"/forever"))
        assert server.line() == "begun"
        begun = server.stop()
        rest(client)
        assert "timeout graceful shutdown exceeded" in server.ended()
        assert 0.3 < server.returned - begun < 0.3 + SOON_SECONDS


def test_a_response_that_its_client_does_not_read_is_dropped_at_the_drain_limit() -> None:
    large = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % 2**24 + bytes(2**24)
    with running(drain_seconds=0.3) as server, server.connect() as client:
        # The first response fills all buffers, so the second waits for them.
        client.sendall(large + SLOW)
        assert server.line() == "begun"
        time.sleep(2 * SLOW_SECONDS)
        server.stop()
        log = server.ended()
    assert "timeout graceful shutdown exceeded" in log
    assert "Traceback" not in log


@pytest.mark.quiet
@pytest.mark.parametrize(("drain_delay", "second"), [(0.0, signal.SIGTERM), (60.0, signal.SIGINT)])
def test_a_second_signal_ends_at_once(drain_delay: float, second: signal.Signals) -> None:
    with running(drain_delay=drain_delay, drain_seconds=60) as server, server.connect() as client:
        client.sendall(SLOW.replace(b"/slow", b"/forever"))
        assert server.line() == "begun"
        server.stop()
        time.sleep(ECHO_SECONDS)
        begun = time.monotonic()
        server.process.send_signal(second)
        server.ended()
        assert server.returned - begun < SOON_SECONDS


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_right_after_the_first_is_the_same_one(second: signal.Signals) -> None:
    with running() as server, server.connect() as client:
        client.sendall(SLOW)
        assert server.line() == "begun"
        server.stop()
        for _ in range(2):
            server.process.send_signal(second)
        assert rest(client).endswith(b"slow")
        assert server.ended() == ""


def test_requests_and_connections_that_the_kernel_still_holds_are_answered() -> None:
    # Stopped, the process reads and accepts nothing while requests and the signal come.
    with running(connections=200) as server, ExitStack() as stack:
        kept = [stack.enter_context(server.connect()) for _ in range(20)]
        for client in kept:
            client.sendall(HEALTH)
            one(client)
        os.kill(server.process.pid, signal.SIGSTOP)
        clients = [*kept, *(stack.enter_context(server.connect()) for _ in range(100))]
        for number, client in enumerate(clients):
            client.sendall(post(b"<%d>" % number))
        server.process.send_signal(signal.SIGTERM)
        os.kill(server.process.pid, signal.SIGCONT)
        for number, client in enumerate(clients):
            assert rest(client).endswith(b"<%d>" % number)
        assert server.ended() == ""


@pytest.mark.parametrize(
    ("keep", "drain_delay", "loop"),
    [
        (True, 0.0, "uvloop"),
        (False, 0.0, "uvloop"),
        (True, 0.5, "uvloop"),
        (False, 0.0, "asyncio"),
    ],
)
def test_no_request_under_load_is_lost(keep: bool, drain_delay: float, loop: str) -> None:
    with running(drain_delay=drain_delay, loop=loop) as server:
        loads = [Load(server.port, keep) for _ in range(8)]
        for load in loads:
            load.start()
        wait_for(lambda: all(load.answered > 5 for load in loads))
        server.stop()
        for load in loads:
            load.join(timeout=WAIT_SECONDS)
        assert not any(load.is_alive() for load in loads)
        assert [load.lost for load in loads if load.lost] == []
        assert server.ended() == ""


def test_no_client_is_lost_however_long_closing_the_port_takes() -> None:
    with running(hesitation=0.5) as server, ThreadPoolExecutor(8) as clients:
        server.process.send_signal(signal.SIGTERM)
        while server.line() != "closing":
            pass
        errors = [
            each.exception() for each in [clients.submit(server.ask, HEALTH) for _ in range(8)]
        ]
        assert Counter(map(type, errors)) == {ConnectionRefusedError: 8}
        assert server.ended() == ""


class Load(threading.Thread):
    """A client that sends one request after another until it cannot connect any more.

    Any request without its response is lost, but for the one that HTTP leaves open (RFC 9112,
    section 9.5): it was sent over a kept connection at the moment at which the server closed that
    for being idle. The client can tell: the connection closes without a byte of the response, and
    at least `GRACE_SECONDS` after the request before. It may send such a request again.

    Parameters
    ----------
    port
        The server's.
    keep
        Whether it keeps its connection for further requests.
    """

    def __init__(self, port: int, keep: bool) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.keep = keep
        self.answered = 0
        self.lost: Exception | None = None

    def run(self) -> None:
        address = ("127.0.0.1", self.port)
        try:
            while True:
                try:
                    client = socket.create_connection(address, timeout=WAIT_SECONDS)
                except ConnectionError:
                    # No request has been sent.
                    return
                with client:
                    self.use(client)
        except Exception as error:
            self.lost = error

    def use(self, client: socket.socket) -> None:
        """Send one request, or if the connection is kept as many as the server takes."""
        sent = time.monotonic()
        more = self.send(client)
        while self.keep and more:
            time.sleep(0.002)
            try:
                # Like any HTTP client, look first whether the connection is still open.
                before, sent = sent, time.monotonic()
                if readable(client.fileno()):
                    assert client.recv(1) == b""
                    raise Unanswered
                more = self.send(client)
            except Unanswered:
                assert time.monotonic() - before >= GRACE_SECONDS
                return

    def send(self, client: socket.socket) -> bool:
        """Send a request and check the response; tell whether the connection stays open.

        Raises
        ------
        Unanswered
            If the connection is closed without a byte of the response.
        """
        body = b"%d" % self.answered
        try:
            client.sendall(post(body))
            begun = client.recv(1, socket.MSG_PEEK)
        except ConnectionError as error:
            raise Unanswered from error
        if not begun:
            raise Unanswered
        received = one(client)
        assert received.endswith(b"\r\n\r\n" + body)
        self.answered += 1
        return b"connection: close" not in received


class Unanswered(Exception):
    """A connection was closed without a byte of a response."""


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
