"""Nested lists become arrays, or an error that says where they do not."""

import contextlib

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dropserve.app.errors import InputError
from dropserve.app.inference.rows import Rows, check_count, read_rows

SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4)


def rows_of(inputs: list[object], shape: tuple[int, ...], max_rows: int) -> Rows:
    """Check and read the rows of a request, as the service does."""
    check_count(inputs, max_rows)
    return read_rows(inputs, shape)


quick = settings(derandomize=True, deadline=None, max_examples=100)


@quick
@given(SHAPES, st.integers(1, 4), st.data())
def test_rows_come_out_as_they_went_in_nested_or_flat(
    shape: tuple[int, ...], count: int, data: st.DataObject
) -> None:
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = data.draw(hnp.arrays(np.float32, (count, *shape), elements=floats))
    nested = orjson.loads(orjson.dumps(x.tolist()))
    flat = orjson.loads(orjson.dumps(x.reshape(count, -1).tolist()))
    for lists in (nested, flat):
        rows = rows_of(lists, shape, max_rows=4)
        assert rows.dtype == np.float32
        assert np.array_equal(rows, x)


def test_whole_numbers_are_numbers() -> None:
    assert read_rows([[1, 2**64 - 1]], (2,)).tolist() == [[1.0, 2.0**64]]


BAD = [
    ([], "inputs", "at least one row is needed"),
    ([[1, 2]] * 4, "inputs", "at most 3 rows are allowed, not 4"),
    ([1, 2], "inputs.0", "must be a list of 2 numbers, not a number"),
    ([None], "inputs.0", "must be a list of 2 numbers, not null"),
    (["ab"], "inputs.0", "must be a list of 2 numbers, not a string"),
    ([{"a": 1}], "inputs.0", "must be a list of 2 numbers, not an object"),
    ([[1, 2], [1]], "inputs.1", "must hold 2 numbers, not 1 values"),
    ([[1, 2, 3]], "inputs.0", "must hold 2 numbers, not 3 values"),
    ([[]], "inputs.0", "must hold 2 numbers, not 0 values"),
    ([[1, 2], [3, True]], "inputs.1.1", "must be a number, not a boolean"),
    ([[1, None]], "inputs.0.1", "must be a number, not null"),
    ([["1", 2]], "inputs.0.0", "must be a number, not a string"),
    ([[[1], 2]], "inputs.0.0", "must be a number, not a list"),
    ([[1, 1e39]], "inputs.0.1", "must be a float32 number, at most 3.402823e+38 in size"),
    ([[-1e300, 1]], "inputs.0.0", "must be a float32 number, at most 3.402823e+38 in size"),
]


@pytest.mark.parametrize(("inputs", "path", "message"), BAD)
def test_what_is_no_row_of_numbers_is_refused_where_it_stands(
    inputs: list[object], path: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        rows_of(inputs, (2,), max_rows=3)
    assert (caught.value.path, caught.value.message) == (path, message)


BAD_IMAGES = [
    ([[1, 2, 3]], "inputs.0", "must hold 4 numbers, flat or nested as [2, 2], not 3 values"),
    ([[[1, 2]]], "inputs.0", "must hold 2 lists, not 1: 4 numbers, flat or nested as [2, 2]"),
    ([[[1, 2], [3]]], "inputs.0.1", "must hold 2 values, not 1"),
    ([[[1, 2], 3]], "inputs.0.1", "must be a list like its neighbours, not a number"),
    ([[[1, 2], [3, "x"]]], "inputs.0.1.1", "must be a number, not a string"),
    ([[[1, 2], [3, [4]]]], "inputs.0.1.1", "must be a number, not a list"),
    ([[1, 2, [3], 4]], "inputs.0.2", "must be a number, not a list"),
]


@pytest.mark.parametrize(("inputs", "path", "message"), BAD_IMAGES)
def test_what_is_no_image_is_refused_where_it_goes_astray(
    inputs: list[object], path: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        rows_of(inputs, (2, 2), max_rows=3)
    assert (caught.value.path, caught.value.message) == (path, message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
)


@quick
@given(st.lists(JSON, max_size=3))
def test_anything_at_all_is_an_array_or_an_input_error(inputs: list[object]) -> None:
    rows = None
    with contextlib.suppress(InputError):
        rows = rows_of(inputs, (2,), max_rows=3)
    if rows is not None:
        assert rows.shape == (len(inputs), 2)
        assert np.isfinite(rows).all()
