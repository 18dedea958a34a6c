"""Fixtures that all tests share: bundles made by the real commands, and real services."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock

# The workers of a parallel run share the cores, so torch's threads would only compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Fixtures import torch themselves: the process that only hands out tests reads this file, too, and
# all others would wait for it.

ROOT = Path(__file__).parents[1]
START_SECONDS = 60
PATIENCE = 30  # seconds
# How long a client keeps an idle connection: less than the 5 s of the service, as a request that
# crosses its closing would be lost.
KEPT_SECONDS = 2
# Default settings of a service under test.
SETTINGS = {"DROPSERVE_DEBUG": "1", "DROPSERVE_DEVICE": "cpu", "DROPSERVE_PORT": "0"}
# The models that the tests serve, by name, and the options of their training.
TRAINED = {
    "digits": ["--data", "digits"],
    "double": ["--data", "digits", "--scaling", "double", "--p", "0.3", "--epochs", "10"],
    "diabetes": ["--data", "diabetes"],
}

# The folders to begin with. Each of two workers starts on one half of the tests and, once done,
# takes over from the end of the other half. In this order tests that load a service, the soak
# (benchmarks) included, run beside lighter ones, and short tests come last.
FIRST = ("end_to_end", "deploy", "benchmarks", "export")

Serve = Callable[..., AbstractContextManager[httpx.Client]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by their folders."""
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(FIRST)))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_here(main: Callable[[], int], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project in this process, which has imported its packages before."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["", *arguments])
        try:
            status = main()
        except SystemExit as left:
            status = int(str(left.code))
        finally:
            # A command may have set its own handler.
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/NAME``, ``models/NAME/1`` and ``NAME.log``, the commands' output."""

    def make(folder: Path) -> None:
        for name, options in TRAINED.items():
            build(folder, name, options)

    return once(tmp_path_factory, "built", make)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/NAME`` and ``models/NAME/1`` of each of ``enumerated.NAMES``."""
    from tests import enumerated

    def make(folder: Path) -> None:
        for name in enumerated.NAMES:
            enumerated.train(name, folder)

    return once(tmp_path_factory, "tiny", make)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first process to need it makes; all others share it.

    These are the workers of a run, and all runs with the same folder in TESTS_SHARED.
    """
    if "TESTS_SHARED" in os.environ:
        folder = ROOT / os.environ["TESTS_SHARED"]
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent
    folder = folder / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            make(folder)
            (folder / "done").touch()
    return folder


def build(folder: Path, name: str, options: list[str]) -> None:
    """Train and export one model."""
    from dropserve.export.__main__ import main as export
    from dropserve.model.__main__ import main as model

    checkpoint = str(folder / "runs" / name)
    log = []
    for done in (
        run_here(model, "train", *options, "--out", checkpoint),
        run_here(export, checkpoint, "--models", str(folder / "models")),
    ):
        assert done.returncode == 0, done.stderr
        log.append(done.stdout + done.stderr)
    (folder / f"{name}.log").write_text("".join(log))


@contextmanager
def service(models: Path, **environment: str) -> Iterator[httpx.Client]:
    """Run the real service on a free port, until the block ends; yield a client of it."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "--models", str(models)],
            cwd=ROOT,
            env=os.environ | SETTINGS | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = wait_for_url(process, log.fileno())
            limits = httpx.Limits(keepalive_expiry=KEPT_SECONDS)
            with httpx.Client(base_url=url, timeout=60, limits=limits) as client:
                client.headers["x-test-pid"] = str(process.pid)
                yield client
        finally:
            process.terminate()
            status = process.wait(timeout=START_SECONDS)
            log.seek(0)
            print(log.read())
        assert status == 0


def wait_for_url(process: subprocess.Popen[bytes], log: int) -> str:
    """Return the address that a starting service says it listens on."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        text = os.pread(log, 1 << 20, 0).decode()
        if found := re.search(r"listening on (http://\S+)", text):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the service did not start: {os.pread(log, 1 << 20, 0).decode()}")


def events(log: str) -> list[dict[str, Any]]:
    """Read the service's log, every line of which is a JSON object."""
    return [json.loads(line) for line in log.split("\n") if line]


def memory(client: httpx.Client, field: str) -> int:
    """Return resident memory of the service in bytes: now (VmRSS) or at its peak (VmHWM)."""
    status = Path(f"/proc/{client.headers['x-test-pid']}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> set[int]:
    """Return the worker processes of a service."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(parent) == pid and b"spawn_main" in command:
                found.add(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="session")
def client(built: Path) -> Iterator[httpx.Client]:
    """A client of a service with all models, the debug endpoint on."""
    with service(built / "models") as client:
        yield client


@pytest.fixture(scope="session")
def examples(built: Path) -> Callable[[str], list[object]]:
    """Real inputs of a model."""

    def inputs(name: str) -> list[object]:
        rows = json.loads((built / "models" / name / "1" / "examples.json").read_text())
        return [row["input"] for row in rows]

    return inputs
