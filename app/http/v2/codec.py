"""Bodies of ``infer`` requests and responses: bytes to arrays and back.

A request is JSON. With Triton's binary tensor data extension the JSON is a header, and the tensors
with a ``binary_data_size`` follow it as raw little-endian bytes, in order. Responses have the same
form. This module knows nothing of a model's tensors.

References
----------
https://github.com/kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``
https://github.com/triton-inference-server/server, ``docs/protocol/extension_binary_data.md``
"""

import math
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from dropserve.app.errors import InputError
from dropserve.app.http.bodies import load_json
from dropserve.app.inference.rows import LARGEST, LISTS, NUMBERS, check_numbers, json_type, packed
from dropserve.app.observability.record import MAX_TIMEOUT_MS

Buffer = bytes | bytearray
# The values of an output: FP32, BOOL, or strings, which become one-dimensional BYTES.
Column = NDArray[np.float32] | NDArray[np.bool_] | Sequence[str]
Expected = TypeVar("Expected")

WHOLE = (1, 2, 4, 8)
# The datatypes that are converted to float32; little-endian on the wire.
DATATYPES: dict[str, np.dtype[Any]] = {
    f"{name}{8 * size}": np.dtype(f"<{code}{size}")
    for name, code, sizes in (("FP", "f", (4, 8, 2)), ("INT", "i", WHOLE), ("UINT", "u", WHOLE))
    for size in sizes
}
# numpy refuses shapes with more elements, zeros aside, than it can count.
MOST_DIMENSIONS = 16
MOST_ELEMENTS = 2**31 - 1
# Longest part of a client's text that a message quotes.
LONGEST_QUOTE = 100
SAFE_ID = re.compile(r"[^\x00-\x1f\x7f-\x9f]{0,128}")

REQUEST_FIELDS = ("id", "model_name", "model_version", "parameters", "inputs", "outputs")
INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
OUTPUT_FIELDS = ("name", "parameters")
# If these were ignored, the answer would differ from the requested one.
REFUSED_PARAMETERS = (
    *("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"),
    "classification",
)
# MLServer's names of codecs for which tensors are as they are here. Others change the data.
CONTENT_TYPES = ("np", "pd", "str")
# Parameters of requests that cannot change the answer: where the request stands in a queue or in a
# sequence (a sequence's id is checked), and what codecs and gateways add.
HINTS = ("priority", "sequence_id", "sequence_start", "sequence_end", "content_type", "headers")
MAX_TIMEOUT_MICROSECONDS = MAX_TIMEOUT_MS * 1000


@dataclass(frozen=True)
class Tensor:
    """An input tensor, in the shape it was sent with."""

    name: str
    values: NDArray[np.float32]


@dataclass(frozen=True)
class WantedOutput:
    """A requested output, and whether it is wanted in binary form."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A request.

    Parameters
    ----------
    id
        Repeated in the response.
    model_name, model_version
        What the body says of the model in the path; empty: nothing.
    time_limit
        Seconds the response may take; infinity: the request does not say.
    parameters
        Those that the protocol leaves to the model.
    inputs
        The input tensors.
    outputs
        The requested outputs; None for all.
    binary
        Whether outputs are in binary form by default.
    """

    id: str | None
    model_name: str
    model_version: str
    time_limit: float
    parameters: dict[str, object]
    inputs: list[Tensor]
    outputs: list[WantedOutput] | None
    binary: bool


def parse_request(
    body: Buffer, header_length: int | None, most_lists: Callable[[], int]
) -> InferRequest:
    """Parse the body of a request.

    Parameters
    ----------
    body
        JSON, followed by the binary tensors.
    header_length
        Bytes of JSON, from ``Inference-Header-Content-Length``; None: all.
    most_lists
        Returns the most lists and objects that the JSON may hold, if it is long.

    Raises
    ------
    HTTPException
        400 if the length is not within the body, or these bytes are not JSON.
    InputError
        If the protocol, or this service, does not allow the request.
    """
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"Inference-Header-Content-Length must be from 0 to {len(body)}, the length of the "
            f"body, not {length}",
        )
    part = "body" if header_length is None else f"body, in its first {length} bytes,"
    document = load_json(memoryview(body)[:length], most_lists, part)
    request = read_object(document, "body", REQUEST_FIELDS)
    parameters = read_parameters(request, "parameters")
    said = parameters.pop("binary_data_output", None)
    binary = said is not None and of_type(said, bool, "parameters.binary_data_output")
    time_limit = read_timeout(parameters.pop("timeout", None))
    if parameters.get("sequence_id"):
        raise InputError("parameters.sequence_id", "must be 0: requests do not depend on others")
    parameters = {name: value for name, value in parameters.items() if name not in HINTS}
    inputs, end = [], length
    for number, item in enumerate(of_type(request.get("inputs"), list, "inputs")):
        tensor, end = read_input(item, body, end, f"inputs.{number}")
        inputs.append(tensor)
    if not inputs:
        raise InputError("inputs", "at least one tensor is needed")
    if end < len(body):
        there = f"expecting {end - length} bytes after the JSON, got {len(body) - length}"
        raise InputError("inputs", there)
    check_names([tensor.name for tensor in inputs], "inputs")
    asked = request.get("outputs")
    wanted = [] if asked is None else of_type(asked, list, "outputs")
    outputs = [read_output(item, binary, f"outputs.{n}") for n, item in enumerate(wanted)]
    check_names([output.name for output in outputs], "outputs")
    # As in Triton, an empty list asks for all.
    return InferRequest(
        read_id(request.get("id")),
        read_text(request.get("model_name"), "model_name"),
        read_text(request.get("model_version"), "model_version"),
        time_limit,
        parameters,
        inputs,
        outputs or None,
        binary,
    )


