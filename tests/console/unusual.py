"""Unusual models that the page must show: many classes, several targets, colours, odd names."""

from pathlib import Path

import numpy as np

from dropserve.model.datasets import Dataset
from dropserve.model.networks import NetworkConfig
from dropserve.model.training import TrainingConfig
from tests.bundles import train_and_export

ROWS = 400
HOW = TrainingConfig(epochs=8, patience=None)
EVIL = "<img src=x onerror=document.title='hit'>"
LONG = "a_name_that_nobody_would_read_out_and_that_has_no_place_to_break_it_in_two"
# More than the twenty that the page shows.
CLASSES = 30


def make(folder: Path) -> None:
    """Train all of them into ``folder/models``."""
    for dataset, network in (many(), two(), coloured()):
        train_and_export(dataset, network, HOW, folder, dataset.name)


def many() -> tuple[Dataset, NetworkConfig]:
    """A table of many classes, with odd names."""
    random = np.random.default_rng(1)
    y = random.integers(0, CLASSES, ROWS)
    x = np.stack([np.cos(y), np.sin(y), y], axis=1) + random.normal(0, 0.3, (ROWS, 3))
    labels = tuple(f"{LONG}_{c}" for c in range(CLASSES - 1))
    dataset = Dataset(
        *("many", "classification", x.astype(np.float32), y.astype(np.int64)),
        features=(EVIL, f'{LONG}"', "größe 'in' 米"),
        outputs=(EVIL, *labels),
    )
    return dataset, NetworkConfig("mlp", (3,), CLASSES, (32,), 0.5, "classic")


def two() -> tuple[Dataset, NetworkConfig]:
    """Two targets of different sizes, far from 0, whose noise depends on the input."""
    random = np.random.default_rng(2)
    x = random.normal(0, 1, (ROWS, 2))
    noise = random.normal(0, 1, (ROWS, 2)) * (0.5 + np.abs(x[:, :1]))
    y = np.array([2000, 0.01]) + np.array([1, 0.001]) * (x + noise)
    dataset = Dataset(
        *("two", "regression", x.astype(np.float32), y.astype(np.float32)),
        features=("a", "b"),
        outputs=("year", EVIL),
    )
    return dataset, NetworkConfig("mlp", (2,), 2, (32,), 0.3, "classic", noise="input")


def coloured() -> tuple[Dataset, NetworkConfig]:
    """Images of three channels, whose class is the bright one."""
    random = np.random.default_rng(3)
    y = random.integers(0, 3, ROWS)
    x = random.uniform(0, 0.3, (ROWS, 3, 6, 9))
    x[np.arange(ROWS), y, 1:5, 2:7] += 0.6
    dataset = Dataset(
        *("coloured", "classification", x.astype(np.float32), y.astype(np.int64)),
        features=(),
        outputs=("red", "green", "blue"),
    )
    return dataset, NetworkConfig("mlp", (3, 6, 9), 3, (32, 32), 0.4, "inverted")
