"""The Open Inference Protocol's requests become arrays, and its answers bytes."""

import contextlib
import struct
import tracemalloc
from functools import partial

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from dropserve.app.errors import InputError
from dropserve.app.http.v2 import codec
from dropserve.app.http.v2.codec import DATATYPES, InferRequest, WantedOutput, write_response

MOST_LISTS = 10_000
parse_request = partial(codec.parse_request, most_lists=lambda: MOST_LISTS)

quick = settings(derandomize=True, deadline=None, max_examples=100)
thorough = settings(derandomize=True, deadline=None, max_examples=500)

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def tensor(**changes: object) -> dict[str, object]:
    """An input of two numbers, with fields changed; those that are None are left out."""
    fields = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]} | changes
    return {name: value for name, value in fields.items() if value is not None}


def binary(size: object, **changes: object) -> dict[str, object]:
    return tensor(data=None, parameters={"binary_data_size": size}, **changes)


def join(document: object, *tensors: bytes, align: int = 1) -> tuple[bytes, int]:
    """A body with binary tensors, its JSON a multiple of ``align`` bytes long, and that length."""
    header = orjson.dumps(document)
    header += b" " * (-len(header) % align)
    return b"".join([header, *tensors]), len(header)


def read_inputs(*inputs: object, **fields: object) -> InferRequest:
    return parse_request(orjson.dumps({"inputs": inputs} | fields), None)


def values_of(request: InferRequest) -> list[NDArray[np.float32]]:
    return [tensor.values for tensor in request.inputs]


@quick
@given(hnp.arrays(np.float32, SHAPES, elements=FINITE))
def test_json_comes_out_as_it_went_in_flat_or_nested(x: NDArray[np.float32]) -> None:
    # Behind a dimension of zero there is nothing to nest.
    forms = [x.ravel().tolist(), x.tolist()] if x.size else [x.ravel().tolist()]
    for data in forms:
        (values,) = values_of(read_inputs(tensor(shape=x.shape, data=data)))
        assert values.dtype == np.float32
        assert values.shape == x.shape
        assert np.array_equal(values, x)


@quick
@given(st.lists(hnp.arrays(np.float32, SHAPES, elements=FINITE), min_size=1, max_size=3), st.data())
def test_binary_tensors_follow_in_the_order_of_the_inputs(
    arrays: list[NDArray[np.float32]], data: st.DataObject
) -> None:
    inputs, tensors = [], []
    for number, x in enumerate(arrays):
        if data.draw(st.booleans()):
            inputs.append(binary(x.nbytes, name=f"x{number}", shape=x.shape))
            tensors.append(x.tobytes())
        else:
            inputs.append(tensor(name=f"x{number}", shape=x.shape, data=x.ravel().tolist()))
    request = parse_request(*join({"inputs": inputs}, *tensors))
    assert [tensor.name for tensor in request.inputs] == [f"x{n}" for n in range(len(arrays))]
    for values, x in zip(values_of(request), arrays, strict=True):
        assert values.shape == x.shape
        assert np.array_equal(values, x)


