"""How does the service cope with overload: 400 connections, a queue of 64 rows? ``make overload``.

The targets: no status but 200 and 503; a live probe within 0.5 s throughout; for accepted requests
a p99 below 3 times the unloaded p99 plus the time to work off a full queue; memory that comes
back down. The table has a row for each load:

- *unloaded*: one keep-alive connection, one prediction of a row after another.
- *saturated*: 32 keep-alive connections, each sending its next request as soon as it has the
  response, none refused. The time per response is that of a row; a full queue takes 64 times that.
- *patient*: 400 keep-alive connections, all opened at once. After a 200 a client sends its next
  request at once; after a 503 it waits for the time in Retry-After plus a random share, up to half,
  of it, so that clients refused together do not return together.
- *impatient*: the same, except that clients do not wait after a 503 either.

Latency runs from writing a request to receiving its whole response, measured in the client from the
first request on. The service has one core, the clients (one process, on uvloop) the other. Every
tenth of a second the same process opens a new connection for the live probe.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvloop

from benchmarks import figures, network, timing

QUEUE_ROWS = 64
CONNECTIONS, SATURATING = 400, 32
SECONDS = 10.0
PROBE_SECONDS = 0.1
# For memory to come back down.
REST_SECONDS = 2.0
START_SECONDS = 60
LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@dataclass
class Running:
    """A running service: its process, its log and its port."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0

    def memory(self) -> float:
        """Return resident memory in MB."""
        return resident(self.process.pid)

    def errors(self) -> list[str]:
        """Return the lines of the log above the level of information."""
        with self.log.open() as lines:
            return [line for line in lines if '"level":"info"' not in line]

    def wait(self) -> None:
        """Wait until the service listens, and read its port from the log."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log.read_text())
            if found:
                self.port = int(found[1])
                return
            time.sleep(START_SECONDS / 1000)
        raise RuntimeError(f"no service: {self.log.read_text()}")


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


@contextmanager
def served(models: Path, core: int | None = None, **environment: str) -> Iterator[Running]:
    """Run the service on the CPU until the block ends, pinned to ``core`` if there is one."""
    command = [sys.executable, "-m", "app", "--models", str(models), "--port", "0"]
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    # A file, not a pipe, whose reader would take time from the clients.
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            pinned + command,
            env=os.environ | {"DROPSERVE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | environment,
            stderr=log,
        )
        running = Running(process, Path(log.name))
        try:
            running.wait()
            yield running
        finally:
            process.terminate()
            try:
                process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Load:
    """Outcome of a load: seconds of each response by status, of each live probe, and memory."""

    answers: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    lost: int = 0
    live: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    # One whole response for each status other than 200.
    seen: dict[int, bytes] = field(default_factory=dict)

    def percentile(self, share: float) -> float:
        """Return a percentile of the latency of accepted requests, in seconds."""
        return float(np.percentile(self.answers[200], share))


class Client(asyncio.Protocol):
    """A keep-alive connection that sends the same request over and over.

    Parameters
    ----------
    request
        The whole request, head and body.
    patient
        Whether to wait after a 503.
    end
        Time of the loop's clock after which to send no more requests.
    load
        Where to note responses.
    """

    def __init__(self, request: bytes, patient: bool, end: float, load: Load) -> None:
        self.request = request
        self.patient = patient
        self.end = end
        self.load = load
        self.loop = asyncio.get_running_loop()
        self.done = self.loop.create_future()
        self.received = b""
        self.asked: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        # uvloop's transport is no subclass of asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        """Send the request, or close the connection when the time is up."""
        if self.loop.time() >= self.end:
            self.transport.close()
        elif not self.transport.is_closing():
            self.asked = time.perf_counter()
            self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Note a response once it is complete, and send the next request."""
        self.received += data
        head, _, body = self.received.partition(b"\r\n\r\n")
        if len(body) < header(head, b"content-length", 1):
            return
        assert self.asked is not None
        status = int(head[9:12])
        self.load.answers[status].append(time.perf_counter() - self.asked)
        if status != 200:
            self.load.seen.setdefault(status, self.received)
        self.received, self.asked = b"", None
        if status == 503 and self.patient:
            wait = header(head, b"retry-after", 1) * random.uniform(1, 1.5)
            self.loop.call_later(min(wait, max(0, self.end - self.loop.time())), self.ask)
        else:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a request that has no response yet as lost."""
        self.load.lost += self.asked is not None
        self.done.set_result(None)


def header(head: bytes, name: bytes, default: int) -> int:
    """Return the value of a header with an integer value."""
    _, found, rest = head.lower().partition(name + b": ")
    return int(rest.partition(b"\r\n")[0]) if found else default


async def load(
    port: int,
    request: bytes,
    connections: int,
    seconds: float,
    *,
    patient: bool = True,
    memory: Callable[[], float] = lambda: 0.0,
) -> Load:
    """Send a request over and over, while probing the service and reading its memory."""
    found = Load()
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    watching = asyncio.create_task(watch(port, end, found, memory))
    made = [
        loop.create_connection(lambda: Client(request, patient, end, found), "127.0.0.1", port)
        for _ in range(connections)
    ]
    clients = [client for _, client in await asyncio.gather(*made)]
    await asyncio.wait_for(asyncio.gather(*[client.done for client in clients]), seconds + 60)
    await watching
    return found


async def watch(port: int, end: float, found: Load, memory: Callable[[], float]) -> None:
    """Probe the service and read its memory at intervals until the end."""
    loop = asyncio.get_running_loop()
    while loop.time() < end:
        found.live.append(await probe(port))
        found.memory.append(memory())
        await asyncio.sleep(PROBE_SECONDS)


async def probe(port: int) -> float:
    """Return the seconds of a live probe, from connecting to its response."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with closing(writer):
        writer.write(LIVE)
        answer = await reader.read()
    if not answer:
        raise ConnectionResetError("the live probe got no response")
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"the live probe got {answer[:100]!r}")
    return time.perf_counter() - start


