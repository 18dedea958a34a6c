"""The service keeps to its own OpenAPI document, as schemathesis checks it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import events, service

CONFIG = Path(__file__).with_name("schemathesis.toml")
# Tested by itself: it takes the models away from the other routes.
UNLOAD = "/v2/repository/models/{name}/unload"


@pytest.fixture
def served(built: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[httpx.Client]:
    """A client of a service that must not log an error."""
    with service(built / "models", DROPSERVE_MAX_ROWS="8", DROPSERVE_MAX_PASSES="50") as client:
        yield client
    assert {each["level"] for each in events(capfd.readouterr().out)} == {"info"}


def fuzz(client: httpx.Client, folder: Path, examples: int, *paths: str) -> str:
    """Have schemathesis make every check with so many examples a route; return its report."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("st")), "--config-file", str(CONFIG)),
            *("run", f"{client.base_url}/openapi.json", "--checks", "all", "--no-color"),
            *("--max-examples", str(examples), "--seed", "1", "--generation-deterministic"),
            "--continue-on-failure",
            *paths,
        ],
        cwd=folder,
        env=os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    return report


@pytest.mark.parametrize(
    "examples", [20, pytest.param(2000, marks=pytest.mark.slow)], ids="{} examples".format
)
def test_no_request_is_answered_outside_the_document(
    served: httpx.Client, tmp_path: Path, examples: int
) -> None:
    report = fuzz(served, tmp_path, examples, "--exclude-path", UNLOAD)
    assert "Tested: 25" in report
    report = fuzz(served, tmp_path, examples, "--include-path", UNLOAD)
    assert "Tested: 1" in report
