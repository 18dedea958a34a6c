"""The service on a real Ray cluster of two nodes, started by the commands in the docs."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import deployment
from benchmarks.predict_http import free_port
from tests.app.scoring.test_scorer import score, write
from tests.conftest import ROOT, run, wait_for

pytestmark = pytest.mark.slow

NODES = 2
CPUS_A_NODE = 2
REPLICAS = 2
START_SECONDS = 120
CLIENTS = 8
# Longer than one request of each client takes.
LOAD_SECONDS = 3


@pytest.fixture(scope="module")
def haproxy() -> Iterator[Path]:
    """A folder whose path is short enough for sockets in the folders that Ray makes below it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A keys file, and a key with all scopes."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    scopes = ["--scope", "predict,debug,admin"]
    return file, run("app", "key", "new", *scopes, "--file", str(file)).stdout.strip()


@pytest.fixture(scope="module")
def cluster(built: Path, haproxy: Path, key: tuple[Path, str]) -> Iterator[str]:
    """A cluster with HAProxy, configured by deploy/ray/haproxy.env; yield its address."""
    environment = deployment.haproxy(haproxy) | {
        "DROPSERVE_MODELS": str(built / "models"),
        "DROPSERVE_DEVICE": "cpu",
        "DROPSERVE_DEBUG": "1",
        "DROPSERVE_API_KEYS_FILE": str(key[0]),
        "PYTHONPATH": str(ROOT),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # Ray reads the variables on import.
        from ray.cluster_utils import Cluster

        nodes = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": CPUS_A_NODE, "include_dashboard": False},
        )
        try:
            for _ in range(NODES - 1):
                nodes.add_node(num_cpus=CPUS_A_NODE)
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes.address
        finally:
            nodes.shutdown()  # type: ignore[no-untyped-call] # Ray does not type it


@pytest.fixture(scope="module")
def ray(cluster: str, key: tuple[Path, str]) -> Iterator[httpx.Client]:
    """A client of the service on the cluster."""
    port = str(free_port())
    serve("start", "--http-host", "127.0.0.1", "--http-port", port, "--proxy-location", "HeadOnly")
    serve("run", "--non-blocking", "deploy.ray.app:app", f"min_replicas={REPLICAS}")
    headers = {"x-api-key": key[1]}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
        yield client


def serve(*arguments: str) -> None:
    """Run Ray's command ``serve``."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "serve"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_keys_it_is_to_be_said_that_all_may_ask(built: Path) -> None:
    open_to_all = {"DROPSERVE_OPEN": "1"}
    for environment, status in (({}, 1), (open_to_all, 0)):
        done = subprocess.run(
            [sys.executable, "-c", "from deploy.ray.app import Options, app; app(Options())"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "DROPSERVE_MODELS": str(built / "models")}
            | environment,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == status
        said = "StartError: host 0.0.0.0 may be reached by others: name a file of keys"
        assert (said in done.stderr) == bool(status)


def replicas(built: Path) -> dict[int, float]:
    """Return the processor time of each replica of this cluster, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            ours = (
                f"DROPSERVE_MODELS={built / 'models'}".encode() in (entry / "environ").read_bytes()
            )
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if command.startswith(b"ray::ServeReplica:default:dropserve") and ours:
            found[int(entry.name)] = float(fields[11]) + float(fields[12])
    return found


def test_it_answers_as_the_service_without_ray_does(
    ray: httpx.Client, client: httpx.Client, examples: Callable[[str], list[Any]]
) -> None:
    for model in ("digits", "diabetes"):
        body = {"model": model, "inputs": examples(model), "passes": 100, "seed": 7}
        for route in ("/uncertainty", "/debug/mc"):
            here, there = (each.post(route, json=body).json() for each in (ray, client))
            assert here.keys() == there.keys()
            for name, value in there.items():
                if name in ("mean", "std", "samples"):
                    assert np.allclose(here[name], value, rtol=1e-5, atol=1e-5), name
            assert here["seed"] == 7
    body = {"model": "digits", "inputs": examples("digits")}
    answer = ray.post("/predict", json=body).json()
    assert answer["labels"] == client.post("/predict", json=body).json()["labels"]


@pytest.mark.parametrize(
    "path", ["/health/live", "/health/ready", "/v2", "/v2/models/digits", "/docs"]
)
def test_its_routes_are_those_of_the_service(
    ray: httpx.Client, client: httpx.Client, path: str
) -> None:
    here, there = ray.get(path), client.get(path)
    assert here.status_code == there.status_code == 200
    assert here.content == there.content


