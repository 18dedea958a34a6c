"""Small data sets that a network learns within seconds, and small networks for them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dropserve.model.datasets import Dataset
from dropserve.model.dropout import Scaling
from dropserve.model.networks import NetworkConfig, NetworkName


def two_classes(rows: int = 200, seed: int = 0) -> Dataset:
    """Make rows of three features; the class is the sign of the first."""
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    return Dataset("toy", "classification", x, y, ("a", "b", "c"), ("below", "above"))


def two_targets(rows: int = 200, seed: int = 0) -> Dataset:
    """Make rows of three features; two targets are linear in them, with noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    y = x @ np.array([[1.0, 0.0], [2.0, -1.0], [0.0, 3.0]]) + rng.normal(0.0, 0.1, (rows, 2))
    return Dataset("toy", "regression", x, y.astype(np.float32), ("a", "b", "c"), ("u", "v"))


def noisy_classes(rows: int, seed: int = 0) -> Dataset:
    """Make rows of two features and three overlapping classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 2)).astype(np.float32)
    logits = 2 * x @ np.array([[1.0, -0.5, -0.5], [0.0, 0.87, -0.87]])
    y = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1).astype(np.int64)
    return Dataset("toy", "classification", x, y, ("a", "b"), ("red", "green", "blue"))


def noisy_targets(rows: int, seed: int = 0) -> Dataset:
    """Make rows of one feature from -2 to 2; the noise of two targets grows tenfold with it."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (rows, 1)).astype(np.float32)
    noise = noisy_targets_std(x) * rng.normal(size=(rows, 2))
    y = np.concatenate([np.sin(2 * x), 30 * x], axis=1) + noise * [1, 10]
    return Dataset("toy", "regression", x, y.astype(np.float32), ("a",), ("u", "v"))


def noisy_targets_std(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the noise std ``[B, 1]`` of the first target of ``noisy_targets``."""
    std: NDArray[np.float64] = 0.05 * 10 ** ((x.astype(np.float64) + 2) / 4)
    return std


def config(
    dataset: Dataset,
    network: NetworkName = "mlp",
    p: float = 0.2,
    scaling: Scaling = "classic",
    hidden: tuple[int, ...] = (16,),
) -> NetworkConfig:
    """Describe a small network for ``dataset``."""
    return NetworkConfig(network, dataset.x.shape[1:], len(dataset.outputs), hidden, p, scaling)


def tree(folder: Path) -> list[str]:
    """List everything below ``folder``, including hidden files and empty directories."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
