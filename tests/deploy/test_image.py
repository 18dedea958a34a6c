"""The Dockerfile's cpu image, run as by an orchestrator: ``make image-test``."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

import dropserve
from tests.conftest import wait_for
from tests.deploy.containers import Engine, Running, megabytes
from tests.end_to_end.test_console import loaded

pytestmark = pytest.mark.image

BASE = "python:3.11-slim-bookworm"
TAG = "dropserve:cpu"
OPEN = ("--env", "DROPSERVE_OPEN=1")
MOST_ADDED = 300  # megabytes
DIGIT = [
    *([0, 1, 8, 10, 14, 10, 0, 0], [0, 12, 10, 6, 6, 16, 2, 0], [0, 3, 0, 0, 7, 14, 1, 0]),
    *([0, 0, 0, 0, 9, 11, 0, 0], [0, 0, 0, 0, 2, 16, 1, 0], [0, 0, 0, 0, 0, 8, 12, 0]),
    *([0, 0, 4, 0, 2, 11, 9, 0], [0, 0, 12, 16, 14, 12, 4, 0]),
]  # the README's digit, a 3
WHAT_IS_THERE = """
import importlib.util, json, os, shutil
found = [os.path.join(at, name) for at, folders, files in os.walk("/")
         if not at.startswith(("/proc", "/sys", "/dev")) for name in folders + files]
print(json.dumps({
    "torch": [path for path in found if os.path.basename(path).startswith(("torch-", "libtorch"))],
    "imports": [name for name in ("torch", "onnx", "sklearn", "pip", "setuptools")
                if importlib.util.find_spec(name)],
    "compilers": [name for name in ("cc", "gcc", "g++", "clang", "ld") if shutil.which(name)],
    "caches": [path for path in found if path.endswith("/.cache/pip")],
}))
"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine()
    engine.build(TAG, "cpu")
    return engine


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[Running]:
    with engine.serve(TAG, *OPEN) as running:
        yield running


def test_it_is_ready_and_predicts_with_the_model_that_is_baked_in(running: Running) -> None:
    ready = httpx.get(f"{running.url}/health/ready").json()
    assert ready["device"] == "cpu"
    assert ready["models"] == {"digits": [1]}
    answer = httpx.post(f"{running.url}/predict", json={"inputs": [DIGIT]}).json()
    assert answer["labels"] == ["3"]
    body = {"inputs": [DIGIT], "passes": 100, "seed": 7}
    sure = httpx.post(f"{running.url}/uncertainty", json=body).json()
    assert sure["labels"] == ["3"]
    assert sure["mutual_information"][0] > 0


def test_the_console_and_all_its_files_are_in_it(running: Running) -> None:
    with httpx.Client(base_url=running.url) as client:
        files = loaded(client)
        assert {answer.status_code for answer in files.values()} == {200}
        assert "console/main.js" in files
        assert client.get("/console/service").json()["models"] == {"digits": [1]}


def test_the_debug_endpoint_is_off_unless_it_is_asked_for(engine: Engine, running: Running) -> None:
    body = {"inputs": [DIGIT], "passes": 2}
    assert httpx.post(f"{running.url}/debug/mc", json=body).status_code == 404


