"""A bundle that reaches outside itself is refused at start, and those beside it are served."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import ROOT, service

# In the service's working directory, where onnxruntime would look for external data.
THERE = "pyproject.toml"


def external(tensor: TensorProto, location: str) -> None:
    """Mark a tensor's data as external."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def weights_from(location: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: external(model.graph.initializer[0], location)


def branch_that_reads_a_file(model: onnx.ModelProto) -> None:
    """Add a branch that reads a file; onnxruntime alone would load and serve the graph."""
    secret = TensorProto(name="secret", data_type=TensorProto.UINT8, dims=[16])
    external(secret, THERE)
    found = helper.make_tensor_value_info("found", TensorProto.UINT8, [16])
    node = helper.make_node("Identity", ["secret"], ["found"])
    branch = helper.make_graph([node], "branch", [], [found], [secret])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(
        helper.make_node("If", ["always"], ["spied"], then_branch=branch, else_branch=branch)
    )


def operator_of_a_library(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "own.lib"
    model.opset_import.add(domain="own.lib", version=1)


def rebuilt(place: Path, file: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph, and its hash in the manifest."""
    model = onnx.load(place / file)
    change(model)
    (place / file).write_bytes(model.SerializeToString())
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"][file] = hashlib.sha256((place / file).read_bytes()).hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))


def copied(built: Path, place: Path, /, **change: object) -> Path:
    """Copy a bundle to ``models/NAME/1``, with its name, and other changes, in the manifest."""
    shutil.copytree(built / "models" / "digits" / "1", place)
    manifest = json.loads((place / "manifest.json").read_text())
    change = {"name": place.parent.name} | change
    (place / "manifest.json").write_text(json.dumps(manifest | change))
    return place


def moved_out(path: Path, outside: Path) -> None:
    """Move a file or folder elsewhere and leave a link to it."""
    outside.mkdir(exist_ok=True)
    place = outside / f"{len(list(outside.iterdir()))}"
    path.rename(place)
    path.symlink_to(place)


def test_bundles_that_reach_outside_themselves_are_refused_and_the_others_served(
    built: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models, outside = tmp_path / "models", tmp_path / "outside"
    says = {}

    def bundle(name: str, reason: str, /, **change: object) -> Path:
        says[name] = reason
        return copied(built, models / name / "1", **change)

    copied(built, models / "good" / "1")
    assert (ROOT / THERE).exists()
    for name, location in (("beside", THERE), ("above", "../x"), ("absolute", "/etc/passwd")):
        place = bundle(name, "predict.onnx keeps data outside itself")
        rebuilt(place, "predict.onnx", weights_from(location))
    place = bundle("branch", "stochastic.onnx keeps data outside itself")
    rebuilt(place, "stochastic.onnx", branch_that_reads_a_file)
    place = bundle("library", "stochastic.onnx has operators of the domain 'own.lib'")
    rebuilt(place, "stochastic.onnx", operator_of_a_library)

    leads_out = "its directory is a link that leads out of the models folder"
    moved_out(bundle("linked", leads_out).parent, outside)
    moved_out(bundle("linked-version", leads_out), outside)
    for file in ("manifest.json", "predict.onnx", "examples.json"):
        name = f"linked-{file.partition('.')[0]}"
        moved_out(bundle(name, f"{file} is a link, not a file") / file, outside)

    # To open a named pipe is to wait for a writer.
    pipe = bundle("pipe", "predict.onnx is not a regular file") / "predict.onnx"
    pipe.unlink()
    os.mkfifo(pipe)
    pipe = bundle("pipe-manifest", "manifest.json is not a regular file") / "manifest.json"
    pipe.unlink()
    os.mkfifo(pipe)

    bundle("path", "manifest.json: name: String should match pattern", name="../good")
    bundle("path-in-files", "manifest.json: files must be predict.onnx", files={"../x": "0"})

    with service(models) as client:
        assert client.get("/health/ready").json()["models"] == {"good": [1]}
        assert client.post("/predict", json={"inputs": [[0] * 64]}).status_code == 200
    lines = capfd.readouterr().out.splitlines()
    for name, reason in says.items():
        (line,) = [line for line in lines if f"refused {name} version 1" in line]
        assert reason in line


def test_links_above_the_models_folder_and_within_it_are_followed(
    built: Path, tmp_path: Path
) -> None:
    # As Kubernetes mounts a volume, which changes by one link.
    volume = tmp_path / "volume"
    copied(built, volume / "..2026" / "digits" / "1")
    (volume / "..data").symlink_to("..2026")
    (volume / "digits").symlink_to("..data/digits")
    (tmp_path / "models").symlink_to(volume)
    with service(tmp_path / "models") as client:
        assert client.get("/health/ready").json()["models"] == {"digits": [1]}
