"""The distributions, and virtual environments outside the checkout to install them into."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.conftest import ROOT, START_SECONDS, wait_for_url

UV = Path(sys.executable).with_name("uv")
PROJECT_FILE = ROOT / "pyproject.toml"
COMMAND_SECONDS = 600
# Nothing that git ignores: above all no list of an earlier build's files, which setuptools would
# add to its own.
IGNORED = (".*", "*.egg-info", "__pycache__", "build", "models", "runs")


@dataclass(frozen=True)
class Distributions:
    """A source distribution and the wheel that was built from it."""

    sdist: Path
    wheel: Path


def build(folder: Path) -> None:
    """Build both distributions from a copy of the checkout, into ``folder/dist``."""
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source])


def built_in(folder: Path) -> Distributions:
    """Return the distributions that `build` left in a folder."""
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Distributions(sdist, wheel)


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "bin" / "python"

    @property
    def dropserve(self) -> Path:
        """The console script."""
        return self.folder / "bin" / "dropserve"

    def install(self, *arguments: str | Path) -> None:
        """Install packages, as ``uv pip install`` takes them."""
        call([UV, "pip", "install", "--quiet", "--python", self.python, *arguments])

    def borrow(self) -> None:
        """Have what is not installed here come from the environment that runs the tests.

        Its own path files are not read, among them the one of the editable installation.
        """
        site = call([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        Path(site.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(
        self, *command: str | Path, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder, with nothing in the environment that leads to the checkout."""
        return subprocess.run(
            command,
            cwd=cwd,
            env=outside() | environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    @contextmanager
    def serve(
        self, models: Path, *options: str, cwd: Path, **environment: str
    ) -> Iterator[httpx.Client]:
        """Run the service on a free port until the block ends; yield a client of it."""
        log = cwd / "service.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [self.dropserve, "serve", "--models", models, "--port", "0", *options],
                cwd=cwd,
                env=outside() | environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        try:
            with log.open() as stream:
                url = wait_for_url(process, stream.fileno())
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client
        finally:
            process.terminate()
            status = process.wait(timeout=START_SECONDS)
            print(log.read_text())
        assert status == 0


def create(folder: Path) -> Environment:
    """Make an environment with nothing installed."""
    call([UV, "venv", "--quiet", "--python", sys.executable, folder])
    return Environment(folder)


def lowest(folder: Path, extras: Sequence[str], *options: str | Path) -> Path:
    """Resolve the project's requirements to the lowest versions it allows; return the file."""
    file = folder / "lowest.txt"
    options = (*options, *(word for extra in extras for word in ("--extra", extra)))
    compile_ = [UV, "pip", "compile", "--quiet", "--python", sys.executable, *options]
    call([*compile_, "--resolution", "lowest-direct", "--output-file", file, PROJECT_FILE])
    return file


def outside() -> dict[str, str]:
    """Return this process's variables without those that say where to import from."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def call(command: Sequence[str | Path]) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