def read_input(item: object, body: Buffer, start: int, path: str) -> tuple[Tensor, int]:
    """Return a tensor, whose binary data would be at ``start``, and where the next one's is."""
    fields = read_object(item, path, INPUT_FIELDS)
    name = of_type(fields.get("name"), str, f"{path}.name")
    shape = read_shape(fields.get("shape"), f"{path}.shape")
    dtype = read_dtype(fields.get("datatype"), f"{path}.datatype")
    size = read_parameters(fields, f"{path}.parameters").get("binary_data_size")
    data = fields.get("data")
    if (size is None) == (data is None):
        raise InputError(path, "needs data or parameters.binary_data_size, and not both")
    if size is None:
        return Tensor(name, read_data(data, shape, dtype, f"{path}.data")), start
    end = start + check_size(size, shape, dtype, len(body) - start, path)
    return Tensor(name, read_binary(body, start, shape, dtype, path)), end


def check_size(size: object, shape: list[int], dtype: np.dtype[Any], left: int, path: str) -> int:
    """Return the size of a binary tensor in bytes; check it against shape and body."""
    path = f"{path}.parameters.binary_data_size"
    count = math.prod(shape)
    needed = count * dtype.itemsize
    if type(size) is not int or size != needed:
        said = size if type(size) is int else json_type(size)
        raise InputError(path, f"must be {needed}, {dtype.itemsize} x {count}, not {said}")
    if needed > left:
        there = f"expecting {needed} bytes behind the JSON and earlier tensors, got {left}"
        raise InputError(path, f"{there} (see Inference-Header-Content-Length)")
    return needed


def read_binary(
    body: Buffer, start: int, shape: list[int], dtype: np.dtype[Any], path: str
) -> NDArray[np.float32]:
    """Return the tensor at ``start``: a view if it is FP32 and aligned."""
    raw = np.frombuffer(body, dtype, math.prod(shape), start).reshape(shape)
    # The header may end anywhere. onnxruntime takes floats at any address, but C++ does not promise
    # that; and a copy costs little, as numpy's isfinite would copy unaligned data anyway.
    aligned = raw if raw.flags.aligned else raw.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        values: NDArray[np.float32] = aligned.astype("<f4", copy=False)
    if not np.isfinite(values).all():
        raise InputError(path, f"must hold finite numbers, at most {LARGEST:.7g} in size")
    return values


def read_data(
    data: object, shape: list[int], dtype: np.dtype[Any], path: str
) -> NDArray[np.float32]:
    """Return a tensor from its JSON list, flat or nested."""
    flat = flatten(of_type(data, list, path), shape, path)
    count = math.prod(shape)
    if len(flat) != count:
        raise InputError(path, f"expecting {count} elements, got {len(flat)}")
    if dtype.kind in "iu":
        return read_integers(flat, dtype, path).reshape(shape)
    values = packed(flat)
    if values is None:
        # Raises InputError for the number that could not be packed.
        check_numbers(flat, 1, path)
        values = np.array(flat, np.float32)
    return values.reshape(shape)


def flatten(values: list[Any], shape: list[int], path: str) -> list[Any]:
    """Return the values of a list that is flat, or fully nested as ``shape``."""
    if not values or type(values[0]) is not list:
        return values
    level: list[Any] = [values]
    for length in shape:
        if not LISTS.issuperset(map(type, level)) or not {length}.issuperset(map(len, level)):
            raise InputError(path, f"must be flat, or nested as {shape}")
        level = list(chain.from_iterable(level))
    return level


def read_integers(flat: list[Any], dtype: np.dtype[Any], path: str) -> NDArray[np.float32]:
    """Return integers, checked against the range of their datatype."""
    if {int}.issuperset(map(type, flat)):
        with suppress(OverflowError):
            return np.array(flat, dtype).astype(np.float32)
    limits = np.iinfo(dtype)
    for number, value in enumerate(flat):
        known = type(value) in NUMBERS and limits.min <= value <= limits.max
        if not known or value != int(value):
            allowed = f"must be a whole number from {limits.min} to {limits.max}"
            raise InputError(f"{path}.{number}", allowed)
    return np.array([int(value) for value in flat], dtype).astype(np.float32)


