"""Networks so small that enumerating all masks gives the exact distribution of a pass."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dropserve.export.bundle import Manifest
from dropserve.export.reference import TorchReference
from dropserve.model import checkpoint
from dropserve.model.dropout import SCALINGS
from dropserve.model.training import TrainingConfig
from tests.bundles import train_and_export
from tests.model import toys

Floats = NDArray[np.float64]

# Units of each site, 14 at most in total: 2^14 masks.
HIDDEN = {"one": (12,), "two": (7, 7)}
P = 0.3
ROWS = 3
NAMES = [
    f"{task}-{sites}-{scaling}"
    for task, sites, scaling in product(("classes", "values"), HIDDEN, SCALINGS)
]


@dataclass(frozen=True)
class Exact:
    """Rows of a network and its outputs with each of M masks.

    Parameters
    ----------
    x
        Rows ``[B, D]``.
    weights
        Probability of each mask, ``[M]``.
    outputs
        Class probabilities or values with each mask, ``[M, B, C]``.
    """

    x: NDArray[np.float32]
    weights: Floats
    outputs: Floats

    @property
    def mean(self) -> Floats:
        """Mean of a pass, ``[B, C]``."""
        return self.average(self.outputs)

    @property
    def variance(self) -> Floats:
        """Variance of a pass, ``[B, C]``."""
        return self.average((self.outputs - self.mean) ** 2)

    def average(self, values: Floats) -> Floats:
        """Return the expectation of ``values [M, ...]`` over the masks."""
        average: Floats = np.tensordot(self.weights, values, 1)
        return average


def train(name: str, folder: Path) -> None:
    """Train the network ``name`` and export it into ``folder/models``."""
    task, sites, scaling = name.split("-")
    dataset = toys.two_classes() if task == "classes" else toys.two_targets()
    assert scaling in SCALINGS
    network = toys.config(dataset, p=P, scaling=scaling, hidden=HIDDEN[sites])
    train_and_export(dataset, network, TrainingConfig(epochs=20), folder, name)


def exact(name: str, folder: Path, manifest: Manifest) -> Exact:
    """Run a network that was trained into ``folder`` with every mask, in torch."""
    trained = checkpoint.load(folder / "runs" / name)
    x = trained.holdout.x[:ROWS]
    units = [site.mask_shape[0] for site in manifest.sites]
    numbers = np.arange(2 ** sum(units))
    kept = (numbers[:, None] >> np.arange(sum(units))) & 1 == 1  # [M, units of all sites]
    weights = (P ** (~kept).sum(axis=1)) * ((1 - P) ** kept.sum(axis=1))
    ends = np.cumsum([0, *units])
    masks = {
        site.name: kept[:, start:end]
        for site, start, end in zip(manifest.sites, ends, ends[1:], strict=False)
    }
    reference = TorchReference(trained.model)
    outputs = [
        reference.train_mode(np.repeat(row[None], len(kept), axis=0), masks).astype(np.float64)
        for row in x
    ]
    answers = torch.from_numpy(np.stack(outputs, axis=1))
    if manifest.task == "classification":
        answers = answers.softmax(-1)
    return Exact(x, weights, answers.numpy())
