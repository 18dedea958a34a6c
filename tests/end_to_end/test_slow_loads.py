"""Loads that are slow or never end, workers that are stuck, and signals in the midst of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundles import make_endless, make_slow_to_load, publish
from tests.conftest import ROOT, SETTINGS, children, events, service, wait_for

WORKERS = ["1", "2"]
# Products of large constants that take seconds, on any machine.
MANY = 60
REPOSITORY = "/v2/repository"
UNKEPT = httpx.Limits(max_keepalive_connections=0)


class Folder:
    """A models folder and a service of it, whose every request comes over a new connection."""

    def __init__(self, models: Path, source: Path, service: httpx.Client) -> None:
        self.models = models
        self.source = source
        self.pid = int(service.headers["x-test-pid"])
        self.client = httpx.Client(base_url=service.base_url, limits=UNKEPT, timeout=60)

    def publish(self, name: str, version: int = 1) -> Path:
        """Put a copy of digits into the folder."""
        return publish_copy(self.source, self.models, name, version)

    def change(self, call: str, name: str, timeout_ms: int = 60_000) -> httpx.Response:
        headers = {"x-request-timeout-ms": str(timeout_ms)}
        return self.client.post(f"{REPOSITORY}/models/{name}/{call}", headers=headers)

    def index(self) -> dict[tuple[str, int], tuple[str, str]]:
        listed = self.client.post(f"{REPOSITORY}/index").raise_for_status().json()
        return {
            (each["name"], int(each["version"])): (each["state"], each["reason"]) for each in listed
        }

    def served(self) -> dict[str, list[int]]:
        models: dict[str, list[int]] = self.client.get("/health/ready").json()["models"]
        return models

    def of_each(self, workers: int) -> list[object]:
        """Return what each worker serves and its index, once enough of them have answered."""
        found: dict[str, object] = {}
        deadline = time.monotonic() + 30
        while len(found) < workers:
            answer = self.client.get("/health/ready")
            found[answer.headers["x-request-id"][:16]] = answer.json()["models"]
            assert time.monotonic() < deadline, found
        # Any worker may answer this, so often enough each does.
        indices = {json.dumps(sorted(self.index().items())) for _ in range(10 * workers)}
        return [*found.values(), *map(json.loads, indices)]

    def metrics(self) -> dict[str, float]:
        """Return the metrics that have no labels."""
        text = self.client.get("/metrics").raise_for_status().text
        return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.M)}


def publish_copy(source: Path, models: Path, name: str, version: int = 1) -> Path:
    place = models / name / str(version)
    publish(source, place)
    return place


@pytest.fixture
def start(built: Path, tmp_path: Path) -> Callable[..., Any]:
    """Start a service of a folder that holds digits, and what ``also`` puts there."""
    source, models = built / "models" / "digits" / "1", tmp_path / "models"

    @contextmanager
    def start(also: Callable[[Path], None] | None = None, **environment: str) -> Iterator[Folder]:
        models.mkdir()
        publish_copy(source, models, "digits")
        if also:
            also(models)
        with service(models, **environment) as client:
            folder = Folder(models, source, client)
            workers = int(environment.get("DROPSERVE_WORKERS", "1"))
            folder.of_each(workers)
            yield folder

    return start


def test_a_worker_that_is_replaced_after_a_sighup_with_a_bad_model_serves_the_good_ones(
    start: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with start(DROPSERVE_WORKERS="2") as folder:
        for name in ("good", "later"):
            folder.publish(name)
        (folder.publish("bad") / "predict.onnx").unlink()
        os.kill(folder.pid, signal.SIGHUP)
        everything = {"digits": [1], "good": [1], "later": [1]}
        wait_for(lambda: folder.served() == everything)
        wait_for(lambda: folder.of_each(2)[:2] == [everything] * 2)
        index = folder.index()
        assert index["bad", 1][0] == "UNAVAILABLE"
        for worker in children(folder.pid):
            replace(folder.pid, worker)
            *served, listed = folder.of_each(2)
            assert served == [everything] * 2
            assert listed == json.loads(json.dumps(sorted(index.items())))
    said = [each["message"] for each in events(capfd.readouterr().out)]
    assert not [line for line in said if "is replaced:" in line or "serves other models" in line]


def replace(pid: int, worker: int) -> None:
    """Kill a worker of a service, and wait for another to take its place."""
    before = children(pid)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: bool(children(pid) - before))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_slow_load_answers_202_in_time_and_ends_the_same_in_all_workers(
    start: Callable[..., Any], workers: str
) -> None:
    with start(DROPSERVE_WORKERS=workers) as folder:
        make_slow_to_load(folder.publish("slow"), MANY)
        answer = folder.change("load", "slow", timeout_ms=300)
        assert answer.status_code == 202
        assert answer.json() == {
            "error": "loading goes on; POST /v2/repository/index shows its outcome"
        }
        assert folder.of_each(int(workers))[int(workers) :] == [
            [[["digits", 1], ["READY", ""]], [["slow", 1], ["LOADING", ""]]]
        ]
        # A second request for the same waits for the same.
        assert folder.change("load", "slow").status_code == 200
        *served, listed = folder.of_each(int(workers))
        assert served == [{"digits": [1], "slow": [1]}] * int(workers)
        assert listed == [[["digits", 1], ["READY", ""]], [["slow", 1], ["READY", ""]]]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("spoil", [make_endless, lambda place: make_slow_to_load(place, 500)])
def test_a_load_that_takes_too_long_is_given_up_and_others_are_made_then(
    start: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
    workers: str,
    spoil: Callable[[Path], None],
) -> None:
    with start(DROPSERVE_WORKERS=workers, DROPSERVE_LOAD_SECONDS="2") as folder:
        spoil(folder.publish("endless"))
        folder.publish("good")
        assert folder.change("load", "endless", timeout_ms=200).status_code == 202
        # These wait.
        answer = folder.change("load", "good", timeout_ms=200)
        assert answer.status_code == 202
        unload = folder.change("unload", "digits", timeout_ms=200)
        assert unload.status_code == 202
        assert unload.json()["error"].startswith("unloading waits for other changes")
        assert folder.index() == {
            ("digits", 1): ("READY", ""),
            ("endless", 1): ("LOADING", ""),
            ("good", 1): ("LOADING", ""),
        }
        reason = "loading took longer than 2 s"
        wait_for(lambda: folder.served() == {"good": [1]})
        wait_for(lambda: folder.of_each(int(workers))[:-1] == [{"good": [1]}] * int(workers))
        assert folder.index() == {
            ("digits", 1): ("UNAVAILABLE", "not loaded"),
            ("endless", 1): ("UNAVAILABLE", reason),
            ("good", 1): ("READY", ""),
        }
        answer = folder.change("load", "endless")
        assert answer.status_code == 400
        assert answer.json() == {"error": f"refused endless version 1: {reason}"}
        assert folder.of_each(int(workers))[:-1] == [{"good": [1]}] * int(workers)
    said = [each["message"] for each in events(capfd.readouterr().out)]
    stuck = [line for line in said if "a load that was given up does not end" in line]
    # Only onnxruntime's runs can be ended, but a worker of several can be replaced.
    assert bool(stuck) == (workers == "2" and spoil is not make_endless)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_bundle_that_takes_too_long_at_the_start_is_refused_and_the_others_are_served(
    start: Callable[..., Any], built: Path, workers: str
) -> None:
    source = built / "models" / "digits" / "1"
    with start(
        lambda models: make_endless(publish_copy(source, models, "endless")),
        DROPSERVE_WORKERS=workers,
        DROPSERVE_LOAD_SECONDS="2",
    ) as folder:
        *served, listed = folder.of_each(int(workers))
        assert served == [{"digits": [1]}] * int(workers)
        assert listed[1] == [["endless", 1], ["UNAVAILABLE", "loading took longer than 2 s"]]


@pytest.mark.quiet
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("spoil", [make_endless, lambda place: make_slow_to_load(place, 5000)])
def test_sigterm_ends_the_service_in_time_though_a_load_does_not_end(
    start: Callable[..., Any], workers: str, spoil: Callable[[Path], None]
) -> None:
    with start(DROPSERVE_WORKERS=workers, DROPSERVE_DRAIN_SECONDS="1") as folder:
        spoil(folder.publish("endless"))
        assert folder.change("load", "endless", timeout_ms=500).status_code == 202
        told = time.monotonic()
        os.kill(folder.pid, signal.SIGTERM)
        wait_for(lambda: is_over(folder.pid))
        # The exit status is checked at the end of the block, as always.
        assert time.monotonic() - told < 3


def is_over(pid: int) -> bool:
    """Tell whether a child of this process has ended; nobody has waited for it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.quiet
