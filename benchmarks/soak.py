"""Do responses stay right and memory flat under a long mixed load? ``make soak``.

The targets for 20 minutes: no wrong response, no lost request, growth of resident memory below 5 %.
The table gives counts and latencies for each kind of request, and the service's memory. The load,
all at the same time and over and over:

- predictions, as JSON and as binary tensors, passes with fixed seeds, and queries of 10,000 passes;
- clients that hang up within a body, after it, and while a long query runs;
- bodies that arrive in small pieces, and invalid requests for each error status;
- clients that read a long response slowly, and clients that never read one;
- every ten seconds a new version of the model, alternating between two bundles with different
  outputs, while the oldest version is removed; the service is told by the Open Inference Protocol's
  ``load`` and by SIGHUP in turn; each time it finds a bad bundle, too, that loads but does not run;
- once a minute a worker is killed, and another is stopped, half a minute apart;
- the live probe, ten times a second, over a new connection each time;
- the metrics, once a second.

Each response is compared with a reference response of the version it names, which may be at most
one version behind. A request without a response is lost, unless its worker was killed or stopped
meanwhile: those are counted apart, as *cut off*. One of the three workers is left alone. Growth
compares the median memory of this one and the parent in the last tenth of the time with that in
the second tenth, after a warm-up of ten seconds.
"""

import asyncio
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import onnx
from onnx import helper

from benchmarks import figures, network, timing
from benchmarks.overload import PROBE_SECONDS, post, probe, resident, served
from dropserve.app.http.v2 import codec

SECONDS, WARM_UP_SECONDS = 1200.0, 10.0
RELOAD_SECONDS, HARM_SECONDS = 10.0, 60.0
WORKERS = 3
# After which the service replaces a worker that does not answer, and ends the connection of a
# client that does not read.
STUCK_SECONDS, SEND_SECONDS = 5, 5
# Longest time in which a worker that was killed or stopped is gone, and again for another to serve.
REPLACED_SECONDS = 5 * STUCK_SECONDS
# Longest wait for the metrics while a worker is stopped.
METRICS_LIMIT_SECONDS = 1.5
# Rows of a response of some 2.5 MB, and the pace of a client that reads it slowly: in 10 s.
SLOW_ROWS, SLOW_BYTES, SLOW_PAUSE_SECONDS = 4096, 25_000, 0.1
# Lines of the log that the harm done accounts for. A worker that starts may find that the oldest
# version, which it is to serve as the others do, has been removed.
EXPECTED = re.compile(
    r"refused bad |not all was loaded: refused bad |worker \d+ |"
    r"refused digits version \d+: .*No such file or directory"
)
# Clients of each kind, and the pause of a client between two requests.
CLIENTS, PAUSE_SECONDS = 3, 0.02
LONG_PAUSE_SECONDS = 2.0
# Limit of growth in per cent, and how far outputs of other batch sizes may differ.
GROWTH, TOLERANCE = 5.0, 1e-5
# Versions in the folder at the same time.
VERSIONS = 4
PROBE_LIMIT_SECONDS = 0.5
# Less than the service's keep-alive timeout of 5 s: a request sent while the service closes an idle
# connection is lost, and HTTP forbids clients to repeat a POST on their own.
KEPT_SECONDS = 2.0

Json = dict[str, Any]


class Question(NamedTuple):
    """A request, and the field of its response that holds the numbers to compare."""

    kind: str
    path: str
    document: Json
    answer: str


class Broken(NamedTuple):
    """An invalid request, and the status it must get."""

    content: bytes
    status: int
    path: str = "/predict"


class Findings:
    """The outcome of all requests."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.statuses: dict[str, Counter[int]] = defaultdict(Counter)
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self.live: list[float] = []
        self.metrics: list[float] = []
        self.memory: list[tuple[float, float]] = []
        self.reloads = 0
        self.killed = 0
        self.cut = 0

    def note(self, kind: str, status: int, seconds: float) -> None:
        """Count a response."""
        self.statuses[kind][status] += 1
        self.seconds[kind].append(seconds)

    def growth(self, seconds: float) -> tuple[float, float]:
        """Return the memory in MB after the warm-up, and its growth in per cent."""
        begin = [size for at, size in self.memory if 0.1 <= at / seconds < 0.2]
        end = [size for at, size in self.memory if at / seconds >= 0.9]
        first, last = statistics.median(begin), statistics.median(end)
        return first, 100 * (last / first - 1)


def check(found: Findings, kind: str, given: Json, expected: Json | None, name: str) -> None:
    """Note a response that names an unknown version, or differs from that version's reference."""
    if expected is None:
        found.wrong.append(f"{kind}: unknown version {given.get('version')}")
        return
    if not np.allclose(given[name], expected[name], atol=TOLERANCE):
        found.wrong.append(f"{kind}: not the numbers of version {given.get('version')}")


