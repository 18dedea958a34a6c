"""``python -m app score``: files of rows, as the command scores them."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropserve.app.__main__ import main
from dropserve.app.scoring.parquet import tables
from tests.conftest import ROOT, run, run_here, wait_for

# The command, and after what it prints the most memory that it took, in kB.
MEASURED = """
import re, sys
from dropserve.app.__main__ import main
status = main()
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(status)
"""
FEATURES = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]


# How usage errors begin.
ERROR = "python -m dropserve.app score: error:"


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """Leave the other core to the other worker of a parallel run, which may measure time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


def score(
    built: Path, source: Path, target: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Score a file with the diabetes model."""
    models = ["--models", str(built / "models"), "--model", "diabetes", "--device", "cpu"]
    command = ("score", str(source), str(target), *models, *options)
    # Ray, and the warnings of its libraries, are better left to a process that ends.
    return run("app", *command) if "--ray" in options else run_here(main, *command)


def write(path: Path, rows: int, built: Path, spoiled: int | None = None) -> Path:
    """Write a file of patients, by chance within the features' ranges, and their numbers."""
    manifest = orjson.loads((built / "models" / "diabetes" / "1" / "manifest.json").read_bytes())
    assert manifest["input"]["features"] == FEATURES
    low, high = np.array(manifest["input"]["feature_ranges"]).T
    x = np.random.default_rng(0).uniform(low, high, (rows, len(FEATURES)))
    if spoiled is not None:
        x[spoiled, FEATURES.index("bmi")] = np.nan
    columns = {"patient": np.arange(rows)} | {
        name: x[:, place].astype(np.float32) for place, name in enumerate(FEATURES)
    }
    pq.write_table(pa.table(columns), path)
    return path


def digits(built: Path, source: Path, target: Path, *options: str) -> pa.Table:
    """Score a file with the digits model, and read the outcome."""
    models = ["--models", str(built / "models"), "--model", "digits", "--device", "cpu"]
    done = run_here(main, "score", str(source), str(target), *models, *options)
    assert done.returncode == 0, done.stderr
    return pq.read_table(target)


def images(rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw images, whose values look like those of digits."""
    return np.random.default_rng(1).integers(0, 17, (rows, 64)).astype(np.float32)


def fixed(x: np.ndarray[Any, np.dtype[Any]]) -> pa.Array:
    """Make a column of lists of equal length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])


@pytest.mark.parametrize("model", ["digits", "diabetes"])
def test_a_row_gets_what_uncertainty_answers_to_the_same_row_of_a_request(
    built: Path,
    client: httpx.Client,
    examples: Callable[[str], list[Any]],
    tmp_path: Path,
    model: str,
) -> None:
    inputs = examples(model)
    pq.write_table(pa.table({"inputs": inputs}), tmp_path / "in.parquet")
    asked = ["--passes", "50", "--seed", "9", "--interval", "0.8", "--model", model]
    found = digits(built, tmp_path / "in.parquet", tmp_path / "out.parquet", *asked)
    body = {"model": model, "inputs": inputs, "passes": 50, "seed": 9, "interval": 0.8}
    answer = client.post("/uncertainty", json=body).json()
    answer |= {bound: answer["interval"][bound] for bound in ("lower", "upper")}
    assert set(found.column_names) == answer.keys() - {
        *("model", "version", "passes", "seed", "interval", "converged")
    }
    for name in found.column_names:
        if name == "labels":
            assert found[name].to_pylist() == answer[name]
        else:
            assert np.allclose(found[name].to_pylist(), answer[name], rtol=1e-4, atol=1e-5), name


def test_masks_are_stratified_where_that_is_asked_for(
    built: Path, client: httpx.Client, tmp_path: Path
) -> None:
    rows = images(5)
    pq.write_table(pa.table({"inputs": fixed(rows)}), tmp_path / "in.parquet")
    asked = ["--passes", "50", "--seed", "9", "--masks", "stratified"]
    found = digits(built, tmp_path / "in.parquet", tmp_path / "out.parquet", *asked)
    assert orjson.loads(found.schema.metadata[b"dropserve"])["masks"] == "stratified"
    body = {"model": "digits", "inputs": rows.tolist(), "passes": 50, "seed": 9}
    answer = client.post("/uncertainty", json=body | {"masks": "stratified"}).json()
    for name in ("mean", "standard_error"):
        assert np.allclose(found[name].to_pylist(), answer[name], rtol=1e-4, atol=1e-5)


