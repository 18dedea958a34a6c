"""The checkpoint: round trip, content of its files, errors."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dropserve.model import checkpoint
from dropserve.model.checkpoint import Checkpoint, CheckpointError, load, save
from dropserve.model.datasets import Dataset, split
from dropserve.model.dropout import CustomDropout
from dropserve.model.networks import NETWORKS, NetworkName
from dropserve.model.training import TrainingConfig, train
from tests.model.toys import config, tree, two_classes, two_targets

FILES = ["checkpoint.json", "holdout.npz", "weights.safetensors"]


def trained(dataset: Dataset, network: NetworkName = "mlp", input_p: float = 0.0) -> Checkpoint:
    parts = split(dataset, 0)
    described = config(dataset, network, p=0.3, scaling="inverted", hidden=(8, 4))
    described = replace(described, input_p=input_p)
    result = train(described, parts, TrainingConfig(epochs=2), progress=False)
    return Checkpoint(
        model=result.model,
        config=described,
        holdout=parts.test,
        feature_ranges=((-1.5, 2.5),) * len(dataset.features),
        input_range=(-1.5, 2.5),
        noise_std=result.noise_std,
        metrics=result.metrics,
        seed=2**63 - 1,
        packages=checkpoint.package_versions(),
        eval_noise_std=result.eval_noise_std,
        temperature=1.25 if dataset.task == "classification" else None,
    )


@cache
def classifier() -> Checkpoint:
    return trained(two_classes(rows=60))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "toy"
    directory.mkdir()
    save(classifier(), directory)
    return directory


def refusal(directory: Path) -> str:
    """Return the error about a checkpoint: one line that names its directory."""
    with pytest.raises(CheckpointError) as refused:
        load(directory)
    message = str(refused.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


def test_a_checkpoint_older_than_the_input_site_has_none(saved: Path) -> None:
    path = saved / "checkpoint.json"
    document = json.loads(path.read_text())
    assert document["network"].pop("input_p") == 0.0
    path.write_text(json.dumps(document))
    assert load(saved).config == classifier().config


def test_the_input_site_comes_back(tmp_path: Path) -> None:
    before = trained(two_targets(60), input_p=0.25)
    save(before, tmp_path)
    after = load(tmp_path)
    assert after.config.input_p == 0.25
    site = after.model.input_dropout
    assert isinstance(site, CustomDropout)
    assert (site.p, site.scaling) == (0.25, "inverted")


def images() -> Dataset:
    x = np.random.default_rng(0).normal(size=(60, 4, 4)).astype(np.float32)
    return Dataset("images", "classification", x, np.arange(60) % 3, (), ("0", "1", "2"))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_comes_back_with_its_outputs(tmp_path: Path, network: NetworkName) -> None:
    before = trained(images(), network)
    save(before, tmp_path)
    after = load(tmp_path)
    assert not after.model.training
    x = torch.from_numpy(before.holdout.x)
    assert torch.equal(after.model(x), before.model.eval()(x))
    assert after.config == before.config


@pytest.mark.parametrize("dataset", [two_classes(60), two_targets(60), images()])
def test_everything_comes_back(tmp_path: Path, dataset: Dataset) -> None:
    before = trained(dataset)
    save(before, tmp_path)
    after = load(tmp_path)
    for name in (
        "config",
        "feature_ranges",
        "input_range",
        "noise_std",
        "metrics",
        "seed",
        "packages",
        "eval_noise_std",
        "temperature",
    ):
        assert getattr(after, name) == getattr(before, name), name
    ours, theirs = before.holdout, after.holdout
    assert (ours.name, ours.task, ours.features, ours.outputs) == (
        theirs.name,
        theirs.task,
        theirs.features,
        theirs.outputs,
    )
    assert np.array_equal(ours.x, theirs.x)
    assert np.array_equal(ours.y, theirs.y)
    assert (ours.x.dtype, ours.y.dtype) == (theirs.x.dtype, theirs.y.dtype)


def test_the_files_hold_no_pickle(saved: Path) -> None:
    assert tree(saved) == FILES
    weights = load_file(saved / "weights.safetensors")
    assert weights.keys() == classifier().model.state_dict().keys()
    with np.load(saved / "holdout.npz", allow_pickle=False) as holdout:
        assert {name: holdout[name].dtype.kind for name in holdout.files} == {"x": "f", "y": "i"}
    document = json.loads((saved / "checkpoint.json").read_text(encoding="utf-8"))
    assert next(iter(document)) == "schema_version"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "zeros", "flipped", "directory"])
def test_a_damaged_file_is_an_error_that_names_the_directory(
    saved: Path, name: str, damage: str
) -> None:
    path = saved / name
    content = path.read_bytes()
    quarter = len(content) // 4
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "half": content[: 2 * quarter],
                "zeros": bytes(len(content)),
                "flipped": content[:quarter] + b"\xff" * 40 + content[quarter + 40 :],
            }[damage]
        )
    refusal(saved)


def test_a_single_array_is_no_holdout(saved: Path) -> None:
    with (saved / "holdout.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refusal(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network", "foo"),
        ("hidden", []),
        ("hidden", [8, 5]),
        ("hidden", None),
        ("input_shape", []),
        ("input_shape", [4]),
        ("outputs", 3),
        ("outputs", -1),
        ("p", 1),
        ("input_p", 1),
        ("scaling", "foo"),
    ],
)
def test_a_description_that_does_not_fit_the_weights_is_damage(
    saved: Path, key: str, value: object
) -> None:
    path = saved / "checkpoint.json"
    document = json.loads(path.read_text())
    document["network"][key] = value
    path.write_text(json.dumps(document))
    assert "damaged checkpoint" in refusal(saved)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '"text"', '{"schema_version": 1}'])
def test_json_of_something_else_is_damage(saved: Path, content: str) -> None:
    (saved / "checkpoint.json").write_text(content)
    assert "damaged checkpoint" in refusal(saved)


def test_an_older_checkpoint_has_neither_temperature_nor_noise_of_eval_mode(saved: Path) -> None:
    path = saved / "checkpoint.json"
    document = json.loads(path.read_text())
    del document["temperature"], document["eval_noise_std"]
    path.write_text(json.dumps(document))
    older = load(saved)
    assert (older.temperature, older.eval_noise_std) == (None, None)


def test_a_newer_schema_is_named(saved: Path) -> None:
    path = saved / "checkpoint.json"
    newer = checkpoint.SCHEMA_VERSION + 1
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": newer}))
    assert f"schema {newer}, this version reads {checkpoint.SCHEMA_VERSION}" in refusal(saved)


def test_a_missing_or_empty_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    assert "holds no checkpoint" in refusal(tmp_path / "absent")
    assert "holds no checkpoint" in refusal(tmp_path)