class Soak:
    """A load on one service.

    Parameters
    ----------
    url
        URL of the service.
    pid
        Process ID of the service.
    models
        Its models folder, which holds version 1 of ``digits``.
    kinds
        Two bundles that alternate as versions; version 1 is the first.
    rows
        Rows to send.
    reload_seconds
        Time from one new version to the next.
    harm_seconds
        Time from one worker killed, or stopped, to the next.
    """

    def __init__(
        self,
        url: str,
        pid: int,
        models: Path,
        kinds: Sequence[Path],
        rows: Sequence[Any],
        reload_seconds: float,
        harm_seconds: float,
    ) -> None:
        self.url = httpx.URL(url)
        self.harm_seconds = harm_seconds
        # When workers were killed or stopped, and when they were seen to be gone.
        self.harm: list[tuple[float, float]] = []
        self.spared = min(workers(pid))
        # Workers that have answered for the metrics when these were last fetched.
        self.serving = 0.0
        self.pid = pid
        self.models = models
        self.kinds = kinds
        self.reload_seconds = reload_seconds
        self.questions = questions(rows)
        self.broken = broken(rows[0])
        self.found = Findings()
        limits = httpx.Limits(max_connections=64, keepalive_expiry=KEPT_SECONDS)
        self.client = httpx.AsyncClient(base_url=url, timeout=60, limits=limits)
        # Reference responses by kind of bundle (version modulo two) and question.
        self.expected: dict[tuple[int, int], Json] = {}
        document = {"model": "digits", "inputs": [rows[0]] * SLOW_ROWS, "passes": 10, "seed": 5}
        self.slow = Question("read slowly", "/uncertainty", document, "mean")
        self.slow_expected: dict[int, Json] = {}
        self.newest = 1

    async def run(self, seconds: float) -> Findings:
        """Load the service for this long after the warm-up."""
        await self.learn()
        start = time.monotonic() + WARM_UP_SECONDS
        self.end = start + seconds
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self.over_and_over(self.ask, number))
                tasks.create_task(self.over_and_over(self.ask_binary, number))
                tasks.create_task(self.over_and_over(self.send_broken, number))
                tasks.create_task(self.over_and_over(self.hang_up, number))
            tasks.create_task(self.over_and_over(self.dribble, 0))
            tasks.create_task(self.over_and_over(self.ask_long, 0, LONG_PAUSE_SECONDS))
            tasks.create_task(self.over_and_over(self.read_slowly, 0))
            tasks.create_task(self.over_and_over(self.never_read, 0))
            tasks.create_task(self.over_and_over(self.publish, 0, self.reload_seconds))
            tasks.create_task(self.over_and_over(self.probe, 0, PROBE_SECONDS))
            tasks.create_task(self.over_and_over(self.scrape, 0, 1.0))
            tasks.create_task(self.hurt())
            tasks.create_task(self.watch(start))
        await self.client.aclose()
        return self.found

    async def learn(self) -> None:
        """Fetch the reference responses of each kind of bundle before the load starts."""
        for _ in self.kinds:
            for number, question in enumerate(self.questions):
                answer = await self.client.post(question.path, json=question.document)
                self.expected[self.newest % 2, number] = answer.raise_for_status().json()
            answer = await self.client.post(self.slow.path, json=self.slow.document)
            self.slow_expected[self.newest % 2] = answer.raise_for_status().json()
            await self.publish(random.Random(0))

    async def over_and_over(
        self,
        work: Callable[[random.Random], Awaitable[None]],
        seed: int,
        pause: float = PAUSE_SECONDS,
    ) -> None:
        """Repeat some work until the end, and note lost requests."""
        chance = random.Random(f"{work.__name__} {seed}")
        while (began := time.monotonic()) < self.end:
            try:
                await work(chance)
            except (httpx.HTTPError, OSError, EOFError) as error:
                if self.was_cut(began):
                    self.found.cut += 1
                else:
                    self.found.lost.append(f"{work.__name__}: {error!r}")
            await asyncio.sleep(min(pause, max(0.0, self.end - time.monotonic())))

    def was_cut(self, began: float) -> bool:
        """Tell whether a request since ``began`` may have been on a worker that was hurt."""
        return any(began < gone and hurt < time.monotonic() for hurt, gone in self.harm)

    async def hurt(self) -> None:
        """Kill a worker and stop another in turn, and wait each time for its end."""
        for number in itertools.cycle((signal.SIGKILL, signal.SIGSTOP)):
            pid = random.choice(sorted(workers(self.pid) - {self.spared}))
            hurt = time.monotonic()
            self.harm.append((hurt, math.inf))
            os.kill(pid, number)
            while pid in workers(self.pid):
                if time.monotonic() - hurt > REPLACED_SECONDS:
                    self.found.wrong.append(f"worker {pid} was not replaced")
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.05)
            # Its connections are reset within this time.
            self.harm[-1] = (hurt, time.monotonic() + 0.2)
            self.found.killed += 1
            self.serving = 0.0
            while self.serving < WORKERS:
                if time.monotonic() > self.end:
                    return
                if time.monotonic() - hurt > 2 * REPLACED_SECONDS:
                    self.found.wrong.append(f"{self.serving} workers serve, not {WORKERS}")
                    return
                await asyncio.sleep(0.05)
            left = self.harm_seconds / 2 - (time.monotonic() - hurt)
            if time.monotonic() + left > self.end:
                return
            await asyncio.sleep(max(0.0, left))

    async def probe(self, _: random.Random) -> None:
        """Probe whether the service is alive."""
        began = time.monotonic()
        seconds = await probe(self.url.port or 80)
        if not self.was_cut(began):
            self.found.live.append(seconds)

    async def scrape(self, _: random.Random) -> None:
        """Fetch the metrics, on a connection of its own."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            began = time.monotonic()
            answer = await client.get("/metrics")
        answer.raise_for_status()
        self.found.metrics.append(time.monotonic() - began)
        found = re.search(r"^dropserve_workers (\S+)$", answer.text, re.MULTILINE)
        assert found
        self.serving = float(found[1])

    async def ask_reluctantly(self) -> socket.socket:
        """Send the request for a long response, over a connection that takes in little unread."""
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(own, (self.url.host, self.url.port or 80))
            await loop.sock_sendall(own, post(self.slow.path, self.slow.document))
        except OSError:
            own.close()
            raise
        return own

    async def read_slowly(self, _: random.Random) -> None:
        """Read a long response slowly, and check it."""
        began = time.monotonic()
        own = await self.ask_reluctantly()
        reader, writer = await asyncio.open_connection(sock=own, limit=SLOW_BYTES)
        with closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            parts = []
            for start in range(0, length, SLOW_BYTES):
                parts.append(await reader.readexactly(min(SLOW_BYTES, length - start)))
                await asyncio.sleep(SLOW_PAUSE_SECONDS)
        given = json.loads(b"".join(parts))
        self.found.note("read slowly", int(head[9:12]), time.monotonic() - began)
        expected = self.slow_expected.get(given["version"] % 2)
        check(self.found, "read slowly", given, expected, self.slow.answer)

    async def never_read(self, _: random.Random) -> None:
        """Leave a long response unread until the service ends the connection."""
        began = time.monotonic()
        with await self.ask_reluctantly() as own:
            while not own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                await asyncio.sleep(0.1)
                if time.monotonic() - began > 6 * SEND_SECONDS:
                    if self.was_cut(began):
                        # The end of the connection stands behind what is not read.
                        raise ConnectionAbortedError
                    self.found.wrong.append("unread: the connection was not ended")
                    break
        self.found.statuses["unread"][0] += 1

    async def ask(self, chance: random.Random) -> None:
        """Send any question but the long one as JSON."""
        number = chance.randrange(len(self.questions) - 1)
        await self.ask_one(number)

    async def ask_long(self, _: random.Random) -> None:
        """Send the question of 10,000 passes."""
        await self.ask_one(len(self.questions) - 1)

    async def ask_one(self, number: int) -> None:
        """Send a question, and check the response."""
        question = self.questions[number]
        least, began = self.newest - 1, time.monotonic()
        answer = await self.client.post(question.path, json=question.document)
        self.found.note(question.kind, answer.status_code, time.monotonic() - began)
        if answer.status_code != 200:
            self.found.wrong.append(f"{question.kind}: {answer.text[:200]}")
            return
        given = answer.json()
        expected = self.expected.get((given["version"] % 2, number))
        check(self.found, question.kind, given, expected, question.answer)
        if given["version"] < least:
            self.found.wrong.append(f"{question.kind}: still version {given['version']}")

    async def ask_binary(self, chance: random.Random) -> None:
        """Send a question for predictions as a binary tensor, and check the response."""
        number = chance.randrange(len(self.questions) - 1)
        question = self.questions[number]
        if question.path != "/predict":
            return
        x = np.asarray(question.document["inputs"], np.float32).reshape(-1, 64)
        content, length = codec.write_response({}, [("x", x, True)])
        # The codec writes responses; a request differs in the name of the list.
        head = json.loads(content[:length])
        head = json.dumps(
            {
                "inputs": head["outputs"],
                "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
            }
        ).encode()
        began = time.monotonic()
        answer = await self.client.post(
            "/v2/models/digits/infer",
            content=head + x.astype("<f4").tobytes(),
            headers={"inference-header-content-length": str(len(head))},
        )
        self.found.note("infer, binary", answer.status_code, time.monotonic() - began)
        if answer.status_code != 200:
            self.found.wrong.append(f"infer: {answer.text[:200]}")
            return
        length = int(answer.headers["inference-header-content-length"])
        given = json.loads(answer.content[:length])
        values = np.frombuffer(answer.content, "<f4", offset=length).reshape(len(x), -1)
        version = int(given["model_version"])
        expected = self.expected.get((version % 2, number))
        named = {"version": version, "probabilities": values}
        check(self.found, "infer", named, expected, "probabilities")

    async def send_broken(self, chance: random.Random) -> None:
        """Send an invalid request, and check the status."""
        each = chance.choice(self.broken)
        began = time.monotonic()
        answer = await self.client.post(
            each.path, content=each.content, headers={"content-type": "application/json"}
        )
        self.found.note("broken", answer.status_code, time.monotonic() - began)
        if answer.status_code != each.status:
            self.found.wrong.append(f"broken: {answer.status_code}, not {each.status}")

    async def hang_up(self, chance: random.Random) -> None:
        """Close the connection before the response arrives."""
        request = post(self.questions[-1].path, self.questions[-1].document)
        whole = chance.random() < 0.5
        _, writer = await self.connect()
        writer.write(request if whole else request[: chance.randrange(len(request))])
        await asyncio.sleep(chance.choice((0, 0.01, 0.1)))
        writer.close()
        self.found.statuses["hung up"][0] += 1

    async def dribble(self, chance: random.Random) -> None:
        """Send a request in small pieces, and check the response."""
        number = chance.randrange(len(self.questions) - 1)
        question = self.questions[number]
        request = post(question.path, question.document)
        reader, writer = await self.connect()
        began = time.monotonic()
        with closing(writer):
            for start in range(0, len(request), max(1, len(request) // 10)):
                writer.write(request[start : start + max(1, len(request) // 10)])
                await asyncio.sleep(0.02)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            given = json.loads(await reader.readexactly(length))
        self.found.note("dribbled", int(head[9:12]), time.monotonic() - began)
        expected = self.expected.get((given.get("version", 0) % 2, number))
        check(self.found, "dribbled", given, expected, question.answer)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        return await asyncio.open_connection(self.url.host, self.url.port or 80)

    async def publish(self, _: random.Random) -> None:
        """Publish the next version, remove the oldest, and wait until the service has reloaded."""
        version = self.newest + 1
        if not (self.models / "digits" / str(version)).exists():
            await self.write(version)
        if version % 4 < 2:
            answer = await self.client.post("/v2/repository/models/digits/load")
            answer.raise_for_status()
        else:
            signal_process(self.pid)
            while await self.served() != version:
                await asyncio.sleep(0.05)
        self.newest = version
        self.found.reloads += 1

    async def write(self, version: int) -> None:
        """Write a version into the models folder, and remove the oldest."""
        model = self.models / "digits"
        staging = self.models / f".staging-{version}"
        await asyncio.to_thread(shutil.copytree, self.kinds[(version + 1) % 2], staging)
        manifest = json.loads((staging / "manifest.json").read_text())
        manifest |= {"name": "digits", "version": version}
        (staging / "manifest.json").write_text(json.dumps(manifest))
        staging.rename(model / str(version))
        if version > VERSIONS:
            await asyncio.to_thread(shutil.rmtree, model / str(version - VERSIONS))

    async def served(self) -> int:
        """Return the newest version that the service has loaded."""
        answer = await self.client.get("/health/ready")
        versions: list[int] = answer.raise_for_status().json()["models"]["digits"]
        return versions[-1]

    async def watch(self, start: float) -> None:
        """Read the memory of the parent and of the worker that is left alone, at intervals."""
        while (now := time.monotonic()) < self.end:
            if self.spared not in workers(self.pid):
                self.found.wrong.append("a worker has ended by itself")
                return
            size = resident(self.pid) + resident(self.spared)
            self.found.memory.append((now - start, size))
            await asyncio.sleep(PROBE_SECONDS)


def workers(pid: int) -> set[int]:
    """Return the living worker processes of a service."""
    found = set()
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        # It may have ended by now; of one that nobody has waited for, the command is empty.
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.add(child)
    return found


def signal_process(pid: int) -> None:
    """Tell a service to reload its models folder."""
    os.kill(pid, signal.SIGHUP)


def questions(rows: Sequence[Any]) -> list[Question]:
    """Return the questions; the last is the long one."""
    found = [
        Question("predict", "/predict", {"model": "digits", "inputs": list(rows[:count])}, answer)
        for count, answer in ((1, "probabilities"), (3, "probabilities"), (8, "probabilities"))
    ]
    for seed, passes in ((1, 10), (2, 100), (3, 500)):
        document = {"model": "digits", "inputs": list(rows[:2]), "passes": passes, "seed": seed}
        found.append(Question("uncertainty", "/uncertainty", document, "mean"))
    document = {"model": "digits", "inputs": list(rows[:5]), "passes": 10_000, "seed": 4}
    return [*found, Question("long", "/uncertainty", document, "mean")]


def broken(row: Any) -> list[Broken]:
    """Return the invalid requests."""
    good = {"model": "digits", "inputs": [row]}

    def text(**change: object) -> bytes:
        return json.dumps(good | change).encode()

    return [
        Broken(b"", 400),
        Broken(b'{"inputs": [[1, 2', 400),
        Broken(b'{"inputs": [[NaN]], "model": "digits"}', 400),
        Broken(b"[" * 5000, 400),
        Broken(text(inputs=[[1.0]]), 422),
        Broken(text(inputs=[["x"] * 64]), 422),
        Broken(text(colour="red"), 422),
        Broken(text(model="none"), 404),
        Broken(text(version=999_999), 404),
        Broken(text(passes=0), 422, "/uncertainty"),
        Broken(text(passes=10**9), 422, "/uncertainty"),
        Broken(text(), 404, "/debug/mc"),
        Broken(b" " * (5 * 2**20), 413),
    ]


def soak(
    kinds: Sequence[Path],
    rows: Sequence[Any],
    seconds: float,
    reload_seconds: float = RELOAD_SECONDS,
    harm_seconds: float = HARM_SECONDS,
) -> tuple[Findings, list[Any]]:
    """Start a service and load it; return the outcome and the warnings and errors of its log.

    Parameters
    ----------
    kinds
        Two bundles of digits with different outputs.
    rows
        Rows to send, at least eight.
    seconds
        Duration of the load after the warm-up.
    reload_seconds
        Time from one new version to the next. A reload frees memory, so each tenth of ``seconds``
        should contain one.
    harm_seconds
        Time in which one worker is killed and one is stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        shutil.copytree(kinds[0], models / "digits" / "1")
        manifest = models / "digits" / "1" / "manifest.json"
        document = json.loads(manifest.read_text()) | {"name": "digits", "version": 1}
        manifest.write_text(json.dumps(document))
        write_bad_bundle(kinds[0], models / "bad" / "1")
        settings = {
            "DROPSERVE_WORKERS": str(WORKERS),
            "DROPSERVE_STUCK_SECONDS": str(STUCK_SECONDS),
            "DROPSERVE_SEND_SECONDS": str(SEND_SECONDS),
        }
        with served(models, None, **settings) as running:
            url = f"http://127.0.0.1:{running.port}"
            pid = running.process.pid
            while len(workers(pid)) < WORKERS:
                time.sleep(0.1)
            load = Soak(url, pid, models, kinds, rows, reload_seconds, harm_seconds)
            found = asyncio.run(load.run(seconds))
            return found, [line for line in running.errors() if not EXPECTED.search(line)]


