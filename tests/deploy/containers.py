"""Build and run images: with a Docker engine, or where there is none with a stand-in.

The stand-in, ``../shared/tools/container``, builds with buildah and runs with podman, on a base
image made of Debian's packages under the public one's name.
"""

import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from tests.conftest import ROOT, wait_for_url

STAND_IN = ROOT.parent / "shared" / "tools" / "container"
BUILD_SECONDS = 1800
RUN_SECONDS = 120
# As an orchestrator that trusts nobody runs it.
CONFINED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", "512m", "--pids-limit", "100"),
)


class Running(NamedTuple):
    """A container that serves."""

    name: str
    url: str
    process: subprocess.Popen[bytes]


class Engine:
    """What builds and runs images here."""

    def __init__(self) -> None:
        self.docker = succeeds("docker", "info")
        if not self.docker and not STAND_IN.exists():
            raise RuntimeError("there is neither a Docker engine nor ../shared/tools/container")
        self.command = "docker" if self.docker else "podman"

    def build(self, tag: str, target: str) -> None:
        """Build a target of the Dockerfile."""
        arguments = (
            ["docker", "build", "--tag", tag, "--target", target, "."]
            if self.docker
            # Of the formats that buildah knows, one has health checks.
            else [str(STAND_IN), "build", tag, ".", "--target", target, "--format", "docker"]
        )
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def arguments(self, tag: str, options: Sequence[str], command: Sequence[str]) -> list[str]:
        """Return what runs an image, confined, on this machine's network."""
        if self.docker:
            run = ["docker", "run", "--rm", "--network", "host", *CONFINED, *options]
            return [*run, tag, *command]
        # podman alone mounts tmpfs beside a root file system that is read-only.
        run = [str(STAND_IN), "run", tag, "--read-only-tmpfs=false", *CONFINED, *options]
        return [*run, "--", *command]

    def run(
        self, tag: str, *command: str, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run an image to its end."""
        # Where there is no systemd podman complains of health checks.
        return subprocess.run(
            self.arguments(tag, ["--no-healthcheck", *options], command),
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )

    def inspect(self, kind: str, name: str, template: str) -> str:
        """Say something of an image or container, as Docker's templates have it."""
        return subprocess.run(
            [self.command, kind, "inspect", "--format", template, name],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=True,
        ).stdout.strip()

    def inside(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a container that runs."""
        # podman's own default looks for systemd, as its stand-in for running does not.
        how = [] if self.docker else ["--cgroup-manager=cgroupfs"]
        return subprocess.run(
            [self.command, *how, "exec", container, *command],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )

    @contextmanager
    def serve(self, tag: str, *options: str) -> Iterator[Running]:
        """Serve on a free port until the block ends; it must then end well."""
        name = f"dropserve-test-{uuid.uuid4().hex}"
        options = ("--name", name, "--env", "DROPSERVE_PORT=0", *options)
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                self.arguments(tag, options, []), stdout=log, stderr=subprocess.STDOUT
            )
            try:
                url = wait_for_url(process, log.fileno())
                yield Running(name, url.replace("0.0.0.0", "127.0.0.1"), process)
            finally:
                process.terminate()
                status = process.wait(timeout=RUN_SECONDS)
                log.seek(0)
                print(log.read())
            assert status == 0


def succeeds(*command: str) -> bool:
    """Tell whether a command is there and succeeds."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def megabytes(text: str) -> float:
    """Read a number of bytes as megabytes."""
    assert re.fullmatch(r"\d+", text)
    return int(text) / 1e6
