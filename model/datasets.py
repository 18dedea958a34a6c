"""Data sets: scikit-learn's digits and diabetes, CSV files, NPZ files; and their split by seed.

Features and regression targets are raw float32 values. An error in a file is a ``DataError`` whose
message names the row and the column.
"""

import csv
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets as bundled

Task = Literal["classification", "regression"]
TASKS: tuple[Task, ...] = get_args(Task)

MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
FEWEST_ROWS = 20
# Whole numbers with at most this many distinct values are taken as classes.
MOST_NUMERIC_CLASSES = 20


class DataError(Exception):
    """A data set cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Dataset:
    """Rows of raw features with their targets."""

    name: str
    task: Task
    x: NDArray[np.float32]  # [B, *shape]
    y: NDArray[np.int64] | NDArray[np.float32]  # [B] class numbers, or [B, C] values
    features: tuple[str, ...]  # D names, empty for images
    outputs: tuple[str, ...]  # C class labels, or names of the targets

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: NDArray[np.int64]) -> "Dataset":
        """Return the given rows as a data set of their own."""
        return replace(self, x=self.x[rows], y=self.y[rows])


@dataclass(frozen=True)
class Split:
    """Three disjoint parts: for training, for early stopping and tuning, and for reporting."""

    train: Dataset
    validation: Dataset
    test: Dataset


def split(dataset: Dataset, seed: int) -> Split:
    """Split at random, 70 : 15 : 15; the seed and the number of rows determine the split."""
    order = np.random.default_rng(seed).permutation(len(dataset)).astype(np.int64)
    held_out = max(1, round(0.15 * len(dataset)))
    return Split(
        train=dataset.take(order[2 * held_out :]),
        validation=dataset.take(order[held_out : 2 * held_out]),
        test=dataset.take(order[:held_out]),
    )


def load(data: str, target: str | None = None, task: Task | None = None) -> Dataset:
    """Load ``digits``, ``diabetes``, ``FILE.csv`` (with ``target``) or ``FILE.npz``.

    Parameters
    ----------
    data
        Name of a bundled data set, or path of a file.
    target
        CSV column to predict.
    task
        Kind of task; if None, inferred from the targets.

    Raises
    ------
    DataError
        If there is no such data set, or its content cannot be used.
    """
    if data in BUNDLED:
        if target is not None:
            raise DataError(f"data set {data} has its own target; --target is for CSV files")
        dataset = BUNDLED[data]()
        if task not in (None, dataset.task):
            raise DataError(f"data set {data} is for {dataset.task}, not {task}")
        return dataset
    path = Path(data)
    if path.suffix.lower() not in (".csv", ".npz"):
        known = ", ".join(BUNDLED)
        raise DataError(f"unknown data set {data!r}: allowed are {known}, FILE.csv and FILE.npz")
    if not path.is_file():
        raise DataError(f"no such file: {data}")
    try:
        dataset = (
            load_csv(path, target, task)
            if path.suffix.lower() == ".csv"
            else load_npz(path, target, task)
        )
    except OSError as error:
        raise DataError(f"{data}: cannot be read: {error.strerror or error}") from None
    if len(dataset) < FEWEST_ROWS:
        raise DataError(f"{data}: {len(dataset)} rows, at least {FEWEST_ROWS} are needed")
    if dataset.task == "classification" and len(dataset.outputs) < 2:
        raise DataError(f"{data}: one class only ({dataset.outputs[0]!r}), at least 2 are needed")
    return dataset


def load_digits() -> Dataset:
    """Load scikit-learn's digits: 1,797 images of 8x8 pixels with values 0 to 16, ten classes."""
    digits = bundled.load_digits()
    return Dataset(
        name="digits",
        task="classification",
        x=digits.images.astype(np.float32),
        y=digits.target.astype(np.int64),
        features=(),
        outputs=tuple(str(label) for label in digits.target_names),
    )


def load_diabetes() -> Dataset:
    """Load scikit-learn's diabetes: 442 patients, ten features, disease progression in a year."""
    diabetes = bundled.load_diabetes(scaled=False)
    return Dataset(
        name="diabetes",
        task="regression",
        x=diabetes.data.astype(np.float32),
        y=diabetes.target.astype(np.float32)[:, None],
        features=tuple(diabetes.feature_names),
        outputs=("progression",),
    )


BUNDLED: dict[str, Callable[[], Dataset]] = {"digits": load_digits, "diabetes": load_diabetes}