@pytest.mark.parametrize("make", [bytes, bytearray])
def test_binary_fp32_is_read_without_a_copy_where_it_is_aligned(
    make: type[bytes] | type[bytearray],
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    joined, length = join({"inputs": [binary(24, shape=[2, 3])]}, x.tobytes(), align=4)
    body = make(joined)
    (values,) = values_of(parse_request(body, length))
    assert np.shares_memory(values, np.frombuffer(body, np.uint8))
    assert np.array_equal(values, x)


@pytest.mark.parametrize("offset", range(1, 4))
def test_binary_fp32_behind_a_header_of_any_length_comes_out_aligned(offset: int) -> None:
    x = np.arange(6, dtype=np.float32)
    header, length = join({"inputs": [binary(24, shape=[6])]}, align=4)
    (values,) = values_of(parse_request(header + b" " * offset + x.tobytes(), length + offset))
    assert values.flags.aligned
    assert np.array_equal(values, x)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_is_converted_from_json_and_from_binary(datatype: str) -> None:
    x = np.array([0, 1, 2, 100], DATATYPES[datatype])
    body, length = join({"inputs": [binary(x.nbytes, shape=[4], datatype=datatype)]}, x.tobytes())
    listed = tensor(shape=[4], datatype=datatype, data=[0, 1.0, 2, 100])
    for request in (parse_request(body, length), read_inputs(listed)):
        (values,) = values_of(request)
        assert values.dtype == np.float32
        assert values.tolist() == [0, 1, 2, 100]


@pytest.mark.parametrize(
    ("datatype", "lowest", "highest"),
    [(name, np.iinfo(t).min, np.iinfo(t).max) for name, t in DATATYPES.items() if t.kind in "iu"],
)
def test_whole_numbers_are_taken_as_far_as_their_type_goes(
    datatype: str, lowest: int, highest: int
) -> None:
    (values,) = values_of(read_inputs(tensor(datatype=datatype, data=[lowest, highest])))
    assert values.tolist() == [[np.float32(lowest), np.float32(highest)]]
    wrongs: list[object] = [2.0 * lowest - 1, 2.0 * highest, 0.5, True, None, "1", [1]]
    for wrong in wrongs:
        with pytest.raises(InputError) as caught:
            read_inputs(tensor(datatype=datatype, data=[0, wrong]))
        assert caught.value.path == "inputs.0.data.1"
        assert caught.value.message == f"must be a whole number from {lowest} to {highest}"


@pytest.mark.parametrize(
    ("datatype", "wrong"),
    [("INT8", 128), ("INT8", -129), ("UINT8", 256), ("INT64", 2**63), ("UINT64", -1)],
)
def test_whole_numbers_are_taken_no_further_than_that(datatype: str, wrong: int) -> None:
    with pytest.raises(InputError, match="must be a whole number from"):
        read_inputs(tensor(datatype=datatype, data=[0, wrong]))


DATATYPES_LISTED = (
    "must be one of FP32, FP64, FP16, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64, not"
)
FLOAT32_ONLY = "must be a float32 number, at most 3.402823e+38 in size"
REFUSED = "is not supported, leave it out"
BAD_INPUTS = [
    (None, "inputs.0", "must be an object, not null"),
    (tensor(name=None), "inputs.0.name", "must be a string, not null"),
    (
        tensor(dtype="FP32"),
        "inputs.0",
        "allowed are name, shape, datatype, parameters, data, not 'dtype'",
    ),
    (tensor(shape=None), "inputs.0.shape", "must be a list, not null"),
    (tensor(shape=[]), "inputs.0.shape", "must list 1 to 16 dimensions, not 0"),
    (tensor(shape=[1] * 17), "inputs.0.shape", "must list 1 to 16 dimensions, not 17"),
    (tensor(shape=[-1, 2]), "inputs.0.shape", "must list whole numbers, 0 or more"),
    (tensor(shape=[True, 2]), "inputs.0.shape", "must list whole numbers, 0 or more"),
    (tensor(shape=[1.0, 2]), "inputs.0.shape", "must list whole numbers, 0 or more"),
    (tensor(shape=[2**63, 0]), "inputs.0.shape", "must be of at most 2147483647 elements"),
    (tensor(shape=[2**16, 2**16]), "inputs.0.shape", "must be of at most 2147483647 elements"),
    (tensor(datatype=None), "inputs.0.datatype", f"{DATATYPES_LISTED} null"),
    (tensor(datatype="BYTES"), "inputs.0.datatype", f"{DATATYPES_LISTED} 'BYTES'"),
    (tensor(datatype="BOOL"), "inputs.0.datatype", f"{DATATYPES_LISTED} 'BOOL'"),
    (tensor(datatype="BF16"), "inputs.0.datatype", f"{DATATYPES_LISTED} 'BF16'"),
    (tensor(datatype="\n" + "x" * 999), "inputs.0.datatype", f"{DATATYPES_LISTED} '\\n" + "x" * 97),
    (tensor(data=None), "inputs.0", "needs data or parameters.binary_data_size, and not both"),
    (
        tensor(parameters={"binary_data_size": 8}),
        "inputs.0",
        "needs data or parameters.binary_data_size, and not both",
    ),
    (tensor(parameters=[]), "inputs.0.parameters", "must be an object, not a list"),
    (
        tensor(parameters={"shared_memory_region": "r"}),
        "inputs.0.parameters.shared_memory_region",
        REFUSED,
    ),
    (tensor(data="ab"), "inputs.0.data", "must be a list, not a string"),
    (tensor(data=[1]), "inputs.0.data", "expecting 2 elements, got 1"),
    (tensor(shape=[64], data=[0] * 63), "inputs.0.data", "expecting 64 elements, got 63"),
    (tensor(data=[]), "inputs.0.data", "expecting 2 elements, got 0"),
    (tensor(data=[[1], [2]]), "inputs.0.data", "must be flat, or nested as [1, 2]"),
    (tensor(data=[[1, 2], 3]), "inputs.0.data", "must be flat, or nested as [1, 2]"),
    (tensor(data=[[[1, 2]]]), "inputs.0.data", "must be flat, or nested as [1, 2]"),
    (tensor(data=[1, [2]]), "inputs.0.data.1", "must be a number, not a list"),
    (tensor(data=[1, True]), "inputs.0.data.1", "must be a number, not a boolean"),
    (tensor(data=[[None, 1]]), "inputs.0.data.0", "must be a number, not null"),
    (tensor(data=["1", 1]), "inputs.0.data.0", "must be a number, not a string"),
    (tensor(data=[1, 1e39]), "inputs.0.data.1", FLOAT32_ONLY),
    (tensor(datatype="FP64", data=[1, -1e300]), "inputs.0.data.1", FLOAT32_ONLY),
    (binary(True), "inputs.0.parameters.binary_data_size", "must be 8, 4 x 2, not a boolean"),
    (binary(8.0), "inputs.0.parameters.binary_data_size", "must be 8, 4 x 2, not a number"),
    (binary(-8), "inputs.0.parameters.binary_data_size", "must be 8, 4 x 2, not -8"),
    (
        binary(8, datatype="INT64"),
        "inputs.0.parameters.binary_data_size",
        "must be 16, 8 x 2, not 8",
    ),
    (
        binary(8),
        "inputs.0.parameters.binary_data_size",
        "expecting 8 bytes behind the JSON and earlier tensors, got 0 "
        "(see Inference-Header-Content-Length)",
    ),
]


@pytest.mark.parametrize(("wrong", "path", "message"), BAD_INPUTS)
def test_what_is_no_tensor_is_refused_where_it_stands(
    wrong: object, path: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_inputs(wrong)
    assert (caught.value.path, caught.value.message) == (path, message)


X = tensor()
FIELDS = "allowed are id, model_name, model_version, parameters, inputs, outputs, not"
BAD_ID = "must be a string of at most 128 characters, no control characters"
BAD_REQUESTS = [
    ([], "body", "must be an object, not a list"),
    ({"inputs": [X], "input": 1}, "body", f"{FIELDS} 'input'"),
    ({"inputs": [X], "y" * 999: 1}, "body", f"{FIELDS} '" + "y" * 99),
    ({}, "inputs", "must be a list, not null"),
    ({"inputs": []}, "inputs", "at least one tensor is needed"),
    ({"inputs": [X, X]}, "inputs.1.name", "'x' is there twice"),
    ({"inputs": [X], "id": 1}, "id", BAD_ID),
    ({"inputs": [X], "id": "a\n"}, "id", BAD_ID),
    ({"inputs": [X], "id": "a" * 129}, "id", BAD_ID),
    ({"inputs": [X], "parameters": 1}, "parameters", "must be an object, not a number"),
    (
        {"inputs": [X], "parameters": {"binary_data_output": 1}},
        "parameters.binary_data_output",
        "must be a boolean, not a number",
    ),
    ({"inputs": [X], "outputs": {}}, "outputs", "must be a list, not an object"),
    ({"inputs": [X], "outputs": ["y"]}, "outputs.0", "must be an object, not a string"),
    ({"inputs": [X], "outputs": [{}]}, "outputs.0.name", "must be a string, not null"),
    (
        {"inputs": [X], "outputs": [{"name": "y"}, {"name": "y"}]},
        "outputs.1.name",
        "'y' is there twice",
    ),
    (
        {"inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
        "outputs.0.parameters.binary_data",
        "must be a boolean, not a number",
    ),
    (
        {"inputs": [X], "outputs": [{"name": "y", "parameters": {"classification": 3}}]},
        "outputs.0.parameters.classification",
        REFUSED,
    ),
]


@pytest.mark.parametrize(("document", "path", "message"), BAD_REQUESTS)
def test_what_is_no_request_is_refused_where_it_goes_astray(
    document: object, path: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse_request(orjson.dumps(document), None)
    assert (caught.value.path, caught.value.message) == (path, message)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "FP16"])
def test_binary_that_is_not_finite_is_refused(datatype: str, wrong: float) -> None:
    x = np.array([1, wrong], DATATYPES[datatype])
    with pytest.raises(InputError, match=r"^inputs\.0: must hold finite numbers"):
        parse_request(*join({"inputs": [binary(x.nbytes, datatype=datatype)]}, x.tobytes()))


def test_binary_beyond_float32_is_refused() -> None:
    x = np.array([1, 1e39])
    with pytest.raises(InputError, match=r"^inputs\.0: must hold .* at most 3.402823e\+38 in size"):
        parse_request(*join({"inputs": [binary(16, datatype="FP64")]}, x.tobytes()))


def test_binary_data_that_is_missing_or_left_over_is_refused_with_the_numbers() -> None:
    two = {"inputs": [binary(8), binary(8, name="y")]}
    with pytest.raises(InputError) as caught:
        parse_request(*join(two, bytes(15)))
    assert caught.value.path == "inputs.1.parameters.binary_data_size"
    assert "expecting 8 bytes behind the JSON and earlier tensors, got 7" in caught.value.message
    with pytest.raises(InputError) as caught:
        parse_request(*join(two, bytes(17)))
    assert caught.value.path == "inputs"
    assert caught.value.message == "expecting 16 bytes after the JSON, got 17"


@pytest.mark.parametrize("length", [-1, 10**9])
def test_a_header_that_is_not_within_the_body_is_refused(length: int) -> None:
    with pytest.raises(
        HTTPException, match=r"^400: Inference-Header-Content-Length must be from 0 to 2"
    ):
        parse_request(b"{}", length)


@pytest.mark.parametrize(("body", "length"), [(b"", None), (b"{", None), (b"{}{}", 3), (b"{}", 0)])
def test_a_header_that_is_no_json_is_refused(body: bytes, length: int | None) -> None:
    with pytest.raises(HTTPException, match="is not JSON") as caught:
        parse_request(body, length)
    assert caught.value.status_code == 400


def test_a_shape_that_is_larger_than_its_data_takes_no_memory() -> None:
    shape = [2**15, 2**15]
    tracemalloc.start()
    for wrong in (tensor(shape=shape), binary(4 * 2**30, shape=shape)):
        with pytest.raises(InputError, match="expecting"):
            read_inputs(wrong)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_request_keeps_its_id_and_the_parameters_that_are_not_the_codecs() -> None:
    request = read_inputs(X, id="a b", parameters={"binary_data_output": True, "seed": 1})
    assert (request.id, request.parameters, request.binary) == ("a b", {"seed": 1}, True)
    request = read_inputs(X, id=None, parameters=None, outputs=None)
    assert (request.id, request.parameters, request.binary) == (None, {}, False)


def test_parameters_that_are_not_the_codecs_do_not_matter() -> None:
    read_inputs(
        tensor(parameters={"content_type": "np"}),
        outputs=[{"name": "y", "parameters": {"content_type": "np"}}],
    )


def test_outputs_are_binary_as_they_say_or_as_the_request_does() -> None:
    asked = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}]
    for default in (True, False):
        request = read_inputs(X, outputs=asked, parameters={"binary_data_output": default})
        assert request.outputs == [WantedOutput("a", default), WantedOutput("b", False)]
    assert read_inputs(X).outputs is None
    assert read_inputs(X, outputs=[]).outputs is None


