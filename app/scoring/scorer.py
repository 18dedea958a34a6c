"""Score tables of rows: run train-mode passes of each row, and add columns of their statistics.

A table is a part of a file. Row n of the file draws the same masks as row n of a request, so the
numbers do not depend on how the file is cut, or where its parts are scored.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.inference import answers, batch
from dropserve.app.inference.batch import PassesJob
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.providers import Device
from dropserve.app.inference.query import Query
from dropserve.app.inference.registry import find_version, load_engines
from dropserve.app.inference.rows import BEYOND, describe_shape
from dropserve.app.uncertainty import masks
from dropserve.app.uncertainty.masks import Kind
from dropserve.app.uncertainty.summary import join_rows
from dropserve.export.bundle import Manifest

# The column with all numbers of a row, unless each feature has a column.
INPUTS = "inputs"
# Most rows, and rows x passes, of a table: a second or two of work.
TABLE_ROWS, TABLE_PASSES = 8192, 819_200
# Most rows of a file: the counter of the masks has 32 bits for them.
MAX_ROWS = 2**32


@dataclass(frozen=True)
class Task:
    """Model and options of a scoring run."""

    models: Path
    device: Literal["auto"] | Device
    model: str | None
    version: int | None
    passes: int
    seed: int
    interval: float
    masks: Kind = Query.masks


class Scorer:
    """Scores tables with one model.

    Raises
    ------
    StartError
        If the models cannot be loaded.
    UnknownModel, InputError
        If there is no such model; if a name is needed.
    """

    def __init__(self, task: Task) -> None:
        engines = load_engines(task.models, task.device)
        self.engine: Engine = find_version(engines, task.model, task.version)
        self.manifest = self.engine.manifest
        # For other processes, to use the same model.
        self.task = replace(task, model=self.manifest.name, version=self.manifest.version)
        self.most = batch.most_at_once(self.engine.values_per_pass)
        self.table_rows = max(1, min(TABLE_ROWS, TABLE_PASSES // task.passes))

    def schema(self, columns: pa.Schema) -> pa.Schema:
        """Return the schema of a scored table, with the parameters that reproduce it as metadata.

        Raises
        ------
        InputError
            If a column is missing, or has the same name as a column of the answer.
        """
        inputs = self.inputs(columns.names)
        kept = [field for field in columns if field.name not in inputs]
        # One pass has fewer statistics than several; two already have all of them.
        zeros = np.zeros((1, *self.manifest.input.shape), np.float32)
        answer = self.answer(zeros, 0, min(2, self.task.passes)).schema
        for field in kept:
            if field.name in answer.names:
                raise InputError(field.name, "is a column of the answer, so it has to be renamed")
        asked = {
            "passes": self.task.passes,
            "seed": self.task.seed,
            "interval": self.task.interval,
            "masks": self.task.masks,
            "outputs": self.manifest.outputs.labels,
        }
        return pa.schema(
            [*kept, *answer], {"dropserve": json.dumps(answers.identity(self.manifest) | asked)}
        )

    def inputs(self, names: Sequence[str]) -> list[str]:
        """Return the columns that hold the rows: ``inputs``, or one for each feature."""
        for name in names:
            if names.count(name) > 1:
                raise InputError(name, "there are several columns of this name")
        features = list(self.manifest.input.features)
        if INPUTS in names or not features:
            features = [INPUTS]
        for name in features:
            if name not in names:
                shape = describe_shape(self.manifest.input.shape)
                needed = f"lists of {shape}" if name == INPUTS else f"all of {', '.join(features)}"
                raise InputError(name, f"no such column; needed are {needed}")
        return features

    def score(self, table: pa.Table, first: int) -> pa.Table:
        """Score the rows of a table, the first of which is row ``first`` of the file.

        Returns
        -------
        pyarrow.Table
            The columns besides the inputs, then those of the answer, named as in ``/uncertainty``:
            one number, or a list of C numbers, for each row.

        Raises
        ------
        InputError
            If a row is not allowed; the message has its number in the file.
        """
        inputs = self.inputs(table.column_names)
        scored = table.drop_columns(inputs)
        x = read_rows(table.select(inputs), self.manifest, first)
        answer = self.answer(x, first, self.task.passes)
        for name in answer.column_names:
            scored = scored.append_column(name, answer[name])
        return scored

    def answer(self, x: NDArray[np.float32], first: int, passes: int) -> pa.Table:
        """Run passes of rows ``x [B, *shape]``; return their statistics."""
        task = self.task
        stream = masks.stream(task.masks, task.seed, self.manifest.sites, passes)
        groups = []
        for some in batch.pieces(len(x), max(1, self.most // passes)):
            rows = range(first + some.start, first + some.stop)
            some_x = x[some.start : some.stop]
            job = PassesJob(some_x, stream, rows, range(passes), task.interval)
            (outcome,) = batch.run_passes(self.engine, [job])
            if isinstance(outcome, InputError):
                raise InputError(f"rows {rows.start} to {rows.stop - 1}", outcome.message)
            groups.append(batch.as_summary(outcome))
        query = Query(x, interval=task.interval)
        answer = answers.uncertainty(self.manifest, query, task.seed, passes, join_rows(groups))
        interval = answer.pop("interval")
        assert isinstance(interval, dict)
        return as_table(answer | {bound: interval[bound] for bound in ("lower", "upper")})


def as_table(answer: dict[str, object]) -> pa.Table:
    """Turn the arrays of an answer into columns; other fields are left out."""
    columns: dict[str, pa.Array] = {}
    for name, values in answer.items():
        if isinstance(values, list):
            columns[name] = pa.array(values, pa.string())
        elif isinstance(values, np.ndarray):
            flat = pa.array(values.astype(np.float32, copy=False).ravel())
            columns[name] = (
                flat
                if values.ndim == 1
                else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            )
    return pa.table(columns)


def read_rows(table: pa.Table, manifest: Manifest, first: int) -> NDArray[np.float32]:
    """Read rows ``[B, *shape]`` from their columns.

    Raises
    ------
    InputError
        If a value is missing or not a float32 number, or a row has another shape.
    """
    shape = manifest.input.shape
    x = np.empty((len(table), math.prod(shape)))
    if table.column_names == [INPUTS]:
        x[:] = unnested(table[INPUTS].combine_chunks(), shape, first).reshape(x.shape)
    else:
        for place, name in enumerate(table.column_names):
            x[:, place] = numbers(table[name].combine_chunks(), name, first, 1)
    # As in a request: neither NaN nor a number that would be rounded to infinity.
    fine = np.abs(x) < BEYOND
    if not fine.all():
        row, place = np.argwhere(~fine)[0]
        name = table.column_names[min(place, len(table.column_names) - 1)]
        raise InputError(name, f"must be a float32 number, not {x[row, place]} (row {first + row})")
    return x.astype(np.float32).reshape(-1, *shape)


def unnested(column: pa.Array, shape: tuple[int, ...], first: int) -> NDArray[np.float64]:
    """Read a column of lists with all numbers of a row, flat or nested as ``shape``."""
    inner = getattr(column.type, "value_type", None)
    lengths = shape if is_list(inner) else (math.prod(shape),)
    values_a_row = 1
    for length in lengths:
        if not is_list(column.type):
            raise InputError(INPUTS, f"must hold lists of {describe_shape(shape)}")
        # A missing list has no length, which is wrong, too.
        wrong = pc.fill_null(pc.not_equal(pc.list_value_length(column), length), True)
        if pc.any(wrong).as_py():
            row = first + pc.index(wrong, True).as_py() // values_a_row
            raise InputError(INPUTS, f"must hold {describe_shape(shape)} (row {row})")
        column = column.flatten()
        values_a_row *= length
    return numbers(column, INPUTS, first, values_a_row)


def numbers(values: pa.Array, name: str, first: int, values_a_row: int) -> NDArray[np.float64]:
    """Read numbers, ``values_a_row`` for each row."""
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(name, f"must hold numbers, not {kind}")
    if values.null_count:
        row = first + pc.index(values.is_null(), True).as_py() // values_a_row
        raise InputError(name, f"must be a number, not null (row {row})")
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)


def is_list(kind: pa.DataType | None) -> bool:
    """Tell whether a type is a list type."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind is not None and any(test(kind) for test in tests)