def test_how_the_file_is_cut_changes_nothing(built: Path, tmp_path: Path) -> None:
    table = pa.table({"inputs": fixed(images(20_000))})
    found = []
    # Groups that end within the tables that are scored, and with them.
    for size in (20_000, 8192, 3000):
        pq.write_table(table, tmp_path / "in.parquet", row_group_size=size)
        asked = ["--passes", "2", "--seed", "1"]
        found.append(digits(built, tmp_path / "in.parquet", tmp_path / "out.parquet", *asked))
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])
    assert len(found[0]) == 20_000


def test_rows_stay_in_order_beside_their_other_columns(built: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", 20_000, built)
    done = score(built, source, tmp_path / "out.parquet", "--passes", "1", "--seed", "1")
    assert done.returncode == 0, done.stderr
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["patient"].to_pylist() == list(range(20_000))
    assert not set(FEATURES) & set(found.column_names)
    # Of one pass there is no standard error.
    assert "standard_error" not in found.column_names


def test_however_rows_are_written_they_are_the_same(built: Path, tmp_path: Path) -> None:
    x = images(5)
    nested = x.reshape(5, 8, 8)
    ways = {
        "fixed": fixed(x),
        "lists": pa.array(x.tolist()),
        "nested": pa.array(nested.tolist()),
        "large": pa.array(x.tolist(), pa.large_list(pa.float64())),
        "whole": fixed(x.astype(np.int16)),
        "double": fixed(x.astype(np.float64)),
    }
    found = {}
    for name, column in ways.items():
        pq.write_table(pa.table({"inputs": column}), tmp_path / "in.parquet")
        asked = ["--passes", "10", "--seed", "1"]
        found[name] = digits(built, tmp_path / "in.parquet", tmp_path / "out.parquet", *asked)
    assert all(table.equals(found["fixed"]) for table in found.values())


def test_without_a_seed_one_is_drawn_and_kept_with_all_else_it_takes_to_repeat(
    built: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"inputs": fixed(images(3))}), tmp_path / "in.parquet")
    first = digits(built, tmp_path / "in.parquet", tmp_path / "first.parquet", "--passes", "7")
    said = orjson.loads(first.schema.metadata[b"dropserve"])
    assert {**said, "seed": None} == {
        "model": "digits",
        "version": 1,
        "passes": 7,
        "seed": None,
        "interval": 0.9,
        "masks": "independent",
        "outputs": list("0123456789"),
    }
    again = ["--passes", "7", "--seed", str(said["seed"])]
    second = digits(built, tmp_path / "in.parquet", tmp_path / "second.parquet", *again)
    assert second.equals(first, check_metadata=True)
    other = digits(built, tmp_path / "in.parquet", tmp_path / "third.parquet", "--passes", "7")
    assert not other.equals(first)


def test_a_file_without_rows_scores_to_one_with_the_same_columns(
    built: Path, tmp_path: Path
) -> None:
    table = pa.table({"id": ["a", "b"], "inputs": fixed(images(2))})
    schemas = []
    for rows in (2, 0):
        pq.write_table(table.slice(0, rows), tmp_path / "in.parquet")
        found = digits(built, tmp_path / "in.parquet", tmp_path / "out.parquet", "--seed", "1")
        assert len(found) == rows
        schemas.append(found.schema)
    assert schemas[0].equals(schemas[1], check_metadata=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_it_leaves_what_was_there(
    built: Path, tmp_path: Path, number: signal.Signals
) -> None:
    source = write(tmp_path / "in.parquet", 200_000, built)
    target = tmp_path / "out.parquet"
    target.write_text("what was there")
    command = [sys.executable, "-m", "app", "score", str(source), str(target)]
    options = ["--models", str(built / "models"), "--model", "diabetes", "--device", "cpu"]
    options += ["--passes", "2000"]
    with subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE) as process:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 3)
        process.send_signal(number)
        # Minutes of work are left, of which it has a second or two at hand.
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in said
    assert target.read_text() == "what was there"
    assert {path.name for path in tmp_path.iterdir()} == {"in.parquet", "out.parquet"}


