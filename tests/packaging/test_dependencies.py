"""The bounds of the requirements are true: the project works at the ends of what it allows."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from tests.app.scoring.test_scorer import score, write
from tests.conftest import ROOT, once
from tests.end_to_end.test_metrics import collector
from tests.packaging import environments
from tests.packaging.environments import Environment

PROJECT = tomllib.loads(environments.PROJECT_FILE.read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines
]
(UVICORN,) = [requirement for requirement in REQUIREMENTS if requirement.name == "uvicorn"]
# pip-tools leaves it out of a lock.
UNPINNED = {"setuptools"}
SERVING = ("cpu", "score", "otel")
TRAINING = ("cpu", "train")
ON_CPU = ("--device", "cpu")


def pinned(file: Path) -> dict[str, str]:
    """Return the version of each package in a list of exact requirements."""
    lines = [line for line in file.read_text().splitlines() if "==" in line]
    requirements = [Requirement(line) for line in lines]
    return {each.name: str(each.specifier).removeprefix("==") for each in requirements}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_requirement_has_a_lower_bound_and_allows_the_locked_version(
    requirement: Requirement,
) -> None:
    assert any(bound.operator in (">=", "==") for bound in requirement.specifier)
    if requirement.name not in UNPINNED:
        assert requirement.specifier.contains(pinned(ROOT / "constraints.txt")[requirement.name])


def test_uvicorn_whose_private_parts_are_overridden_has_an_upper_bound() -> None:
    assert any(bound.operator == "<" for bound in UVICORN.specifier)


@pytest.mark.slow
@pytest.mark.parametrize("resolution", ["lowest", "highest"])
def test_the_server_passes_its_tests_with_the_oldest_and_the_newest_uvicorn(
    resolution: str, tmp_path: Path
) -> None:
    folder = tmp_path / "uvicorn"
    requirement = f"uvicorn{UVICORN.specifier}"
    install = (environments.UV, "pip", "install", "--python", sys.executable, "--no-deps")
    environments.call([*install, "--target", folder, "--resolution", resolution, requirement])
    # A folder in this variable comes before the installed packages, in child processes too.
    environment = os.environ | {"PYTHONPATH": str(folder)}
    found = subprocess.run(
        [sys.executable, "-c", "import uvicorn; print(uvicorn.__file__)"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert Path(found.stdout).is_relative_to(folder)
    command = [sys.executable, "-m", "pytest", "-n", "0", f"--basetemp={tmp_path / 'tests'}"]
    done = subprocess.run(
        [*command, "tests/app/server"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=environments.COMMAND_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environments.built_in(once(tmp_path_factory, "distributions", environments.build)).wheel


@pytest.fixture(scope="module")
def serving(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of the lowest versions of what serves, and of nothing else."""
    folder = tmp_path_factory.mktemp("serving")
    environment = environments.create(folder / "environment")
    environment.install("--requirement", environments.lowest(folder, SERVING))
    environment.install("--offline", "--no-deps", wheel)
    return environment


@pytest.fixture(scope="module")
def oldest(
    serving: Environment, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of a service in that environment."""
    folder = tmp_path_factory.mktemp("oldest")
    with serving.serve(built / "models", *ON_CPU, cwd=folder, DROPSERVE_DEBUG="1") as client:
        yield client


@pytest.mark.slow
def test_with_the_lowest_versions_responses_are_those_with_the_locked_ones(
    oldest: httpx.Client, client: httpx.Client, examples: Callable[[str], list[Any]]
) -> None:
    for model in ("digits", "diabetes"):
        body = {"model": model, "inputs": examples(model), "passes": 50, "seed": 7}
        for route in ("/predict", "/uncertainty", "/debug/mc"):
            sent = body if route != "/predict" else {"model": model, "inputs": body["inputs"]}
            low, locked = (each.post(route, json=sent) for each in (oldest, client))
            assert low.status_code == locked.status_code == 200
            assert_close(low.json(), locked.json())
    wrong = {"model": "digits", "inputs": [[float(number) for number in range(63)]]}
    low, locked = (each.post("/predict", json=wrong) for each in (oldest, client))
    assert low.status_code == locked.status_code == 422
    assert low.json()["errors"] == locked.json()["errors"]


def assert_close(left: Any, right: Any) -> None:
    """Hold that two JSON values differ in the rounding of their numbers alone."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_close(left[name], right[name])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_close(*pair)
    elif isinstance(left, float):
        assert np.isclose(left, right, rtol=1e-4, atol=1e-5)
    else:
        assert left == right


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/", "/docs", "/health/live", "/health/ready", "/metrics", "/v2", "/v2/models/digits"]
)
def test_with_the_lowest_versions_the_other_routes_answer(oldest: httpx.Client, path: str) -> None:
    assert oldest.get(path).status_code == 200


