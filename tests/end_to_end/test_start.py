"""How the service starts, or refuses to."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import rewrite
from tests.conftest import ROOT, events, memory, run, service

WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "sklearn") or (
            name.startswith("dropserve.model")
        ):
            raise AssertionError(f"the service imports {name}")

sys.meta_path.insert(0, Refuse())
import asyncio
from pathlib import Path
import dropserve.__main__
from dropserve.app.cli import keys, serve
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.query import PredictQuery, Query
from dropserve.app.observability.record import RequestRecord
from dropserve.app.settings import Settings
from dropserve.app.processes.worker import Worker

worker = Worker(Settings(models=Path(sys.argv[1])), load_engines(Path(sys.argv[1]), "cpu"))
worker.application.rest.openapi()
service = worker.service
query = Query([[0.0] * 64], "digits", None, passes=10, seed=1, interval=0.5)

async def ask():
    record = RequestRecord()
    prediction = await service.predict(PredictQuery([[0.0] * 64], "digits"), record)
    print(prediction["model"], (await service.debug(query, record))["passes"])

asyncio.run(ask())
"""


def test_the_service_never_imports_torch(built: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(built / "models")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "digits 10\n", done.stderr


def test_a_service_of_digits_needs_less_than_200_megabytes(
    built: Path, tmp_path: Path, examples: Callable[[str], list[Any]]
) -> None:
    shutil.copytree(built / "models" / "digits", tmp_path / "digits")
    with service(tmp_path) as client:
        body = {"inputs": examples("digits")}
        for route in ("/predict", "/uncertainty", "/debug/mc"):
            assert client.post(route, json=body).status_code == 200
        assert memory(client, "VmHWM") < 200e6


def refused(*arguments: str, **environment: str) -> tuple[int, str]:
    """Start the service, which must refuse; return its exit status and message."""
    done = run("app", *arguments, **environment)
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize("package", ["dropserve.app.cli.serve", "dropserve.export.cli"])
def test_onnxruntime_is_told_not_to_report_to_its_maker(package: str, tmp_path: Path) -> None:
    # If it reported, it would begin when loaded, with an identifier that it stores here.
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0
    assert not list(tmp_path.rglob("*onnxruntime*"))


def test_an_unavailable_device_is_an_error_at_start(built: Path) -> None:
    models = str(built / "models")
    # An empty list of devices hides any GPU.
    status, says = refused("--models", models, "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert status == 1
    (line,) = [line for line in says.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: device cuda: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "x"], "--port: Input should be a valid integer"),
        (["--port", "70000"], "--port: Input should be less than or equal to 65535"),
        (["--device", "tpu"], "--device: Input should be 'auto', 'cpu', 'cuda' or 'tensorrt'"),
        (["--max-rows", "0"], "--max-rows: Input should be greater than or equal to 1"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_an_invalid_option_is_one_line_and_status_2(arguments: list[str], says: str) -> None:
    status, line = refused(*arguments)
    assert status == 2
    assert line.startswith(f"python -m app: error: {says}")
    assert "\n" not in line


def test_an_invalid_environment_variable_is_one_line_and_status_2() -> None:
    status, line = refused(DROPSERVE_MAX_PASSES="many")
    assert (status, line.splitlines()) == (2, [line])
    assert line.startswith("python -m app: error: --max-passes: Input should be a valid integer")


def test_a_missing_models_folder_is_one_line_and_status_1(tmp_path: Path) -> None:
    status, line = refused("--models", str(tmp_path / "none"))
    assert status == 1
    assert line == (
        f"error: the models folder '{tmp_path / 'none'}' cannot be read: No such file or directory"
    )


def test_an_empty_models_folder_is_one_line_and_status_1(tmp_path: Path) -> None:
    status, line = refused("--models", str(tmp_path))
    assert (status, line) == (
        1,
        f"error: the models folder '{tmp_path}' holds no bundle that can be served",
    )


def test_a_port_in_use_is_reported(built: Path) -> None:
    with service(built / "models") as client:
        port = str(client.base_url.port)
        status, says = refused("--models", str(built / "models"), "--port", port)
    assert status == 1
    (line,) = [line for line in says.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: cannot listen: Address already in use (while attempting to bind")
    assert port in line


def test_ctrl_c_stops_the_service_without_a_trace(
    built: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with service(built / "models") as client:
        pid = int(client.headers["x-test-pid"])
        assert client.get("/health/live").status_code == 200
        os.kill(pid, signal.SIGINT)
        assert os.waitpid(pid, 0) == (pid, 0)
    assert "Traceback" not in capfd.readouterr().out


def test_bundles_that_cannot_be_trusted_are_refused_and_the_others_served(
    built: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    digits = built / "models" / "digits" / "1"
    for name in ("good", "changed", "newer", "unloadable", "halved"):
        shutil.copytree(digits, tmp_path / name / "1")
    for name in ("good", "changed", "newer", "unloadable", "halved"):
        rewrite(tmp_path / name / "1", name=name)
    flip = tmp_path / "changed" / "1" / "stochastic.onnx"
    flip.write_bytes(flip.read_bytes()[:-1] + b"\0")
    rewrite(tmp_path / "newer" / "1", schema_version=2)
    (tmp_path / "unloadable" / "1" / "predict.onnx").write_bytes(b"no graph")
    rewrite(tmp_path / "unloadable" / "1")
    shutil.copy(digits / "predict.onnx", tmp_path / "halved" / "1" / "stochastic.onnx")
    rewrite(tmp_path / "halved" / "1")
    # No models: the remains of a killed export, and a stray file.
    (tmp_path / "good" / ".staging-x").mkdir()
    (tmp_path / "notes.txt").touch()
    with service(tmp_path) as client:
        assert client.get("/health/ready").json()["models"] == {"good": [1]}
        # The only model needs no name.
        assert client.post("/predict", json={"inputs": [[0] * 64]}).status_code == 200
    errors = [e["message"] for e in events(capfd.readouterr().out) if e["level"] == "error"]
    said = sorted(errors)
    assert [line.split(":")[0] for line in said] == [
        "refused changed version 1",
        "refused halved version 1",
        "refused newer version 1",
        "refused unloadable version 1",
    ]
    assert "stochastic.onnx has changed: its SHA-256 is" in said[0]
    assert "stochastic.onnx has the inputs ['x']; its manifest says ['x', 'rows', " in said[1]
    assert "manifest.json is of schema 2" in said[2]
    assert "predict.onnx does not load" in said[3]
