"""A network that predicts its noise, from training to the service."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from scipy import stats

from dropserve.app.bundles import loader
from dropserve.app.http import schemas
from dropserve.app.uncertainty.masks import KINDS, Kind
from dropserve.model import checkpoint
from dropserve.model.networks import NetworkConfig
from dropserve.model.training import TrainingConfig
from tests.bundles import train_and_export
from tests.conftest import service
from tests.model import toys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    network = NetworkConfig("mlp", (1,), 2, (32, 32), 0.02, "classic", noise="input")
    train_and_export(toys.noisy_targets(1000), network, TrainingConfig(epochs=40), folder, "noisy")
    return folder


@pytest.fixture(scope="module")
def noisy(folder: Path) -> Iterator[httpx.Client]:
    with service(folder / "models") as client:
        yield client


def ask(client: httpx.Client, route: str, **body: object) -> Any:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_manifest_says_that_the_noise_depends_on_the_input(folder: Path) -> None:
    manifest = loader.read_manifest(folder / "models" / "noisy" / "1")
    assert (manifest.noise, manifest.noise_std, manifest.width) == ("input", None, 4)
    assert manifest.outputs.labels == ("u", "v")
    assert len(manifest.conformal_scores or ()) == 2


def test_a_prediction_is_the_values_alone(noisy: httpx.Client, folder: Path) -> None:
    x = toys.noisy_targets(5, seed=1).x
    with torch.no_grad():
        expected = checkpoint.load(folder / "runs" / "noisy").model(torch.from_numpy(x))
    answer = ask(noisy, "/predict", inputs=x.tolist())
    np.testing.assert_allclose(answer["values"], expected[:, :2], rtol=1e-5, atol=1e-5)
    protocol = {"name": "x", "shape": [5, 1], "datatype": "FP32", "data": x.ravel().tolist()}
    answer = ask(noisy, "/v2/models/noisy/infer", inputs=[protocol])
    (values,) = answer["outputs"]
    assert values["shape"] == [5, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_passes_and_their_noise(
    noisy: httpx.Client, folder: Path, kind: Kind
) -> None:
    x = np.array([[-1.8], [-0.6], [0.6], [1.8]], np.float32)
    body = {"inputs": x.tolist(), "passes": 100, "seed": 3, "masks": kind, "interval": 0.8}
    answer = ask(noisy, "/debug/mc", **body)
    schemas.ValueDebug.model_validate(answer)
    samples = np.array(answer["samples"])
    assert samples.shape == (100, 4, 2)
    np.testing.assert_allclose(answer["mean"], samples.mean(axis=0), rtol=1e-5, atol=1e-5)
    std = samples.std(axis=0, ddof=1)
    np.testing.assert_allclose(answer["epistemic_std"], std, rtol=1e-4)
    total = np.hypot(std, answer["aleatoric_std"])
    np.testing.assert_allclose(answer["total_std"], total, rtol=1e-4)
    # The true noise grows sixfold from the first of these rows to the last.
    first, *_, last = np.array(answer["aleatoric_std"])[:, 0]
    assert last > 2 * first
    # The interval is that of a mixture whose parts differ in their noise; the mean noise comes
    # near.
    for end, share in (("lower", 0.1), ("upper", 0.9)):
        z = (np.array(answer["interval"][end]) - samples) / np.array(answer["aleatoric_std"])
        np.testing.assert_allclose(stats.norm.cdf(z).mean(axis=0), share, atol=0.04)


def test_intervals_of_fresh_rows_are_wide_where_the_noise_is(noisy: httpx.Client) -> None:
    fresh = toys.noisy_targets(2000, seed=1)
    answer = ask(noisy, "/uncertainty", inputs=fresh.x.tolist(), passes=50, interval=0.9)
    lower, upper = (np.array(answer["interval"][end])[:, 0] for end in ("lower", "upper"))
    left, right = fresh.x[:, 0] < -1, fresh.x[:, 0] > 1
    assert (upper - lower)[right].mean() > 1.5 * (upper - lower)[left].mean()
    inside = (lower <= fresh.y[:, 0]) & (fresh.y[:, 0] <= upper)
    # A fit, without the guarantee of the conformal interval.
    assert 0.8 < inside.mean() < 0.98
