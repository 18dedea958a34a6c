"""Bundled data sets, the split by seed, and names that are no data set."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dropserve.model.datasets import DataError, Dataset, Task, load, split

reproducible = settings(derandomize=True, deadline=None, max_examples=50)
seeds = st.integers(0, 2**63 - 1)
row_counts = st.integers(20, 500)


def numbered(rows: int) -> Dataset:
    """Make a data set whose features and targets are its row numbers."""
    y = np.arange(rows, dtype=np.float32)[:, None]
    return Dataset("numbers", "regression", y.copy(), y, ("row",), ("row",))


def rows_of(part: Dataset) -> list[float]:
    return [float(row) for row in part.x[:, 0]]


def test_digits_are_1797_images_of_ten_classes() -> None:
    digits = load("digits")
    assert (digits.name, digits.task) == ("digits", "classification")
    assert digits.x.shape == (1797, 8, 8)
    assert digits.x.dtype == np.float32
    assert (digits.x.min(), digits.x.max()) == (0, 16)
    assert digits.y.shape == (1797,)
    assert digits.y.dtype == np.int64
    assert digits.outputs == tuple("0123456789")
    assert digits.features == ()
    assert set(digits.y.tolist()) == set(range(10))


def test_diabetes_is_442_patients_of_ten_raw_measurements() -> None:
    diabetes = load("diabetes")
    assert (diabetes.name, diabetes.task) == ("diabetes", "regression")
    assert diabetes.x.shape == (442, 10)
    assert diabetes.y.shape == (442, 1)
    assert diabetes.x.dtype == diabetes.y.dtype == np.float32
    assert diabetes.features == ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    assert diabetes.outputs == ("progression",)
    # Years, not standardised numbers.
    assert (diabetes.x[:, 0].min(), diabetes.x[:, 0].max()) == (19, 79)


@reproducible
@given(rows=row_counts, seed=seeds)
def test_a_split_holds_every_row_once_with_its_target(rows: int, seed: int) -> None:
    parts = split(numbered(rows), seed)
    assert sorted(rows_of(parts.train) + rows_of(parts.validation) + rows_of(parts.test)) == list(
        range(rows)
    )
    for part in (parts.train, parts.validation, parts.test):
        assert np.array_equal(part.x, part.y)


@reproducible
@given(rows=row_counts, seed=seeds)
def test_a_split_keeps_about_15_percent_for_each_held_out_part(rows: int, seed: int) -> None:
    parts = split(numbered(rows), seed)
    assert len(parts.validation) == len(parts.test)
    assert abs(len(parts.test) - 0.15 * rows) <= 0.5


@reproducible
@given(rows=row_counts, seed=seeds, other=seeds)
def test_the_seed_alone_decides_the_split(rows: int, seed: int, other: int) -> None:
    assume(seed != other)
    first, again = split(numbered(rows), seed), split(numbered(rows), seed)
    for a, b in (
        (first.train, again.train),
        (first.validation, again.validation),
        (first.test, again.test),
    ):
        assert np.array_equal(a.x, b.x)
    # Twenty rows have 20! orders, so two seeds do not coincide by chance.
    assert rows_of(split(numbered(rows), other).train) != rows_of(first.train)


@pytest.mark.parametrize("name", ["foo", "", "Digits", "digits.txt", "digits/"])
def test_an_unknown_data_set_is_refused_with_a_list_of_the_known_ones(name: str) -> None:
    with pytest.raises(DataError, match=r"digits, diabetes, FILE\.csv and FILE\.npz") as refused:
        load(name)
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".CSV"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, suffix: str) -> None:
    name = str(tmp_path / f"absent{suffix}")
    with pytest.raises(DataError) as refused:
        load(name, "y")
    assert str(refused.value) == f"no such file: {name}"


def test_a_directory_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"no such file: .*folder\.csv"):
        load(str(tmp_path / "folder.csv"), "y")


@pytest.mark.parametrize(
    ("name", "task"), [("digits", "regression"), ("diabetes", "classification")]
)
def test_a_bundled_data_set_is_for_its_own_task(name: str, task: Task) -> None:
    with pytest.raises(DataError, match=f"{name} is for .*, not {task}"):
        load(name, task=task)
    own = load(name).task
    assert load(name, task=own).task == own


def test_a_bundled_data_set_has_its_own_target() -> None:
    with pytest.raises(DataError, match="diabetes has its own target"):
        load("diabetes", target="bmi")