def write_bad_bundle(good: Path, place: Path) -> None:
    """Write a bundle that loads, but whose answers have as many rows again as were asked for."""
    shutil.copytree(good, place)
    graph = onnx.load(place / "predict.onnx")
    (output,) = graph.graph.output
    last = next(node for node in graph.graph.node if output.name in node.output)
    last.output[list(last.output).index(output.name)] = "once"
    graph.graph.node.append(helper.make_node("Concat", ["once", "once"], [output.name], axis=0))
    (place / "predict.onnx").write_bytes(graph.SerializeToString())
    manifest = json.loads((place / "manifest.json").read_text()) | {"name": "bad", "version": 1}
    content = (place / "predict.onnx").read_bytes()
    manifest["files"]["predict.onnx"] = hashlib.sha256(content).hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))


def report(found: Findings, seconds: float) -> list[figures.Row]:
    """Return a row for each kind of request, and one for the service."""
    rows: list[figures.Row] = []
    for kind, statuses in sorted(found.statuses.items()):
        times = found.seconds.get(kind)
        rows.append(
            {
                "what": kind,
                "requests": statuses.total(),
                "statuses": ", ".join(map(str, sorted(statuses))),
                "p50 ms": 1000 * float(np.percentile(times, 50)) if times else None,
                "p99 ms": 1000 * float(np.percentile(times, 99)) if times else None,
            }
        )
    memory, growth = found.growth(seconds)
    rows.append(
        {
            "what": "all",
            "requests": sum(statuses.total() for statuses in found.statuses.values()),
            "wrong": len(found.wrong),
            "lost": len(found.lost),
            "cut off": found.cut,
            "workers killed or stopped": found.killed,
            "reloads": found.reloads,
            "slowest live probe, ms": 1000 * max(found.live),
            "slowest metrics, ms": 1000 * max(found.metrics),
            "MB": memory,
            "growth, %": growth,
        }
    )
    return rows