def load_csv(path: Path, target: str | None, task: Task | None) -> Dataset:
    """Load a CSV file with a header row; every column but ``target`` is a numeric feature."""
    header, lines = read_csv(path)
    columns = ", ".join(name if name.isprintable() else repr(name) for name in header)
    if target is None:
        raise DataError(f"{path}: --target COLUMN is needed, one of: {columns}")
    if target not in header:
        raise DataError(f"{path}: no column {target!r}, there are: {columns}")
    if len(header) < 2:
        raise DataError(f"{path}: no feature column beside the target {target!r}")
    at = header.index(target)
    features = tuple(name for name in header if name != target)
    x = np.array(
        [
            [
                number(path, row, name, cell)
                for name, cell in zip(header, cells, strict=True)
                if name != target
            ]
            for row, cells in lines
        ],
        dtype=np.float32,
    )
    texts = [filled(path, row, target, cells[at]) for row, cells in lines]
    task = task or csv_task(texts)
    if task == "regression":
        values = [number(path, row, target, cells[at]) for row, cells in lines]
        y_values = np.array(values, dtype=np.float32)[:, None]
        return Dataset(path.stem, task, x, y_values, features, (target,))
    labels, y = classes(texts)
    return Dataset(path.stem, task, x, y, features, labels)


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the numbered data rows, every row as long as the header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = list(enumerate((cells for cells in reader if cells), start=1))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {error}") from None
    if not header:
        raise DataError(f"{path}: empty, a header row is needed")
    if "" in header or len(set(header)) < len(header):
        raise DataError(f"{path}: the header's column names must be there and differ: {header}")
    if not rows:
        raise DataError(f"{path}: no rows below the header")
    for row, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{path}: row {row} has {len(cells)} cells, the header {len(header)}")
    return header, rows


def filled(path: Path, row: int, column: str, cell: str) -> str:
    """Return the stripped text of a cell; raise DataError for a missing value."""
    if cell.strip().lower() in MISSING:
        raise DataError(f"{path}: missing value in row {row}, column {column!r}")
    return cell.strip()


def number(path: Path, row: int, column: str, cell: str) -> float:
    """Return the number in a cell; raise DataError if it holds none, or one beyond float32."""
    text = filled(path, row, column, cell)
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{path}: row {row}, column {column!r}: {text!r} is not a number") from None
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise DataError(f"{path}: row {row}, column {column!r}: {text} is not a float32 number")
    return value


def csv_task(texts: Sequence[str]) -> Task:
    """Return the task for a target column: texts, or few distinct whole numbers, are classes."""
    try:
        values = {float(text) for text in texts}
    except ValueError:
        return "classification"
    whole = all(value.is_integer() for value in values)
    return "classification" if whole and len(values) <= MOST_NUMERIC_CLASSES else "regression"


def classes(texts: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the labels, in numeric or alphabetic order, and the class ``[B]`` of each row.

    Two spellings of a number, such as 1 and 1.0, are one class, labeled with the alphabetically
    first.
    """
    spellings = sorted(set(texts))
    try:
        numbers = {text: float(text) for text in spellings}
    except ValueError:
        place = {text: rank for rank, text in enumerate(spellings)}
    else:
        ranks = {number: rank for rank, number in enumerate(sorted(set(numbers.values())))}
        place = {text: ranks[number] for text, number in numbers.items()}
    labels: dict[int, str] = {}
    for text in spellings:
        labels.setdefault(place[text], text)
    in_order = tuple(labels[rank] for rank in sorted(labels))
    return in_order, np.array([place[text] for text in texts], dtype=np.int64)


def load_npz(path: Path, target: str | None, task: Task | None) -> Dataset:
    """Load ``x [B, ...]`` and ``y``: whole numbers ``[B]`` as classes, else values ``[B, C]``."""
    if target is not None:
        raise DataError(f"{path}: --target is for CSV files; an NPZ file's target is its array y")
    try:
        # No pickle, since it could run code. Opened here, because numpy does not close a file of
        # its own that turns out not to be an NPZ file.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            missing = {"x", "y"} - set(file.files)
            if missing:
                raise DataError(f"{path}: no array {' and no '.join(sorted(missing))}")
            x, y = np.asarray(file["x"]), np.asarray(file["y"])
    except (TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not an NPZ file of plain arrays: {error}") from None
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(f"{path}: x {list(x.shape)} and y {list(y.shape)} must have equal rows")
    if 0 in x.shape:
        raise DataError(f"{path}: x of shape {list(x.shape)} is empty")
    inputs = finite_float32(path, "x", x)
    task = task or ("regression" if y.dtype.kind == "f" else "classification")
    features = tuple(f"x{i}" for i in range(x.shape[1])) if x.ndim == 2 else ()
    if task == "regression":
        values = finite_float32(path, "y", y[:, None] if y.ndim == 1 else y)
        if values.ndim != 2 or values.shape[1] == 0:
            raise DataError(f"{path}: y must be [rows] or [rows, targets], not {list(y.shape)}")
        targets = tuple(f"y{i}" for i in range(values.shape[1])) if y.ndim == 2 else ("y",)
        return Dataset(path.stem, task, inputs, values, features, targets)
    if y.ndim != 1 or y.dtype.kind not in "iubU":
        raise DataError(
            f"{path}: classes must be a list of whole numbers or texts, not {y.dtype} "
            f"{list(y.shape)}"
        )
    labels, class_numbers = classes([str(label) for label in y.tolist()])
    return Dataset(path.stem, task, inputs, class_numbers, features, labels)


def finite_float32(path: Path, name: str, values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return ``values`` as float32; raise DataError for other types, NaN or values beyond it."""
    if values.dtype.kind not in "iufb":
        raise DataError(f"{path}: {name} must hold numbers, not {values.dtype}")
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    if not np.isfinite(floats).all():
        place = [int(i) for i in np.argwhere(~np.isfinite(floats))[0]]
        raise DataError(f"{path}: {name}{place} is NaN, infinite or beyond float32")
    return floats
