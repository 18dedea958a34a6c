"""NPZ files: their arrays x and y, errors, and no pickled code."""

import gc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dropserve.model.datasets import DataError, load

ROWS = 24
X = np.random.default_rng(0).normal(size=(ROWS, 3))
CLASSES = np.arange(ROWS) % 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arrays.npz"


def write(path: Path, **arrays: NDArray[np.generic]) -> str:
    np.savez_compressed(path, allow_pickle=True, **arrays)
    return str(path)


def refusal(path: Path, target: str | None = None) -> str:
    """Return the error about a file, without the file's name in front."""
    with pytest.raises(DataError) as refused:
        load(str(path), target)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8])
def test_whole_numbers_are_classes_in_their_order(path: Path, dtype: type[np.integer]) -> None:
    numbers = np.array([10, 9, 100], dtype=dtype)[CLASSES]
    dataset = load(write(path, x=X, y=numbers))
    assert (dataset.name, dataset.task) == ("arrays", "classification")
    assert dataset.outputs == ("9", "10", "100")
    assert dataset.y[:3].tolist() == [1, 0, 2]
    assert dataset.features == ("x0", "x1", "x2")
    assert dataset.x.dtype == np.float32
    assert np.array_equal(dataset.x, X.astype(np.float32))


def test_texts_are_classes_in_alphabetic_order(path: Path) -> None:
    dataset = load(write(path, x=X, y=np.array(["pear", "apple", "fig"])[CLASSES]))
    assert (dataset.task, dataset.outputs) == ("classification", ("apple", "fig", "pear"))
    assert dataset.y[:3].tolist() == [2, 0, 1]


def test_floats_are_values_of_one_target_or_of_several(path: Path) -> None:
    one = load(write(path, x=X, y=X[:, 0]))
    assert (one.task, one.outputs, one.y.shape) == ("regression", ("y",), (ROWS, 1))
    two = load(write(path, x=X, y=X[:, :2]))
    assert (two.task, two.outputs) == ("regression", ("y0", "y1"))
    assert np.array_equal(two.y, X[:, :2].astype(np.float32))


def test_whole_numbers_can_be_taken_as_values(path: Path) -> None:
    dataset = load(write(path, x=X, y=CLASSES), task="regression")
    assert (dataset.task, dataset.y[:3, 0].tolist()) == ("regression", [0.0, 1.0, 2.0])
    assert dataset.y.dtype == np.float32


def test_images_keep_their_shape_and_a_list_becomes_a_column(path: Path) -> None:
    images = load(write(path, x=np.zeros((ROWS, 2, 4, 5), dtype=np.uint8), y=CLASSES))
    assert (images.x.shape, images.features) == ((ROWS, 2, 4, 5), ())
    column = load(write(path, x=X[:, 0], y=CLASSES))
    assert (column.x.shape, column.features) == ((ROWS, 1), ("x0",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "no array y"),
        ({"y": CLASSES}, "no array x"),
        ({"X": X, "Y": CLASSES}, "no array x and no y"),
        ({"x": X[:5], "y": CLASSES}, f"x [5, 3] and y [{ROWS}] must have equal rows"),
        ({"x": np.array(1.0), "y": CLASSES}, f"x [] and y [{ROWS}] must have equal rows"),
        ({"x": X, "y": np.array(1)}, f"x [{ROWS}, 3] and y [] must have equal rows"),
        ({"x": X[:0], "y": CLASSES[:0]}, "x of shape [0, 3] is empty"),
        ({"x": X[:, :0], "y": CLASSES}, f"x of shape [{ROWS}, 0] is empty"),
        ({"x": X[:9], "y": CLASSES[:9]}, "9 rows, at least 20 are needed"),
        ({"x": X, "y": CLASSES * 0 + 7}, "one class only ('7'), at least 2 are needed"),
        ({"x": X * 1j, "y": CLASSES}, "x must hold numbers, not complex128"),
        ({"x": X.astype(str), "y": CLASSES}, "x must hold numbers"),
        ({"x": X, "y": X[:, :0]}, "y must be [rows] or [rows, targets]"),
        ({"x": X, "y": X[:, :, None]}, "y must be [rows] or [rows, targets]"),
        ({"x": X, "y": CLASSES[:, None]}, "classes must be a list of whole numbers or texts"),
        ({"x": X, "y": CLASSES.astype("S1")}, "classes must be a list of whole numbers or texts"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(
    path: Path, arrays: dict[str, NDArray[np.generic]], message: str
) -> None:
    write(path, **arrays)
    assert refusal(path).startswith(message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("name", ["x", "y"])
def test_a_value_that_is_no_float32_is_named_by_its_index(
    path: Path, value: float, name: str
) -> None:
    arrays = {"x": X.copy(), "y": X[:, :2].copy()}
    arrays[name][4, 1] = value
    write(path, **arrays)
    assert refusal(path) == f"{name}[4, 1] is NaN, infinite or beyond float32"


@pytest.mark.parametrize("name", ["x", "y"])
def test_pickled_objects_are_refused_unread(path: Path, name: str) -> None:
    write(path, **{"x": X, "y": CLASSES} | {name: np.array([print] * ROWS, dtype=object)})
    assert refusal(path).startswith("not an NPZ file of plain arrays: ")


def test_a_file_that_is_no_npz_is_refused(path: Path) -> None:
    for content in (b"", b"hello"):
        path.write_bytes(content)
        assert refusal(path).startswith("not an NPZ file of plain arrays")


def test_a_single_array_is_no_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, X)
    assert refusal(path).startswith("not an NPZ file of plain arrays")


def test_a_zip_file_of_something_else_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", "these are")
        file.writestr("y", "no arrays")
    assert refusal(path)


@pytest.mark.parametrize("place", [60, 100, 200, 400])
def test_a_damaged_file_is_refused(path: Path, place: int) -> None:
    write(path, x=X, y=CLASSES)
    content = bytearray(path.read_bytes())
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    assert refusal(path).startswith("not an NPZ file of plain arrays")


def test_a_truncated_file_is_refused_and_closed(path: Path) -> None:
    write(path, x=X, y=CLASSES)
    path.write_bytes(path.read_bytes()[:300])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert refusal(path).startswith("not an NPZ file of plain arrays")
        gc.collect()  # a file left open warns when it is collected
    assert [str(warning.message) for warning in caught] == []


def test_a_target_column_is_for_csv_files(path: Path) -> None:
    write(path, x=X, y=CLASSES)
    assert "--target is for CSV files" in refusal(path, target="y")