def test_json_outputs_are_flat() -> None:
    mean = np.array([[0.1, 2], [3, 4]], np.float32)
    body, length = write_response(
        {"model_name": "m"}, [("mean", mean.T, False), ("label", ["a", "é"], False)]
    )
    assert length is None
    assert orjson.loads(body) == {
        "model_name": "m",
        "outputs": [
            {"name": "mean", "datatype": "FP32", "shape": [2, 2], "data": [0.1, 3.0, 2.0, 4.0]},
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]},
        ],
    }


def test_binary_outputs_follow_the_header_in_order() -> None:
    mean = np.array([[1, 2], [3, 4]], np.float32)
    outputs: list[tuple[str, NDArray[np.float32] | list[str], bool]]
    outputs = [("label", ["a", "", "é"], True), ("plain", mean, False), ("mean", mean.T, True)]
    body, length = write_response({"id": "7"}, outputs)
    assert length is not None
    assert orjson.loads(body[:length]) == {
        "id": "7",
        "outputs": [
            {
                "name": "label",
                "datatype": "BYTES",
                "shape": [3],
                "parameters": {"binary_data_size": 15},
            },
            {"name": "plain", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]},
            {
                "name": "mean",
                "datatype": "FP32",
                "shape": [2, 2],
                "parameters": {"binary_data_size": 16},
            },
        ],
    }
    strings = b"\1\0\0\0a" + b"\0\0\0\0" + b"\2\0\0\0\xc3\xa9"
    assert body[length:] == strings + struct.pack("<4f", 1, 3, 2, 4)


