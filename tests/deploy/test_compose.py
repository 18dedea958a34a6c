"""docker-compose.yml is valid, agrees with the service, and requires keys."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import CliApp

from dropserve.app.processes.worker import MARGIN_SECONDS
from dropserve.app.security.api_keys import Keys
from dropserve.app.settings import Settings
from tests.conftest import ROOT

FILE = ROOT / "docker-compose.yml"
TEXT = FILE.read_text()
SERVICES = ("api", "api-cpu")
OTHERS = ("prometheus", "grafana")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
# Stands in for Docker in the commands of the file's first lines: runs the image's command here.
DOCKER = f"""#!{sys.executable}
import os, sys
if sys.argv[1] == "run":
    made = sys.argv[sys.argv.index("dropserve:cuda") + 1 :]
    made = [word.replace("/secrets/", "secrets/") for word in made]
    os.execv(sys.executable, [sys.executable, "-m", "app", *made])
"""


def composed(**environment: str) -> Any:
    """Read the file as Compose does, with these environment variables."""
    return yaml.safe_load(VARIABLE.sub(lambda found: environment.get(found[1], found[2]), TEXT))


COMPOSE = composed()


def variables(service: str, **environment: str) -> dict[str, str]:
    """Return the environment variables of a service."""
    found = composed(**environment)["services"][service]["environment"]
    return {name: str(value) for name, value in found.items()}


def settings(patch: pytest.MonkeyPatch, service: str, **environment: str) -> Settings:
    """Return the settings that a service reads from its variables."""
    for name, value in variables(service, **environment).items():
        patch.setenv(name, value)
    return CliApp.run(Settings, cli_args=[])


def checked(file: Path) -> subprocess.CompletedProcess[str]:
    """Check a file against the schema of the Compose specification."""
    command = Path(sys.executable).with_name("check-jsonschema")
    return subprocess.run(
        [command, "--builtin-schema", "vendor.compose-spec", file],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_is_valid_by_the_compose_specification() -> None:
    done = checked(FILE)
    assert done.returncode == 0, done.stdout


def test_a_misspelled_key_is_not_valid(tmp_path: Path) -> None:
    wrong = tmp_path / FILE.name
    wrong.write_text(TEXT.replace("read_only:", "readonly:"))
    done = checked(wrong)
    assert done.returncode == 1
    assert "'readonly' was unexpected" in done.stdout


@pytest.mark.parametrize("service", SERVICES)
def test_variables_are_settings_and_so_is_what_sets_them(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"DROPSERVE_{name.upper()}" for name in Settings.model_fields}
    assert variables(service).keys() <= names
    for name, value in yaml.safe_load(TEXT)["services"][service]["environment"].items():
        assert [found[1] for found in VARIABLE.finditer(value)] in ([], [name])
    # Raises if a value is invalid.
    settings(monkeypatch, service)


@pytest.mark.parametrize("service", SERVICES)
def test_debug_is_off_unless_asked_for(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings(monkeypatch, service).debug
    assert settings(monkeypatch, service, DROPSERVE_DEBUG="1").debug


@pytest.mark.parametrize("service", SERVICES)
def test_docker_kills_only_after_the_time_to_drain(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = settings(monkeypatch, service)
    grace = COMPOSE["services"][service]["stop_grace_period"]
    needed = found.drain_delay_seconds + found.drain_seconds + MARGIN_SECONDS
    assert float(grace.removesuffix("s")) > needed


def test_one_service_reserves_a_gpu_and_the_other_does_not() -> None:
    gpu, cpu = (COMPOSE["services"][name]["deploy"]["resources"] for name in SERVICES)
    (device,) = gpu["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert cpu.keys() == {"limits"}


def test_up_starts_the_service_with_a_gpu_alone() -> None:
    profiles = {name: made.get("profiles") for name, made in COMPOSE["services"].items()}
    assert profiles == {
        "api": None,
        "api-cpu": ["cpu"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_made_as_the_dockerfile_can(service: str) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    made = COMPOSE["services"][service]
    target = made["build"]["target"]
    assert re.search(rf"^FROM \S+ AS {target}$", dockerfile, re.MULTILINE)
    assert made["image"] == f"dropserve:{target}"
    for name in made["build"]["args"]:
        assert re.search(rf"^ARG {name}=", dockerfile, re.MULTILINE)
    (port,) = made["ports"]
    assert f"EXPOSE {port.rpartition(':')[2]}\n" in dockerfile
    (models,) = made["volumes"]
    assert f"DROPSERVE_MODELS={models.split(':')[1]} " in dockerfile


@pytest.mark.parametrize("service", SERVICES + OTHERS)
def test_a_service_has_no_more_rights_and_resources_than_it_needs(service: str) -> None:
    made = COMPOSE["services"][service]
    assert made["read_only"] is True
    assert made["cap_drop"] == ["ALL"]
    assert made["security_opt"] == ["no-new-privileges:true"]
    assert not made.keys() & {"privileged", "cap_add", "user", "network_mode", "pid", "devices"}
    assert made["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}


@pytest.mark.parametrize("service", SERVICES + OTHERS)
def test_ports_are_open_to_this_machine_alone(service: str) -> None:
    for port in COMPOSE["services"][service]["ports"]:
        assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("service", SERVICES)
def test_the_keys_are_a_secret_that_the_service_reads(service: str) -> None:
    made = COMPOSE["services"][service]
    assert made["secrets"] == ["api_keys"]
    assert variables(service)["DROPSERVE_API_KEYS_FILE"] == "/run/secrets/api_keys"
    assert "DROPSERVE_OPEN" not in variables(service)


def test_secrets_volumes_and_files_are_there() -> None:
    assert COMPOSE["secrets"].keys() == {
        secret for made in COMPOSE["services"].values() for secret in made.get("secrets", [])
    }
    sources = {
        volume.split(":")[0]
        for made in COMPOSE["services"].values()
        for volume in made.get("volumes", [])
    }
    folders = {source for source in sources if source.startswith("./")}
    assert COMPOSE["volumes"].keys() == sources - folders
    for folder in folders:
        assert (ROOT / folder).is_dir()


def test_one_variable_has_a_folder_served_in_place_of_the_volume() -> None:
    for service in SERVICES:
        made = composed(DROPSERVE_MODELS_FOLDER="./mine")["services"][service]
        assert made["volumes"] == ["./mine:/models:ro"]


def test_the_commands_in_its_first_lines_make_keys_that_the_containers_can_read(
    tmp_path: Path,
) -> None:
    comment = re.findall("^#   (.*)", TEXT, re.MULTILINE)
    commands = comment[: comment.index("chmod a+r secrets/*") + 1]
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    folder = tmp_path / "checkout"
    folder.mkdir()
    done = subprocess.run(
        # A user's default may be to close files to others.
        ["sh", "-ec", "\n".join(["umask 077", *commands])],
        cwd=folder,
        env=os.environ | {"PATH": f"{docker.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    secrets = [folder / composed()["secrets"][name]["file"] for name in ("api_keys", "metrics_key")]
    for file in secrets:
        assert file.stat().st_mode & 0o777 == 0o644
    assert secrets[0].parent.stat().st_mode & 0o777 == 0o700
    keys = Keys.read(secrets[0])
    keys.check({b"x-api-key": done.stdout.strip().encode()}, "predict")
    keys.check({b"x-api-key": secrets[1].read_bytes().strip()}, None)
