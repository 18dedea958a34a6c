"""CSV files: their values and tasks, and errors by row and column."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.model.datasets import DataError, Dataset, Task, load

reproducible = settings(derandomize=True, deadline=None, max_examples=50)
ROWS = 24
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Characters that need quotes, and letters beyond ASCII.
names = st.text("ab,;\"' \nß鑫").map(str.strip).filter(bool)


def write(folder: Path, targets: list[str], features: str = "{row},0.5") -> str:
    """Write a CSV file with features a and b and the target y, repeated up to ROWS rows."""
    lines = [f"{features.format(row=row)},{targets[row % len(targets)]}\n" for row in range(ROWS)]
    path = folder / "table.csv"
    path.write_text("a,b,y\n" + "".join(lines), encoding="utf-8")
    return str(path)


def refusal(path: Path, content: str | bytes, target: str | None = "y") -> str:
    """Return the error about a file, without the file's name in front."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as refused:
        load(str(path), target)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


@reproducible
@given(st.data())
def test_a_table_comes_back_value_by_value(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = data.draw(st.lists(names, min_size=2, max_size=4, unique=True))
    row = st.lists(float32s, min_size=len(header), max_size=len(header))
    # A half makes it a regression, whatever the other values are.
    rows = [[0.5] * len(header), *data.draw(st.lists(row, min_size=20, max_size=22))]
    target = data.draw(st.sampled_from(header))
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    dataset = load(str(path), target)
    at = header.index(target)
    values = np.array(rows, dtype=np.float32)
    assert dataset.task == "regression"
    assert dataset.features == tuple(name for name in header if name != target)
    assert dataset.outputs == (target,)
    assert np.array_equal(dataset.x, np.delete(values, at, axis=1))
    assert np.array_equal(dataset.y, values[:, [at]])


@reproducible
@given(st.lists(st.integers(-(10**6), 10**6), min_size=2, max_size=20, unique=True))
def test_few_whole_numbers_are_classes_in_their_numeric_order(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int]
) -> None:
    dataset = load(write(tmp_path_factory.mktemp("csv"), [str(n) for n in numbers]), "y")
    assert dataset.task == "classification"
    assert dataset.outputs == tuple(str(n) for n in sorted(numbers))
    written = [str(numbers[row % len(numbers)]) for row in range(ROWS)]
    assert [dataset.outputs[y] for y in dataset.y.tolist()] == written


def test_texts_are_classes_in_alphabetic_order(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, ["pear", "apple", " fig "]), "y")
    assert dataset.task == "classification"
    assert dataset.outputs == ("apple", "fig", "pear")
    assert dataset.y[:3].tolist() == [2, 0, 1]
    assert (dataset.name, dataset.features, dataset.x.shape) == ("table", ("a", "b"), (ROWS, 2))
    assert dataset.x[3].tolist() == [3.0, 0.5]


@pytest.mark.parametrize(
    ("targets", "task"),
    [
        (["0.5", "1"], "regression"),
        ([str(n) for n in range(20)], "classification"),
        ([str(n) for n in range(21)], "regression"),
        (["1", "2", "many"], "classification"),
    ],
)
def test_the_target_decides_the_task(tmp_path: Path, targets: list[str], task: Task) -> None:
    assert load(write(tmp_path, targets), "y").task == task


def test_the_task_can_be_chosen(tmp_path: Path) -> None:
    values = load(write(tmp_path, ["1", "2"]), "y", "regression")
    assert (values.task, values.y.shape, values.outputs) == ("regression", (ROWS, 1), ("y",))
    labels = load(write(tmp_path, ["0.5", "0.25"]), "y", "classification")
    assert (labels.task, labels.outputs) == ("classification", ("0.25", "0.5"))
    with pytest.raises(DataError, match="row 1, column 'y': 'red' is not a number"):
        load(write(tmp_path, ["red", "blue"]), "y", "regression")


@pytest.mark.parametrize("spellings", [["1", "1.0", "2"], ["1.0", "2", "1"], ["+1", "2", "01"]])
def test_two_spellings_of_a_number_are_one_class(tmp_path: Path, spellings: list[str]) -> None:
    dataset = load(write(tmp_path, spellings), "y")
    assert len(dataset.outputs) == 2
    assert dataset.y[spellings.index("2")] == 1


def test_the_target_may_be_any_column(tmp_path: Path) -> None:
    dataset = load(write(tmp_path, ["1.5", "2.5"]), "a")
    assert dataset.features == ("b", "y")
    assert dataset.x[:2].tolist() == [[0.5, 1.5], [0.5, 2.5]]