@quick
@given(hnp.arrays(np.float32, SHAPES, elements=FINITE), st.booleans())
def test_what_is_written_can_be_read(x: NDArray[np.float32], as_binary: bool) -> None:
    body, length = write_response({}, [("x", x, as_binary)])
    document = orjson.loads(body[:length])
    body, length = join({"inputs": document["outputs"]}, b"" if length is None else body[length:])
    (values,) = values_of(parse_request(body, length))
    assert values.shape == x.shape
    assert values.tobytes() == x.tobytes()


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
)
GOOD = {
    "id": "1",
    "parameters": {"binary_data_output": True},
    "inputs": [
        binary(8),
        tensor(name="y", datatype="INT8", data=[[1, 2]]),
        binary(4, name="z", shape=[2, 1, 1], datatype="FP16"),
    ],
    "outputs": [{"name": "mean", "parameters": {"binary_data": False}}, {"name": "std"}],
}
# Each, put in place of a part of a good request, could be the one that is not thought of.
TELLING: st.SearchStrategy[object] = st.sampled_from(
    [
        *DATATYPES,
        "BYTES",
        0,
        1,
        2,
        4,
        8,
        -1,
        2**63,
        1.0,
        True,
        None,
        [],
        {},
        [0],
        [0, 2],
        [2**63, 0],
    ]
)