@pytest.mark.slow
def test_with_the_lowest_versions_the_document_has_the_same_paths_and_schemas(
    oldest: httpx.Client, client: httpx.Client
) -> None:
    low, locked = (each.get("/openapi.json").json() for each in (oldest, client))
    assert low["paths"].keys() == locked["paths"].keys()
    assert low["components"]["schemas"].keys() == locked["components"]["schemas"].keys()


@pytest.mark.slow
def test_with_the_lowest_versions_spans_are_written(
    serving: Environment, built: Path, tmp_path: Path, examples: Callable[[str], list[Any]]
) -> None:
    with collector() as (url, spans):
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        with serving.serve(built / "models", *ON_CPU, cwd=tmp_path, **variables) as client:
            body = {"model": "digits", "inputs": examples("digits")[:1]}
            assert client.post("/predict", json=body).status_code == 200
    assert {"POST /predict", "queue", "run"} <= {span.name for span in spans}


@pytest.mark.slow
def test_with_the_lowest_versions_a_file_is_scored_alike(
    serving: Environment, built: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 50, built)
    options = ("--passes", "20", "--seed", "5")
    done = score(built, source, tmp_path / "locked.parquet", *options)
    assert done.returncode == 0, done.stderr
    command = (serving.dropserve, "score", source, "lowest.parquet", *options)
    served = ("--models", built / "models", "--model", "diabetes", *ON_CPU)
    done = serving.run(*command, *served, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    low, locked = (
        pq.read_table(tmp_path / f"{name}.parquet").to_pydict() for name in ("lowest", "locked")
    )
    assert_close(low, locked)


@pytest.mark.slow
def test_the_lowest_versions_train_and_export(wheel: Path, tmp_path: Path) -> None:
    environment = environments.create(tmp_path / "environment")
    # torch is pinned exactly and large: it comes, with its own requirements, from here.
    without = tmp_path / "overrides.txt"
    without.write_text("torch; sys_platform == 'none'\n")
    file = environments.lowest(tmp_path, TRAINING, "--override", without)
    environment.install("--requirement", file)
    environment.install("--offline", "--no-deps", wheel)
    environment.borrow()
    lowest = pinned(file)
    assert "torch" not in lowest
    names = [name for name in lowest if name in {each.name for each in REQUIREMENTS}]
    versions = (
        "import importlib.metadata, json, sys;"
        "print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
    )
    done = environment.run(environment.python, "-c", versions, *names, cwd=tmp_path)
    assert json.loads(done.stdout) == {name: lowest[name] for name in names}
    options = ["--data", "digits", "--epochs", "5", "--hidden", "32", "--out", "run"]
    for command in (["train", *options], ["export", "run", "--models", "models"]):
        done = environment.run(environment.dropserve, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "run" / "1" / "manifest.json").exists()
    assert (tmp_path / "run" / "plots.png").exists()


@pytest.mark.slow
def test_all_extras_together_have_versions_at_the_lowest_bounds(tmp_path: Path) -> None:
    found = pinned(environments.lowest(tmp_path, tuple(EXTRAS)))
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(found[requirement.name]), requirement
