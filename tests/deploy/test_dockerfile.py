"""The Dockerfile agrees with the project; ``test_image`` builds it."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from pydantic_settings import CliApp

from dropserve.app.settings import Settings
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
LIBRARIES = [
    Requirement(line)
    for line in (ROOT / "deploy" / "cuda-libraries.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_its_variables_are_settings_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    said = dict(re.findall(r"\b(DROPSERVE_\w+)=(\S+)", DOCKERFILE))
    assert said.keys() <= {f"DROPSERVE_{name.upper()}" for name in Settings.model_fields}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    settings = CliApp.run(Settings, cli_args=[])
    assert str(settings.models) == "/models"
    assert settings.host == "0.0.0.0"


def test_a_cuda_image_runs_on_a_gpu_or_not_at_all() -> None:
    (cuda,) = re.findall(r"^FROM served AS cuda\n(?:.*\n)*?ENV (.*)$", DOCKERFILE, re.MULTILINE)
    assert cuda == "DROPSERVE_DEVICE=cuda"


def test_every_cuda_library_that_onnxruntime_asks_for_is_pinned_exactly() -> None:
    pinned = {library.name: library.specifier for library in LIBRARIES}
    assert all(str(specifier).startswith("==") for specifier in pinned.values())
    asked = [
        requirement
        for requirement in map(Requirement, metadata.requires("onnxruntime-gpu") or ())
        for extra in ("cuda", "cudnn")
        if requirement.marker and requirement.marker.evaluate({"extra": extra})
    ]
    assert len(asked) > 4
    for requirement in asked:
        version = str(pinned[requirement.name]).removeprefix("==")
        assert requirement.specifier.contains(version), requirement


def test_all_that_it_copies_is_sent_to_the_builder() -> None:
    sent = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert {source for sources in copied for source in sources.split()} == sent