def check(body: bytes, length: int | None) -> None:
    """Read, and hold what comes out to what is promised of it."""
    request = None
    with contextlib.suppress(InputError, HTTPException):
        request = parse_request(body, length)
    if request is None:
        return
    for values in values_of(request):
        assert values.dtype == np.float32
        assert values.flags.aligned
        assert np.isfinite(values).all()


@thorough
@given(st.binary(), st.none() | st.integers(-1, 300))
def test_any_bytes_at_all_are_a_request_or_an_error(body: bytes, length: int | None) -> None:
    check(body, length)


@thorough
@given(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, JSON)))
def test_any_document_at_all_is_a_request_or_an_error(document: object) -> None:
    check(orjson.dumps(document), None)


@thorough
@given(st.data())
def test_a_request_with_one_part_changed_is_a_request_or_an_error(data: st.DataObject) -> None:
    document = orjson.loads(orjson.dumps(GOOD))
    part = document
    while True:
        key = data.draw(
            st.sampled_from(range(len(part)) if isinstance(part, list) else sorted(part))
        )
        if not part[key] or not isinstance(part[key], list | dict) or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = data.draw(TELLING | JSON)
    check(*join(document, data.draw(st.binary(min_size=11, max_size=13))))


@thorough
@given(st.data())
def test_a_request_with_a_byte_changed_is_a_request_or_an_error(data: st.DataObject) -> None:
    joined, length = join(GOOD, bytes(12))
    body = bytearray(joined)
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(body), length + data.draw(st.sampled_from([0, 0, -1, 1])))