SIZE = 8192


@given(
    groups=st.lists(st.integers(1, 30_000), max_size=5),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=30, deadline=None)
def test_a_part_of_a_file_is_read_in_tables_of_one_length(
    groups: list[int], ends: tuple[float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("part") / "in.parquet"
    numbers = pa.table({"n": np.arange(sum(groups))})
    with pq.ParquetWriter(file, numbers.schema) as writer:
        for place, size in enumerate(groups):
            writer.write_table(numbers.slice(sum(groups[:place]), size), row_group_size=size)
    start, stop = sorted(int(end * len(numbers)) for end in ends)
    found = list(tables(file, range(start, stop), SIZE))
    assert [first for first, _ in found] == list(range(start, stop, SIZE))
    assert all(len(table) == SIZE for _, table in found[:-1])
    read = [number for _, table in found for number in table["n"].to_pylist()]
    assert read == list(range(start, stop))


ROWS = fixed(images(3))
SHORT = pa.array([[1.0] * 64, [1.0] * 63, [1.0] * 64])
RAGGED = pa.array([[[1.0] * 8] * 8, [[1.0] * 8] * 7 + [[1.0] * 7], [[1.0] * 8] * 8])
MISSING = pa.array([[1.0] * 64, None, [1.0] * 64])
NULL = pa.array([[1.0] * 64, [1.0] * 64, [1.0] * 63 + [None]])
TOO_LARGE = pa.array([[1.0] * 64, [1e39] * 64])
SHAPE = "64 numbers, flat or nested as [8, 8]"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"pixels": ROWS}, f"inputs: no such column; needed are lists of {SHAPE}"),
        ({"inputs": SHORT}, f"inputs: must hold {SHAPE} (row 1)"),
        ({"inputs": RAGGED}, f"inputs: must hold {SHAPE} (row 1)"),
        ({"inputs": MISSING}, f"inputs: must hold {SHAPE} (row 1)"),
        ({"inputs": NULL}, "inputs: must be a number, not null (row 2)"),
        ({"inputs": TOO_LARGE}, "inputs: must be a float32 number, not 1e+39 (row 1)"),
        ({"inputs": pa.array(["a"])}, f"inputs: must hold lists of {SHAPE}"),
        ({"inputs": pa.array([[True] * 64])}, "inputs: must hold numbers, not bool"),
        (
            {"inputs": ROWS, "mean": [1, 2, 3]},
            "mean: is a column of the answer, so it has to be renamed",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_leaves_what_was_there(
    built: Path, tmp_path: Path, columns: dict[str, Any], says: str
) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table(columns), source)
    target.write_text("what was there")
    done = score(built, source, target, "--model", "digits")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {str(source)!r}: {says}"
    assert target.read_text() == "what was there"
    assert {path.name for path in tmp_path.iterdir()} == {"in.parquet", "out.parquet"}


