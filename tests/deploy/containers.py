"""Build and run images with a Docker engine, or with a stand-in on a machine without one.

The stand-in, ``../shared/tools/container``, builds with buildah and runs with podman. Its base
image is made of Debian's packages and has the public image's name.
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
# The confinement of a strict orchestrator.
CONFINED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", "512m", "--pids-limit", "100"),
)


class Running(NamedTuple):
    """A running container of the service."""

    name: str
    url: str
    process: subprocess.Popen[bytes]


class Engine:
    """The engine that builds and runs images on this machine."""

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
            # Of buildah's formats, only this one has health checks.
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
        """Return the command that runs an image, confined, on this machine's network."""
        if self.docker:
            run = ["docker", "run", "--rm", "--network", "host", *CONFINED, *options]
            return [*run, tag, *command]
        # Unlike Docker, podman adds tmpfs mounts to a read-only root file system by default.
        run = [str(STAND_IN), "run", tag, "--read-only-tmpfs=false", *CONFINED, *options]
        return [*run, "--", *command]

    def run(
        self, tag: str, *command: str, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run an image until it exits."""
        # Without systemd podman complains about health checks.
        return subprocess.run(
            self.arguments(tag, ["--no-healthcheck", *options], command),
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )

    def inspect(self, kind: str, name: str, template: str) -> str:
        """Return a property of an image or container, by a template of Docker's."""
        return subprocess.run(
            [self.command, kind, "inspect", "--format", template, name],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=True,
        ).stdout.strip()

    def inside(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a running container."""
        # podman's default needs systemd; the stand-in runs containers with this manager, too.
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
        """Serve on a free port until the block ends; the service must then exit with status 0."""
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
    """Tell whether a command exists and succeeds."""
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def megabytes(text: str) -> float:
    """Convert a number of bytes, as text, to megabytes."""
    assert re.fullmatch(r"\d+", text)
    return int(text) / 1e6
