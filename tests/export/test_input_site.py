"""Networks that drop input features, from the checkpoint to the service."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.blocking import BlockingService
from dropserve.app.inference.query import Query
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.service import Service
from dropserve.export.pipeline import export
from dropserve.model import checkpoint
from dropserve.model.datasets import Dataset, split
from dropserve.model.dropout import SCALINGS, Scaling
from dropserve.model.networks import NETWORKS, NetworkName
from dropserve.model.training import TrainingConfig, train
from tests.model.toys import config

INPUT_P = 0.25
PASSES = 2000


def images() -> Dataset:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(120, 4, 4)).astype(np.float32)
    y = (10.0 * x.mean(axis=(1, 2)) + x[:, 0, 0])[:, None].astype(np.float32)
    return Dataset("images", "regression", x, y, (), ("y",))


def exported(folder: Path, network: NetworkName, scaling: Scaling) -> checkpoint.Checkpoint:
    """Train briefly, save and export as ``models/toy/1``; return the checkpoint."""
    parts = split(images(), 0)
    described = config(parts.train, network, 0.1, scaling)
    described = replace(described, input_p=INPUT_P)
    trained = train(described, parts, TrainingConfig(epochs=5), progress=False)
    saved = checkpoint.Checkpoint(
        model=trained.model,
        config=described,
        holdout=parts.test,
        feature_ranges=(),
        input_range=(-10.0, 10.0),
        noise_std=trained.noise_std,
        metrics=trained.metrics,
        seed=0,
        packages=checkpoint.package_versions(),
    )
    (folder / "run").mkdir()
    checkpoint.save(saved, folder / "run")
    # Publishes only graphs that pass verification.
    export(folder / "run", folder / "models", "toy")
    return saved


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_site_on_the_features_is_exported_verified_and_served(
    tmp_path: Path, network: NetworkName, scaling: Scaling
) -> None:
    saved = exported(tmp_path, network, scaling)
    manifest = json.loads((tmp_path / "models" / "toy" / "1" / "manifest.json").read_text())
    first = manifest["sites"][0]
    assert (first["name"], first["p"], first["mask_shape"]) == ("input_dropout", INPUT_P, [4, 4])
    # The weights of the first layer absorb the factor, if there is one.
    assert first["folded"]
    engines = load_engines(tmp_path / "models", "cpu")
    most = 100 * PASSES
    service = Service(
        engines, max_rows=100, max_passes=PASSES, max_row_passes=most, queue_rows=most
    )
    x = saved.holdout.x[:3]
    with BlockingService(service) as blocking:
        answer = blocking.debug(Query(x, None, None, PASSES, seed=1, interval=0.9))
    with torch.no_grad():
        expected = saved.model.eval()(torch.from_numpy(x)).numpy()
    assert answer["deterministic"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    samples, sites = answer["samples"], answer["sites"]
    assert isinstance(samples, np.ndarray)
    assert samples.std(axis=0).min() > 0
    assert isinstance(sites, list)
    assert sites[0]["kept"] == pytest.approx(1 - INPUT_P, abs=0.01)


def test_without_a_site_on_the_features_a_bundle_has_none(built: Path) -> None:
    manifest = json.loads((built / "models" / "digits" / "1" / "manifest.json").read_text())
    assert [site["name"] for site in manifest["sites"]] == [
        "network.dropouts.0",
        "network.dropouts.1",
    ]