def post(path: str, document: object) -> bytes:
    """Return a POST request with a JSON body."""
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    models = network.models()
    examples = json.loads((models / "digits" / "1" / "examples.json").read_text())
    request = post("/predict", {"inputs": [examples[0]["input"]]})
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {last})
    rows = measure(models, request, first, SECONDS)
    figures.report(args.result, f"One core each ({timing.machine()})", rows)
    sys.exit(0 if all(row.get("holds") in ("yes", None) for row in rows) else 1)


def measure(models: Path, request: bytes, core: int | None, seconds: float) -> list[figures.Row]:
    """Apply each load to the service, and return the rows of the table."""
    rows: list[figures.Row] = []

    def loaded(port: int, connections: int, **options: Any) -> Load:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(load(port, request, connections, seconds, **options))

    with served(models, core) as running:
        loaded(running.port, SATURATING)  # warm-up
        unloaded = loaded(running.port, 1)
        saturated = loaded(running.port, SATURATING)
    rows += [
        row("unloaded", 1, unloaded, seconds),
        row("saturated", SATURATING, saturated, seconds),
    ]
    worth = QUEUE_ROWS * seconds / len(saturated.answers[200])
    allowed = 3 * unloaded.percentile(99) + worth
    for patient in (True, False):
        with served(models, core, DROPSERVE_QUEUE_ROWS=str(QUEUE_ROWS)) as running:
            loaded(running.port, SATURATING)
            before = running.memory()
            found = loaded(running.port, CONNECTIONS, patient=patient, memory=running.memory)
            time.sleep(REST_SECONDS)
            after = running.memory()
        name = "patient" if patient else "impatient"
        holds = found.percentile(99) < allowed and max(found.live) < 0.5
        rows.append(
            row(name, CONNECTIONS, found, seconds)
            | {
                "p99 allowed, ms": 1000 * allowed,
                "holds": "yes" if holds else "no",
                "MB before": before,
                "MB at most": max(found.memory),
                "MB after": after,
            }
        )
    return rows


def row(name: str, connections: int, found: Load, seconds: float) -> dict[str, Any]:
    """Return the columns that all loads share."""
    statuses = {
        f"{status}/s": len(each) / seconds for status, each in sorted(found.answers.items())
    }
    return {
        "clients": name,
        "connections": connections,
        **statuses,
        "lost": found.lost,
        "p50 of 200, ms": 1000 * found.percentile(50),
        "p99 of 200, ms": 1000 * found.percentile(99),
        "slowest live probe, ms": 1000 * max(found.live),
    }


if __name__ == "__main__":
    main()
