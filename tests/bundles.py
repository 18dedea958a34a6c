"""Bundles for tests: trained on small data sets, or changed and broken copies of others."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dropserve.export.pipeline import export
from dropserve.model import checkpoint, datasets, training
from dropserve.model.datasets import Dataset
from dropserve.model.networks import NetworkConfig
from dropserve.model.training import TrainingConfig


def train_and_export(
    dataset: Dataset, network: NetworkConfig, how: TrainingConfig, folder: Path, name: str
) -> None:
    """Train a network into ``folder/runs`` and export it into ``folder/models``."""
    parts = datasets.split(dataset, how.seed)
    trained = training.train(network, parts, how, progress=False)
    run = folder / "runs" / name
    run.mkdir(parents=True)
    checkpoint.save(checkpoint.from_training(trained, network, parts, how.seed), run)
    export(run, folder / "models", name)


def rewrite(place: Path, **change: object) -> None:
    """Change fields of a manifest; without any, update its SHA-256 of the files beside it."""
    path = place / "manifest.json"
    manifest = json.loads(path.read_text())
    sums = {
        name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in manifest["files"]
    }
    if not change:
        change = {"files": sums}
    path.write_text(json.dumps(manifest | change))


def publish(source: Path, place: Path, **change: object) -> None:
    """Copy a bundle to ``place``, a ``models/NAME/VERSION``, and change fields of its manifest.

    The copy appears whole or not at all, as by an export. An older version there is replaced.
    """
    staging = place.parents[1] / f".staging-{place.parent.name}-{place.name}"
    shutil.copytree(source, staging)
    rewrite(staging, name=place.parent.name, version=int(place.name), **change)
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    staging.rename(place)


def make_slow_to_load(place: Path, products: int) -> None:
    """Have onnxruntime multiply large constants whenever it loads the graph of eval mode."""
    model = onnx.load(place / "predict.onnx")
    graph, output = model.graph, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    side = numpy_helper.from_array(np.array([1200, 1200]), "side")
    graph.initializer.append(side)
    fill = numpy_helper.from_array(np.zeros(1, np.float32))
    graph.node.append(helper.make_node("ConstantOfShape", ["side"], ["large0"], value=fill))
    for number in range(products):
        inputs = [f"large{number}", "large0"]
        graph.node.append(helper.make_node("MatMul", inputs, [f"large{number + 1}"]))
    graph.node.append(helper.make_node("ReduceSum", [f"large{products}"], ["none"], keepdims=0))
    graph.node.append(helper.make_node("Add", ["before", "none"], [output]))
    onnx.save(model, place / "predict.onnx")
    rewrite(place)


def make_endless(place: Path) -> None:
    """Put a loop into the graph of eval mode that takes longer than anybody lives."""
    model = onnx.load(place / "predict.onnx")
    graph, x = model.graph, model.graph.input[0]
    for node in graph.node:
        node.input[:] = ["after" if name == x.name else name for name in node.input]
    flag, rows = onnx.TensorProto.BOOL, x.type.tensor_type.elem_type
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["still_goes_on"]),
            helper.make_node("Identity", ["value"], ["same"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", flag, []),
            helper.make_tensor_value_info("value", rows, None),
        ],
        [
            helper.make_tensor_value_info("still_goes_on", flag, []),
            helper.make_tensor_value_info("same", rows, None),
        ],
    )
    graph.initializer.append(numpy_helper.from_array(np.array(2**62), "turns"))
    graph.initializer.append(numpy_helper.from_array(np.array(True), "begins"))
    loop = helper.make_node("Loop", ["turns", "begins", x.name], ["after"], body=body)
    graph.node.insert(0, loop)
    onnx.save(model, place / "predict.onnx")
    rewrite(place)


def change_a_file(place: Path) -> None:
    file = place / "stochastic.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")


def cut_the_manifest(place: Path) -> None:
    file = place / "manifest.json"
    file.write_bytes(file.read_bytes()[:-3])


def spoil_the_graph(place: Path) -> None:
    (place / "predict.onnx").write_bytes(b"no graph")
    rewrite(place)


def spoil_the_examples(place: Path) -> None:
    (place / "examples.json").write_text('[{"input": [1, 2, 3]}]')
    rewrite(place)


# Ways to break a bundle, and the error that follows.
BROKEN: dict[Callable[[Path], None], str] = {
    change_a_file: "stochastic.onnx has changed: its SHA-256 is ",
    cut_the_manifest: "manifest.json is no JSON object with a schema_version",
    spoil_the_graph: "predict.onnx does not load",
    spoil_the_examples: "examples.json: inputs.0: ",
}