def faults(found: Findings, errors: Sequence[str], seconds: float) -> list[str]:
    """Return a line for each missed target; wrong, lost and logged ones up to five each."""
    _, growth = found.growth(seconds)
    says = [f"wrong: {each}" for each in found.wrong[:5]]
    says += [f"lost: {each}" for each in found.lost[:5]]
    says += [f"logged: {each}" for each in errors[:5] if '"level":"error"' in each]
    if growth >= GROWTH:
        says.append(f"memory grew by {growth:.1f} %")
    if max(found.live) >= PROBE_LIMIT_SECONDS:
        says.append(f"the live probe took {max(found.live):.2f} s")
    if max(found.metrics) >= METRICS_LIMIT_SECONDS:
        says.append(f"the metrics took {max(found.metrics):.2f} s")
    return says


def main() -> None:
    command = figures.parser(__file__, __doc__)
    command.add_argument("--seconds", type=float, default=SECONDS)
    args = command.parse_args()
    kinds = [network.models(width) / "digits" / "1" for width in (256, 64)]
    examples = json.loads((kinds[0] / "examples.json").read_text())
    found, errors = soak(kinds, [each["input"] for each in examples], args.seconds)
    title = f"{args.seconds:.0f} s ({timing.machine()})"
    figures.report(args.result, title, report(found, args.seconds))
    says = faults(found, errors, args.seconds)
    print("\n".join(says) or "all targets are met")
    sys.exit(1 if says else 0)


if __name__ == "__main__":
    main()