def test_columns_of_one_name_are_refused(built: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", 3, built)
    table = pq.read_table(source)
    pq.write_table(table.append_column("bmi", table["bmi"]), source)
    models = ["--models", str(built / "models"), "--model", "diabetes", "--device", "cpu"]
    # As a process, whose libraries have a standard error of their own to write to.
    done = run("app", "score", str(source), str(tmp_path / "out.parquet"), *models)
    assert done.returncode == 1
    assert done.stderr == (f"error: {str(source)!r}: bmi: there are several columns of this name\n")


def test_where_there_are_several_models_it_says_that_a_name_is_needed(
    built: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 3, built)
    models = ["--models", str(built / "models"), "--device", "cpu"]
    done = run_here(main, "score", str(source), str(tmp_path / "out.parquet"), *models)
    assert done.returncode == 1
    assert done.stderr == "error: --model: is needed, one of: diabetes, digits, double\n"


def test_what_is_to_be_written_is_what_links_lead_to_and_a_file_of_its_own(
    built: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 3, built)
    folder = tmp_path / "folder"
    folder.mkdir()
    for target, says in (
        (folder, f"error: {str(folder)!r} is no file\n"),
        (source, f"error: {str(source)!r} is the file to be read, too\n"),
    ):
        done = score(built, source, target)
        assert (done.returncode, done.stderr) == (1, says)
    link = tmp_path / "link.parquet"
    link.symlink_to(folder / "there.parquet")
    assert score(built, source, link, "--passes", "2").returncode == 0
    assert link.is_symlink()
    assert len(pq.read_table(folder / "there.parquet")) == 3
    assert (folder / "there.parquet").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    """Return what new files may not be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_is_said_of_the_file_that_is_written(built: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", 20_000, built)
    target = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "app", "score", str(source), str(target)]
    options = ["--models", str(built / "models"), "--model", "diabetes", "--device", "cpu"]
    done = subprocess.run(
        [*command, *options, "--passes", "2"],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    says = f"error: {str(target)!r} cannot be written: File too large"
    assert done.stderr.splitlines()[-1] == says
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_feature_that_is_missing_is_named_beside_those_that_are_needed(
    built: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.parquet", 3, built)
    pq.write_table(pq.read_table(source).drop_columns(["bmi"]), source)
    done = score(built, source, tmp_path / "out.parquet")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {str(source)!r}: bmi: no such column; needed are all of {', '.join(FEATURES)}\n"
    )


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--model", "no"], 1, "error: no model 'no'; served are: diabetes, digits, double"),
        (["--version", "9"], 1, "error: no version 9 of model diabetes; served are: 1"),
        (["--models", "nowhere"], 1, "error: the models folder "),
        (
            ["--passes", "0"],
            2,
            f"{ERROR} argument --passes: '0' is no whole",
        ),
        (
            ["--passes", "10001"],
            2,
            f"{ERROR} argument --passes: '10001' is no whole number from 1 to",
        ),
        (
            ["--seed", "-1"],
            2,
            f"{ERROR} argument --seed: '-1' is no whole",
        ),
        (
            ["--interval", "1"],
            2,
            f"{ERROR} argument --interval: '1' is no",
        ),
        (
            ["--device", "tpu"],
            2,
            f"{ERROR} argument --device: 'tpu' is not one of",
        ),
        (["more"], 2, f"{ERROR} unrecognized arguments: more"),
    ],
)
def test_an_option_that_is_not_allowed_is_one_line(
    built: Path, tmp_path: Path, options: list[str], status: int, says: str
) -> None:
    source = write(tmp_path / "in.parquet", 3, built)
    done = score(built, source, tmp_path / "out.parquet", *options)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith(says)


def test_what_is_no_parquet_file_or_not_there_or_cannot_be_written_is_one_line(
    built: Path, tmp_path: Path
) -> None:
    text = tmp_path / "in.csv"
    text.write_text("a,b\n1,2\n")
    good = write(tmp_path / "good.parquet", 3, built)
    out = tmp_path / "out.parquet"
    for source, target, says in (
        (text, out, f"error: {str(text)!r} is no Parquet file: "),
        (
            tmp_path / "no.parquet",
            out,
            f"error: {str(tmp_path / 'no.parquet')!r} cannot be read: No such file",
        ),
        (
            good,
            tmp_path / "no" / "o",
            f"error: {str(tmp_path / 'no' / 'o')!r} cannot be written: No such file",
        ),
    ):
        done = score(built, source, target)
        assert done.returncode == 1
        line = done.stderr.splitlines()[-1]
        assert line.startswith(says), line


def test_without_the_extra_it_says_which_to_install() -> None:
    without = (
        "import sys; sys.modules['pyarrow'] = None; "
        "from dropserve.app.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, "score"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: score needs pyarrow: install the extra 'score'\n"


def peak_megabytes(built: Path, source: Path, target: Path) -> float:
    """Score a file with two passes; return the most memory that took."""
    options = ["--models", str(built / "models"), "--model", "diabetes", "--device", "cpu"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURED,
            "score",
            str(source),
            str(target),
            "--passes",
            "2",
            *options,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) / 1000


@pytest.mark.slow
def test_a_million_rows_take_no_more_memory_than_fewer(built: Path, tmp_path: Path) -> None:
    few, many = (
        peak_megabytes(built, write(tmp_path / "in.parquet", rows, built), tmp_path / "out.parquet")
        for rows in (300_000, 1_000_000)
    )
    print(f"{few:.0f} and {many:.0f} MB")
    # The rows that are more are 31 MB, and the answer to them 18.
    assert many < few + 15