def test_quotes_a_byte_order_mark_windows_lines_and_blank_lines_are_read(path: Path) -> None:
    rows = '"1","2,5",0.5\r\n\r\n'.replace("2,5", "25") * ROWS
    path.write_bytes(b"\xef\xbb\xbf" + f'"a","b, in ""mm""",y\r\n{rows}'.encode())
    dataset = load(str(path), "y", "regression")
    assert dataset.features == ("a", 'b, in "mm"')
    assert dataset.x.tolist() == [[1.0, 25.0]] * ROWS


@pytest.mark.parametrize("cell", ["", " ", "NA", "n/a", "nan", "NaN", "NULL", "None", "?"])
@pytest.mark.parametrize("column", ["b", "y"])
def test_a_missing_value_is_named_by_row_and_column(path: Path, cell: str, column: str) -> None:
    good = "1,2,red\n"
    bad = f"1,{cell},red\n" if column == "b" else f"1,2,{cell}\n"
    message = refusal(path, "a,b,y\n" + good * 2 + bad + good * ROWS)
    assert message == f"missing value in row 3, column {column!r}"


@pytest.mark.parametrize("cell", ["red", "1,5", "1 2", "0x10"])
def test_a_cell_that_is_no_number_is_named_by_row_and_column(path: Path, cell: str) -> None:
    message = refusal(path, "a,b,y\n1,2,u\n" + f'1,"{cell}",v\n' * ROWS)
    assert message == f"row 2, column 'b': {cell!r} is not a number"


@pytest.mark.parametrize("cell", ["1e39", "-3.5e38", "inf", "-Infinity", "1e999"])
@pytest.mark.parametrize("column", ["b", "y"])
def test_a_number_beyond_float32_is_named_by_row_and_column(
    path: Path, cell: str, column: str
) -> None:
    bad = f"1,{cell},0.5\n" if column == "b" else f"1,2,{cell}\n"
    message = refusal(path, "a,b,y\n" + "1,2,0.5\n" * ROWS + bad)
    assert message == f"row {ROWS + 1}, column {column!r}: {cell} is not a float32 number"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty, a header row is needed"),
        ("\n\n", "empty, a header row is needed"),
        ("a,b,y\n", "no rows below the header"),
        ("a,b,y\n1,2,3\n1,2\n", "row 2 has 2 cells, the header 3"),
        ("a,b,y\n1,2,3,4\n", "row 1 has 4 cells, the header 3"),
        ("y\n" + "1\n2\n" * ROWS, "no feature column beside the target 'y'"),
        ("a,b\n" + "1,2\n" * ROWS, "no column 'y', there are: a, b"),
        ("a,y\n" + "1,2\n" * ROWS, "one class only ('2'), at least 2 are needed"),
        ("a,y\n" + "1,2\n3,4\n" * 5, "10 rows, at least 20 are needed"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(path: Path, content: str, message: str) -> None:
    assert refusal(path, content) == message


@pytest.mark.parametrize("header", ["a,a,y", "a, a ,y", "a,,y"])
def test_column_names_must_be_there_and_differ(path: Path, header: str) -> None:
    message = refusal(path, header + "\n" + "1,2,3\n" * ROWS)
    assert "column names must be there and differ" in message


@pytest.mark.parametrize("content", [b"a,y\n\xff\xfe,1\n", b'a,y\n"1,2\n', b'a,y\n"1"2,3\n'])
def test_a_file_that_is_not_csv_in_utf8_is_refused(path: Path, content: bytes) -> None:
    assert refusal(path, content).startswith("not a CSV file in UTF-8: ")


def test_a_target_must_be_given(path: Path) -> None:
    message = refusal(path, "a,b,y\n" + "1,2,3\n" * ROWS, target=None)
    assert message == "--target COLUMN is needed, one of: a, b, y"


@pytest.mark.parametrize("target", [None, "absent"])
def test_a_line_break_in_a_column_name_does_not_break_the_message(
    path: Path, target: str | None
) -> None:
    assert "'a\\nb'" in refusal(path, '"a\nb",y\n' + "1,2\n" * ROWS, target).replace('"', "'")


def test_the_rows_are_those_of_the_file_in_its_order(tmp_path: Path) -> None:
    dataset: Dataset = load(write(tmp_path, ["0.5", "1.5"], features="{row},-{row}"), "y")
    assert dataset.x[:, 0].tolist() == list(range(ROWS))
    assert dataset.x[:, 1].tolist() == [-row for row in range(ROWS)]
    assert dataset.y[:, 0].tolist() == [0.5, 1.5] * (ROWS // 2)