def test_sigterm_ends_a_service_that_does_not_get_beyond_a_load(
    built: Path, tmp_path: Path
) -> None:
    make_endless(publish_copy(built / "models" / "digits" / "1", tmp_path, "endless"))
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "--models", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | SETTINGS,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    try:
        # By now it loads.
        wait_for(lambda: processor_seconds_of(process.pid) > 3)
        told = time.monotonic()
        process.terminate()
        assert process.wait(10) == 0
        assert time.monotonic() - told < 1
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def processor_seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.quiet
def test_a_stopped_worker_holds_up_neither_metrics_nor_loads_and_is_replaced(
    start: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with start(DROPSERVE_WORKERS="2", DROPSERVE_STUCK_SECONDS="4") as folder:
        body = {"inputs": [[0.0] * 64], "model": "digits"}
        for _ in range(40):
            folder.client.post("/predict", json=body).raise_for_status()
        assert folder.metrics()["dropserve_worker_silences_total"] == 0
        before = requests(folder)
        assert before >= 40
        stopped = min(children(folder.pid))
        os.kill(stopped, signal.SIGSTOP)
        begun = time.monotonic()
        seconds = []
        silences: list[float] = []
        while time.monotonic() - begun < 2.5:
            # A new connection may be the stopped worker's, which will not answer it.
            asked = time.monotonic()
            try:
                found = httpx.get(f"{folder.client.base_url}/metrics", timeout=2).text
            except httpx.ReadTimeout:
                continue
            seconds.append(time.monotonic() - asked)
            silences.append(float(re.findall(r"silences_total (\d\S*)", found)[0]))
            assert count(found) >= before
        assert seconds
        assert max(seconds) < 1.3
        assert silences == [float(number + 1) for number in range(len(silences))]
        folder.publish("good")
        asked = time.monotonic()
        assert folder.change("load", "good").status_code == 200
        assert time.monotonic() - asked < 15
        wait_for(lambda: stopped not in children(folder.pid))
        assert folder.of_each(2)[:2] == [{"digits": [1], "good": [1]}] * 2
        found = folder.metrics()
        assert found["dropserve_worker_deaths_total"] == 1
        assert found["dropserve_workers"] == 2
    said = [each["message"] for each in events(capfd.readouterr().out)]
    assert f"worker {stopped} is killed: it has not answered for 4 s" in said


def test_metrics_are_refused_while_the_parent_process_does_not_answer(
    start: Callable[..., Any],
) -> None:
    with start(DROPSERVE_WORKERS="2") as folder:
        os.kill(folder.pid, signal.SIGSTOP)
        try:
            answer = folder.client.get("/metrics")
            # As to changes, only the parent knows.
            assert folder.index() == {("digits", 1): ("READY", "")}
        finally:
            os.kill(folder.pid, signal.SIGCONT)
        assert answer.status_code == 503
        assert answer.json()["detail"] == "the parent process does not answer"
        assert folder.metrics()["dropserve_workers"] == 2


def requests(folder: Folder) -> float:
    return count(folder.client.get("/metrics").text)


def count(metrics: str) -> float:
    found = re.findall(r'dropserve_requests_total{.*route="/predict".*} (\S+)', metrics)
    return sum(map(float, found))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_signal_to_the_whole_process_group_loses_no_accepted_request(
    built: Path, tmp_path: Path, workers: str
) -> None:
    shutil.copytree(built / "models" / "digits", tmp_path / "digits")
    logged = tmp_path / "log"
    with logged.open("w") as log:
        # It signals its child, and then the group that it has made for itself and the child.
        process = subprocess.Popen(
            ["timeout", "7", sys.executable, "-m", "app", "--models", str(tmp_path)],
            cwd=ROOT,
            env=os.environ | SETTINGS | {"DROPSERVE_WORKERS": workers},
            stderr=log,
        )
    try:
        wait_for(lambda: "listening" in logged.read_text())
        (url,) = re.findall(r"http://[0-9.:]+", logged.read_text())
        body = {"inputs": [[0.0] * 64] * 100, "passes": 3000}

        def ask() -> list[int]:
            """Ask until the port is closed."""
            statuses: list[int] = []
            with suppress(httpx.ConnectError):
                while True:
                    answer = httpx.post(f"{url}/uncertainty", json=body, timeout=60)
                    statuses.append(answer.status_code)
            return statuses

        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask) for _ in range(6)]
            statuses = [each.result() for each in asked]
        assert [set(some) for some in statuses] == [{200}] * 6
        # Its own, once the time is up.
        assert process.wait(20) == 124
    finally:
        process.kill()
        process.wait()


def test_thousands_of_sighups_lead_to_few_reloads(start: Callable[..., Any]) -> None:
    with start() as folder:
        make_slow_to_load(folder.publish("slow"), MANY)
        (folder.publish("bad") / "predict.onnx").unlink()

        def refusals() -> float:
            text = folder.client.get("/metrics").text
            found = re.findall(r'model_loads_total{model="bad",outcome="refused"} (\S+)', text)
            return float(found[0]) if found else 0.0

        for _ in range(2000):
            os.kill(folder.pid, signal.SIGHUP)
            # Else the kernel would make one of several.
            time.sleep(0.001)
        wait_for(lambda: folder.served() == {"digits": [1], "slow": [1]})
        # A change waits for those before it.
        assert folder.change("load", "digits").status_code == 200
        assert 1 <= refusals() <= 4