def read_shape(value: object, path: str) -> list[int]:
    """Return a shape that numpy accepts."""
    shape = of_type(value, list, path)
    if not 1 <= len(shape) <= MOST_DIMENSIONS:
        raise InputError(path, f"must list 1 to {MOST_DIMENSIONS} dimensions, not {len(shape)}")
    if any(type(length) is not int or length < 0 for length in shape):
        raise InputError(path, "must list whole numbers, 0 or more")
    if math.prod(max(length, 1) for length in shape) > MOST_ELEMENTS:
        raise InputError(path, f"must be of at most {MOST_ELEMENTS} elements")
    return shape


def read_dtype(value: object, path: str) -> np.dtype[Any]:
    """Return the numpy type of a datatype."""
    if not isinstance(value, str) or value not in DATATYPES:
        said = quote(value) if isinstance(value, str) else json_type(value)
        raise InputError(path, f"must be one of {', '.join(DATATYPES)}, not {said}")
    return DATATYPES[value]


def read_output(item: object, binary: bool, path: str) -> WantedOutput:
    """Return a requested output; ``binary`` is its default form."""
    fields = read_object(item, path, OUTPUT_FIELDS)
    name = of_type(fields.get("name"), str, f"{path}.name")
    said = read_parameters(fields, f"{path}.parameters").get("binary_data")
    if said is not None:
        binary = of_type(said, bool, f"{path}.parameters.binary_data")
    return WantedOutput(name, binary)


def read_object(value: object, path: str, allowed: tuple[str, ...]) -> dict[str, object]:
    """Return an object; raise InputError if it has a field that is not allowed."""
    fields = of_type(value, dict, path)
    unknown = next((field for field in fields if field not in allowed), None)
    if unknown is not None:
        raise InputError(path, f"allowed are {', '.join(allowed)}, not {quote(unknown)}")
    return fields


def read_parameters(fields: dict[str, object], path: str) -> dict[str, object]:
    """Return the parameters of an object, which may have none."""
    value = fields.get("parameters")
    parameters = {} if value is None else of_type(value, dict, path)
    for name in REFUSED_PARAMETERS:
        if name in parameters:
            raise InputError(f"{path}.{name}", "is not supported, leave it out")
    content_type = parameters.get("content_type")
    if content_type is not None and content_type not in CONTENT_TYPES:
        said = quote(content_type) if isinstance(content_type, str) else json_type(content_type)
        allowed = ", ".join(CONTENT_TYPES)
        raise InputError(f"{path}.content_type", f"must be one of {allowed}, not {said}")
    return parameters


def read_timeout(value: object) -> float:
    """Return the time limit of a request in seconds, given in microseconds; 0 or None: none."""
    if value is None:
        return math.inf
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_MICROSECONDS:
        raise InputError(
            "parameters.timeout",
            f"must be a whole number of microseconds from 0 to {MAX_TIMEOUT_MICROSECONDS}",
        )
    return value / 1e6 or math.inf


def read_text(value: object, path: str) -> str:
    """Return a text that may be left out."""
    return "" if value is None else of_type(value, str, path)


def read_id(value: object) -> str | None:
    """Return the id of a request, which its response repeats."""
    if value is None or (isinstance(value, str) and SAFE_ID.fullmatch(value)):
        return value
    raise InputError("id", "must be a string of at most 128 characters, no control characters")


def check_names(names: Sequence[str], path: str) -> None:
    """Raise InputError if a name occurs twice."""
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            raise InputError(f"{path}.{number}.name", f"{quote(name)} is there twice")
        seen.add(name)


def of_type(value: object, expected: type[Expected], path: str) -> Expected:
    """Return a JSON value; raise InputError if it is of another type."""
    if not isinstance(value, expected):
        raise InputError(path, f"must be {json_type(expected())}, not {json_type(value)}")
    return value


def quote(text: str) -> str:
    """Quote a client's text: on one line, shortened."""
    return repr(text[:LONGEST_QUOTE])[:LONGEST_QUOTE]


def write_response(
    head: dict[str, object],
    outputs: Sequence[tuple[str, Column, bool]],
) -> tuple[bytes, int | None]:
    """Write the body of a response.

    Parameters
    ----------
    head
        The fields besides the outputs.
    outputs
        Name, values, and whether the output is in binary form.

    Returns
    -------
    bytes
        The body.
    int or None
        Length of the JSON at its beginning; None if it is all JSON.
    """
    entries: list[dict[str, object]] = []
    tensors: list[bytes] = []
    for name, values, binary in outputs:
        entry: dict[str, object] = {"name": name}
        if isinstance(values, np.ndarray):
            datatype = "BOOL" if values.dtype == np.bool_ else "FP32"
            entry |= {"datatype": datatype, "shape": values.shape}
        else:
            entry |= {"datatype": "BYTES", "shape": [len(values)]}
        if binary:
            tensors.append(pack(values))
            entry["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            # orjson needs contiguous arrays.
            entry["data"] = values.ravel() if isinstance(values, np.ndarray) else list(values)
        entries.append(entry)
    header = orjson.dumps(head | {"outputs": entries}, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([header, *tensors]), len(header)) if tensors else (header, None)


def pack(values: Column) -> bytes:
    """Return the bytes of an output; each string follows its length in bytes."""
    if isinstance(values, np.ndarray):
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    encoded = [text.encode() for text in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