def test_its_document_is_that_of_the_service_with_keys(
    ray: httpx.Client, client: httpx.Client
) -> None:
    here, there = (each.get("/openapi.json").json() for each in (ray, client))
    assert here["paths"].keys() == there["paths"].keys()
    assert here["components"]["schemas"] == there["components"]["schemas"]


def test_an_error_is_the_services_own_with_the_id_that_the_client_gave(ray: httpx.Client) -> None:
    headers = {"X-Request-ID": "mine"}
    answer = ray.post("/predict", json={"inputs": [], "model": "no"}, headers=headers)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert answer.json()["request_id"] == "mine"


def test_who_has_no_key_gets_no_answer(ray: httpx.Client) -> None:
    assert httpx.post(f"{ray.base_url}/predict", json={"inputs": []}).status_code == 401


def test_models_are_not_changed_in_one_replica_alone(ray: httpx.Client) -> None:
    answer = ray.post("/v2/repository/models/digits/unload")
    assert answer.status_code == 400
    assert "deployed again" in answer.json()["error"]


def test_killing_a_replica_loses_no_acknowledged_request(
    ray: httpx.Client, built: Path, client: httpx.Client, examples: Callable[[str], list[Any]]
) -> None:
    # About 10 ms of work, so that the killed replica is in the middle of a request.
    body = {"model": "digits", "inputs": examples("digits"), "passes": 500, "seed": 3}
    right = client.post("/uncertainty", json=body).json()
    answers: list[httpx.Response] = []
    unanswered: list[object] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=ray.base_url, headers=ray.headers, timeout=60) as own:
            while not stop.is_set():
                try:
                    answers.append(own.post("/uncertainty", json=body))
                except (httpx.RemoteProtocolError, httpx.NetworkError):
                    # HAProxy closes connections when its list of replicas changes. A request
                    # that crosses this gets no response, and its client sends it again.
                    unanswered.append(body)
                    answers.append(own.post("/uncertainty", json=body))

    wait_for(lambda: len(replicas(built)) == REPLICAS)
    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    before = replicas(built)
    for each in clients:
        each.start()
    try:
        time.sleep(LOAD_SECONDS)
        now = replicas(built)
        busiest = max(before, key=lambda pid: now[pid] - before[pid])
        assert now[busiest] > before[busiest]
        os.kill(busiest, signal.SIGKILL)
        wait_for(lambda: busiest not in replicas(built))
        time.sleep(LOAD_SECONDS)
    finally:
        stop.set()
        for each in clients:
            each.join()
    assert {answer.status_code for answer in answers} == {200}
    # Requests of the killed replica, one per client, are repeated on another by HAProxy.
    assert len(unanswered) < CLIENTS // 2
    for answer in answers:
        assert np.allclose(answer.json()["mean"], right["mean"], rtol=1e-5, atol=1e-5)
    # Another replica takes its place.
    wait_for(lambda: len(replicas(built)) == REPLICAS)


def test_a_million_rows_score_to_the_same_numbers_with_ray_and_without(
    cluster: str, built: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 1_000_000, built)
    for target, options in (
        (tmp_path / "alone.parquet", []),
        (tmp_path / "ray.parquet", ["--ray"]),
    ):
        done = score(built, source, target, "--passes", "2", "--seed", "5", *options)
        assert done.returncode == 0, done.stderr[-3000:]
    with (
        pq.ParquetFile(tmp_path / "alone.parquet") as a,
        pq.ParquetFile(tmp_path / "ray.parquet") as b,
    ):
        assert a.metadata.num_rows == 1_000_000
        assert a.schema_arrow.equals(b.schema_arrow, check_metadata=True)
        assert a.read().equals(b.read())


def test_a_file_without_rows_scores_to_one_without_rows(
    cluster: str, built: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 0, built)
    done = score(built, source, tmp_path / "out.parquet", "--ray")
    assert done.returncode == 0, done.stderr
    assert len(pq.read_table(tmp_path / "out.parquet")) == 0


def test_a_cluster_that_is_not_there_is_one_line(
    cluster: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.parquet", 3, built)
    monkeypatch.setenv("RAY_ADDRESS", "not-an-address")
    done = score(built, source, tmp_path / "out.parquet", "--ray")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no Ray cluster at not-an-address: ")


def test_what_is_wrong_with_a_row_is_one_line_on_ray_too(
    cluster: str, built: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 70_000, built, spoiled=68_000)
    done = score(built, source, tmp_path / "out.parquet", "--passes", "2", "--ray")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {str(source)!r}: bmi: must be a float32 number, not nan (row 68000)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]
