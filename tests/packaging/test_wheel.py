"""The distributions, and the wheel installed where a user's own modules have the same names."""

import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

import dropserve
from tests.conftest import ROOT, once
from tests.packaging import environments
from tests.packaging.environments import Distributions, Environment

PACKAGES = ("app", "export", "model")
# A user's modules of these names must stay the user's.
TRAP = "raise RuntimeError('this is the module of the user')\n"
ROWS = 60


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    return environments.built_in(once(tmp_path_factory, "distributions", environments.build))


@pytest.fixture
def installed(distributions: Distributions, tmp_path: Path) -> Environment:
    """The wheel in an environment of its own, whose requirements come from this one."""
    environment = environments.create(tmp_path / "environment")
    environment.install("--offline", "--no-deps", distributions.wheel)
    environment.borrow()
    return environment


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A user's folder, with modules of the names that the packages have in the repository."""
    folder = tmp_path / "work"
    (folder / "app").mkdir(parents=True)
    for name in ("model.py", "app/__init__.py", "export.py"):
        (folder / name).write_text(TRAP)
    x = np.random.default_rng(1).normal(size=(ROWS, 3))
    rows = [f"{a:.3f},{b:.3f},{c:.3f},{a - b + 0.1 * c:.3f}" for a, b, c in x]
    (folder / "table.csv").write_text("\n".join(["a,b,c,y", *rows]) + "\n")
    return folder


def files_of_the_checkout() -> set[str]:
    """Return the paths that belong into a wheel, links followed."""
    found = {f"dropserve/{path.name}" for path in (ROOT / "dropserve").glob("*.py")}
    for name in PACKAGES:
        paths = [*(ROOT / name).rglob("*.py"), *(ROOT / name / "console").glob("*")]
        found |= {f"dropserve/{path.relative_to(ROOT)}" for path in paths}
    return found


def test_the_wheel_holds_one_package_with_every_module_and_the_console(
    distributions: Distributions,
) -> None:
    with zipfile.ZipFile(distributions.wheel) as wheel:
        entries = wheel.infolist()
    names = {entry.filename for entry in entries}
    information = f"dropserve-{dropserve.__version__}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in names} == {"dropserve", information}
    packaged = {name for name in names if not name.startswith(information)}
    assert "dropserve/app/console/index.html" in packaged
    assert packaged == files_of_the_checkout()
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries)


def test_the_source_distribution_holds_the_same_files_and_no_links(
    distributions: Distributions,
) -> None:
    with tarfile.open(distributions.sdist) as sdist:
        members = sdist.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    parts = [PurePosixPath(member.name).parts for member in members]
    assert {part[0] for part in parts} == {f"dropserve-{dropserve.__version__}"}
    names = {"/".join(part[1:]) for part in parts}
    assert names >= files_of_the_checkout()
    assert not names & set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_users_module_is_the_one_of_its_name(
    installed: Environment, work: Path, name: str
) -> None:
    done = installed.run(installed.python, "-c", f"import {name}", cwd=work)
    assert done.returncode == 1
    assert "this is the module of the user" in done.stderr
    done = installed.run(
        installed.python, "-c", f"import dropserve.{name} as it; print(it.__file__)", cwd=work
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout).is_relative_to(installed.folder)


def test_beside_the_users_modules_it_trains_exports_and_serves(
    installed: Environment, work: Path
) -> None:
    options = ["--data", "table.csv", "--target", "y", "--epochs", "2", "--out", "run"]
    done = installed.run(installed.dropserve, "train", *options, "--hidden", "8", cwd=work)
    assert done.returncode == 0, done.stderr
    # Here the user's folder comes before all others in the search for modules.
    command = (installed.python, "-m", "dropserve", "export", "run")
    done = installed.run(*command, "--models", "models", "--name", "mine", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "this is the module of the user" not in done.stdout + done.stderr
    options = ["--workers", "2", "--device", "cpu"]
    with installed.serve(Path("models"), *options, cwd=work) as client:
        answer = client.post("/predict", json={"inputs": [[1.0, 0.5, 0.0]]})
        assert answer.status_code == 200
        assert np.isfinite(answer.json()["values"]).all()
        assert client.get("/").status_code == client.get("/console/main.js").status_code == 200
