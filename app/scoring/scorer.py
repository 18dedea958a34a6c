"""Score tables of rows: train-mode passes of each, and columns of what they say.

A table is read as a part of a file whose rows are, to the masks, the rows of one request: row n of
the file draws what row n of a request draws. So the numbers are the same however the file is cut,
and wherever its parts are scored.
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
from dropserve.app.inference import batch
from dropserve.app.inference.batch import Draw, join_groups
from dropserve.app.inference.executor import Turns
from dropserve.app.inference.providers import Device
from dropserve.app.inference.registry import Models, load_engines
from dropserve.app.inference.rows import BEYOND
from dropserve.app.inference.rows import describe as describe_shape
from dropserve.app.inference.service import Query, describe
from dropserve.app.uncertainty import masks
from dropserve.app.uncertainty.masks import Kind
from dropserve.export.bundle import Manifest

# The column of a row's numbers, where they are not a column each.
INPUTS = "inputs"
# Rows, and rows x passes, that are read, scored and written together: a second or two of work.
TABLE_ROWS, TABLE_PASSES = 8192, 819_200
# Rows of a file; the masks' counter has room for no more.
MAX_ROWS = 2**32


@dataclass(frozen=True)
class Task:
    """What is asked of each row, and of which model."""

    models: Path
    device: Literal["auto"] | Device
    model: str | None
    version: int | None
    passes: int
    seed: int
    interval: float
    masks: Kind = "independent"


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
        models = Models(load_engines(task.models, task.device), Turns())
        self.model = models.find(task.model, task.version)
        self.manifest = self.model.manifest
        # Which model it is, is settled: others are to take the same.
        self.task = replace(task, model=self.manifest.name, version=self.manifest.version)
        self.most = batch.most_at_once(self.manifest.values_per_pass)
        self.table_rows = max(1, min(TABLE_ROWS, TABLE_PASSES // task.passes))

    def schema(self, columns: pa.Schema) -> pa.Schema:
        """Say what the scored table of one with such columns holds, and what it takes to repeat it.

        Raises
        ------
        InputError
            If a column is missing, or one stands in the way of the answer's.
        """
        inputs = self.inputs(columns.names)
        kept = [field for field in columns if field.name not in inputs]
        # Of one pass there is less to say than of two, of which there is as much as of all.
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
        return pa.schema([*kept, *answer], {"dropserve": json.dumps(self.model.identity | asked)})

    def inputs(self, names: Sequence[str]) -> list[str]:
        """Say which columns hold the rows: ``inputs``, or one for each feature."""
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
            The columns that are no inputs, then those of the answer, named as ``/uncertainty``
            names them: one number, or a list of C numbers, a row.

        Raises
        ------
        InputError
            If a row is not allowed; the message has its number in the file.
        """
        inputs = self.inputs(table.column_names)
        scored = table.drop_columns(inputs)
        x = read(table.select(inputs), self.manifest, first)
        answer = self.answer(x, first, self.task.passes)
        for name in answer.column_names:
            scored = scored.append_column(name, answer[name])
        return scored

    def answer(self, x: NDArray[np.float32], first: int, passes: int) -> pa.Table:
        """Run some passes of rows ``x [B, *shape]``, and say what they say."""
        task = self.task
        stream = masks.stream(task.masks, task.seed, self.manifest.sites, passes)
        groups = []
        for some in batch.pieces(len(x), max(1, self.most // passes)):
            rows = range(first + some.start, first + some.stop)
            draw = Draw(x[some.start : some.stop], stream, rows, range(passes), task.interval)
            (group,) = batch.draw(self.model.engine, [draw])
            if isinstance(group, InputError):
                raise InputError(f"rows {rows.start} to {rows.stop - 1}", group.message)
            # Not the samples, since there is a level.
            assert isinstance(group, tuple)
            groups.append(group)
        query = Query(x, task.model, task.version, passes, task.seed, task.interval, task.masks)
        found = describe(self.model, query, stream, passes, join_groups(groups))
        interval = found.pop("interval")
        assert isinstance(interval, dict)
        return as_table(found | {bound: interval[bound] for bound in ("lower", "upper")})


def as_table(answer: dict[str, object]) -> pa.Table:
    """Make columns of an answer's arrays; what is null of every row is left out."""
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


def read(table: pa.Table, manifest: Manifest, first: int) -> NDArray[np.float32]:
    """Read the columns of the rows as ``[B, *shape]``.

    Raises
    ------
    InputError
        If a value is missing or no number of float32, or a row is not of the model's shape.
    """
    shape = manifest.input.shape
    x = np.empty((len(table), math.prod(shape)))
    if table.column_names == [INPUTS]:
        x[:] = unnested(table[INPUTS].combine_chunks(), shape, first).reshape(x.shape)
    else:
        for place, name in enumerate(table.column_names):
            x[:, place] = numbers(table[name].combine_chunks(), name, first, 1)
    # As of a request: neither NaN nor what would be rounded to infinity.
    fine = np.abs(x) < BEYOND
    if not fine.all():
        row, place = np.argwhere(~fine)[0]
        name = table.column_names[min(place, len(table.column_names) - 1)]
        raise InputError(name, f"must be a float32 number, not {x[row, place]} (row {first + row})")
    return x.astype(np.float32).reshape(-1, *shape)


def unnested(column: pa.Array, shape: tuple[int, ...], first: int) -> NDArray[np.float64]:
    """Read a column whose rows are lists of all numbers, or nested to ``shape``."""
    inner = getattr(column.type, "value_type", None)
    lengths = shape if is_list(inner) else (math.prod(shape),)
    values_a_row = 1
    for length in lengths:
        if not is_list(column.type):
            raise InputError(INPUTS, f"must hold lists of {describe_shape(shape)}")
        # A list that is missing has no length, which is not the right one either.
        wrong = pc.fill_null(pc.not_equal(pc.list_value_length(column), length), True)
        if pc.any(wrong).as_py():
            row = first + pc.index(wrong, True).as_py() // values_a_row
            raise InputError(INPUTS, f"must hold {describe_shape(shape)} (row {row})")
        column = column.flatten()
        values_a_row *= length
    return numbers(column, INPUTS, first, values_a_row)


def numbers(values: pa.Array, name: str, first: int, values_a_row: int) -> NDArray[np.float64]:
    """Read numbers, ``values_a_row`` of each row."""
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(name, f"must hold numbers, not {kind}")
    if values.null_count:
        row = first + pc.index(values.is_null(), True).as_py() // values_a_row
        raise InputError(name, f"must be a number, not null (row {row})")
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)


def is_list(kind: pa.DataType | None) -> bool:
    """Tell whether values of a type are lists."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind is not None and any(test(kind) for test in tests)