def test_it_runs_without_root_capabilities_or_a_way_to_gain_them(
    engine: Engine, running: Running
) -> None:
    pid = engine.inspect("container", running.name, "{{.State.Pid}}")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["10001"] * 4
    assert {int(status[field], 16) for field in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"].strip() == "1"
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    # No shell in between, which would not pass signals on.
    assert command[:3] == [b"python", b"-m", b"dropserve.app"]


def test_nothing_can_be_written_in_it(engine: Engine, running: Running) -> None:
    for place in ("/", "/tmp", "/models", "/project", "/opt/dropserve"):
        done = engine.inside(running.name, "python", "-c", f"open('{place}/new', 'w')")
        assert "Read-only file system" in done.stderr, place


def test_its_health_check_succeeds_while_it_is_ready_alone(
    engine: Engine, running: Running
) -> None:
    check = orjson.loads(engine.inspect("image", TAG, "{{json .Config.Healthcheck.Test}}"))
    assert check[0] == "CMD"
    port = running.url.rpartition(":")[2]
    # The service here took any free port, so the check has to be told which.
    for number, status in ((port, 0), ("1", 1)):
        done = engine.inside(running.name, "env", f"DROPSERVE_PORT={number}", *check[1:])
        assert done.returncode == status, done.stderr


def test_what_builds_models_and_images_is_not_in_it(engine: Engine) -> None:
    options = ["--env", "PYTHONDONTWRITEBYTECODE=1", "--entrypoint", "python"]
    done = engine.run(TAG, "-c", WHAT_IS_THERE, options=options)
    found = orjson.loads(done.stdout)
    assert found == {"torch": [], "imports": [], "compilers": [], "caches": []}


def test_it_adds_at_most_300_megabytes_to_its_base(engine: Engine) -> None:
    sizes = [megabytes(engine.inspect("image", name, "{{.Size}}")) for name in (TAG, BASE)]
    print(f"{sizes[0] - sizes[1]:.0f} MB")
    assert sizes[0] - sizes[1] <= MOST_ADDED


def test_its_labels_say_what_it_is(engine: Engine) -> None:
    labels = orjson.loads(engine.inspect("image", TAG, "{{json .Config.Labels}}"))
    assert labels["org.opencontainers.image.title"] == dropserve.__name__
    assert labels["org.opencontainers.image.version"] == dropserve.__version__


def test_models_mounted_on_it_answer_as_they_do_outside(
    engine: Engine, built: Path, client: httpx.Client, examples: Callable[[str], list[Any]]
) -> None:
    for folder in (built, *built.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    body = {"inputs": examples("diabetes"), "model": "diabetes", "passes": 100, "seed": 5}
    with engine.serve(TAG, *OPEN, "--volume", f"{built / 'models'}:/models:ro") as running:
        inside = httpx.post(f"{running.url}/uncertainty", json=body).json()
    outside = client.post("/uncertainty", json=body).json()
    for statistic in ("mean", "std"):
        assert np.allclose(inside[statistic], outside[statistic], rtol=1e-5, atol=1e-5)
    assert inside["seed"] == outside["seed"] == 5


def test_told_to_end_it_answers_what_it_has_taken(engine: Engine) -> None:
    body = {"inputs": [DIGIT] * 90, "passes": 10_000, "seed": 1}
    with engine.serve(TAG, *OPEN) as running, ThreadPoolExecutor() as threads:
        long = threads.submit(httpx.post, f"{running.url}/uncertainty", json=body, timeout=60)
        wait_for(lambda: "dropserve_queue_rows 0.0" not in httpx.get(f"{running.url}/metrics").text)
        # The engine's client passes the signal on, like `docker stop`.
        running.process.send_signal(signal.SIGTERM)
        assert long.result().status_code == 200
        assert running.process.wait(timeout=30) == 0


def test_a_models_folder_that_cannot_be_read_is_one_clear_line(
    engine: Engine, tmp_path: Path
) -> None:
    closed = tmp_path / "models"
    closed.mkdir(mode=0o700)
    done = engine.run(TAG, options=[*OPEN, "--volume", f"{closed}:/models:ro"])
    assert done.stderr == "error: the models folder '/models' cannot be read: Permission denied\n"
    assert done.returncode == 1


def test_open_to_others_without_keys_it_says_what_is_needed(engine: Engine) -> None:
    done = engine.run(TAG)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: host 0.0.0.0 may be reached by others: name a file of keys")
    assert done.returncode == 1


def test_with_a_keys_file_it_made_itself_it_answers_who_has_the_key(
    engine: Engine, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    mounted = ["--volume", f"{tmp_path}:/secrets"]
    new = ["key", "new", "--scope", "predict", "--name", "me", "--file", "/secrets/keys.json"]
    key = engine.run(TAG, *new, options=mounted).stdout.strip()
    keys = ("--env", "DROPSERVE_API_KEYS_FILE=/secrets/keys.json", *mounted)
    with engine.serve(TAG, *keys) as running:
        for headers, status in (({}, 401), ({"x-api-key": key}, 200)):
            answer = httpx.post(f"{running.url}/predict", json={"inputs": [DIGIT]}, headers=headers)
            assert answer.status_code == status
