"""The rows of a request: from nested lists of JSON numbers to an array."""

import math
import struct
from collections.abc import Sized
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dropserve.app.errors import InputError

Rows = NDArray[np.float32]  # [B, *shape]
Inputs = list[object] | Rows  # nested lists from JSON, or rows already read

LARGEST = float(np.finfo(np.float32).max)
# Half a unit in the last place above the largest: from here on, rounding to float32 gives infinity.
BEYOND = LARGEST + 2.0**103
NUMBERS = {int, float}
LISTS = {list}


def check_count(inputs: Sized, max_rows: int) -> None:
    """Raise InputError if there are no rows or more than ``max_rows``."""
    if len(inputs) == 0:
        raise InputError("inputs", "at least one row is needed")
    if len(inputs) > max_rows:
        raise InputError("inputs", f"at most {max_rows} rows are allowed, not {len(inputs)}")


def read_rows(inputs: list[object], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return ``[B, *shape]`` from B rows, each nested to ``shape`` or flat.

    Raises
    ------
    InputError
        For the first row of another shape, or the first value that is not a float32 number (a
        boolean is not).
    """
    rows = rows_at_once(inputs, shape)
    return rows_one_by_one(inputs, shape) if rows is None else rows


def rows_at_once(inputs: list[object], shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Return the rows if all are flat or all are nested, and none has a fault; else None."""
    lengths = (math.prod(shape),) if is_flat(inputs[0], shape) else shape
    # Their types are checked as they are unpacked.
    values: list[Any] = inputs
    for length in lengths:
        if not LISTS.issuperset(map(type, values)) or {length} != set(map(len, values)):
            return None
        values = list(chain.from_iterable(values))
    flat = packed(values)
    return None if flat is None else flat.reshape(len(inputs), *shape)


def packed(values: list[Any]) -> NDArray[np.float32] | None:
    """Return the numbers of a flat list, or None if one is not a float32 number."""
    types = list(map(type, values))
    # Counting is faster than building a set, and usually all are floats.
    if types.count(float) < len(types) and not NUMBERS.issuperset(types):
        return None
    try:
        # Unlike native packing and numpy, standard packing refuses numbers that are too large.
        return np.frombuffer(struct.pack(f"<{len(values)}f", *values), "<f4")
    except (OverflowError, struct.error):  # for a float, for an integer
        return None


def rows_one_by_one(inputs: list[object], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the rows; raise InputError with the path of the first fault."""
    flat: list[Any] = []
    for number, row in enumerate(inputs):
        flat.extend(flat_row(row, shape, f"inputs.{number}"))
    for number, row in enumerate(inputs):
        check_numbers(row, 1 if is_flat(row, shape) else len(shape), f"inputs.{number}")
    return np.array(flat, np.float32).reshape(len(inputs), *shape)


def flat_row(row: object, shape: tuple[int, ...], path: str) -> list[object]:
    """Return the values of a row in order; raise InputError for another shape."""
    if not isinstance(row, list):
        raise InputError(path, f"must be a list of {describe_shape(shape)}, not {json_type(row)}")
    if is_flat(row, shape):
        if len(row) != math.prod(shape):
            raise InputError(path, f"must hold {describe_shape(shape)}, not {len(row)} values")
        return row
    if len(row) != shape[0]:
        raise InputError(
            path, f"must hold {shape[0]} lists, not {len(row)}: {describe_shape(shape)}"
        )
    return list(
        chain.from_iterable(
            nested_part(part, shape[1:], f"{path}.{number}") for number, part in enumerate(row)
        )
    )


def nested_part(part: object, shape: tuple[int, ...], path: str) -> list[object]:
    """Return the values of a part of a nested row, nested all the way."""
    if not isinstance(part, list):
        raise InputError(path, f"must be a list like its neighbours, not {json_type(part)}")
    if len(part) != shape[0]:
        raise InputError(path, f"must hold {shape[0]} values, not {len(part)}")
    if len(shape) == 1:
        return part
    return list(
        chain.from_iterable(
            nested_part(inner, shape[1:], f"{path}.{number}") for number, inner in enumerate(part)
        )
    )


def is_flat(row: object, shape: tuple[int, ...]) -> bool:
    """Tell whether a row is a flat list, which it may be for any shape."""
    return len(shape) == 1 or not (isinstance(row, list) and row and isinstance(row[0], list))


def check_numbers(value: object, depth: int, path: str) -> None:
    """Raise InputError if a list, ``depth`` deep, holds anything but float32 numbers."""
    if depth > 0 and isinstance(value, list):
        for number, inner in enumerate(value):
            check_numbers(inner, depth - 1, f"{path}.{number}")
    elif not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(path, f"must be a number, not {json_type(value)}")
    elif not abs(value) < BEYOND:  # NaN, too
        raise InputError(path, f"must be a float32 number, at most {LARGEST:.7g} in size")


def describe_shape(shape: tuple[int, ...]) -> str:
    """Describe a row of ``shape``, for a message."""
    total = f"{math.prod(shape)} numbers"
    return total if len(shape) == 1 else f"{total}, flat or nested as {list(shape)}"


def json_type(value: object) -> str:
    """Name the type of a JSON value, for a message."""
    names = {bool: "a boolean", str: "a string", dict: "an object", list: "a list"}
    return "null" if value is None else names.get(type(value), "a number")
