"""Refuse an ONNX graph that reaches outside its own bytes.

onnxruntime reads the files that a graph names as external data, even for a graph loaded from bytes:
version 1.31 then reads any file below the service's working directory. It also loads custom
operators, and files in a format of its own. A bundle written by ``export`` has none of these.

The check runs before onnxruntime sees the graph, and without onnx or protobuf, which the service
does not install: it walks protobuf's wire format from field to field. It enters only messages that
can hold a tensor or an operator; all other fields, weights above all, are skipped and not copied.
It does not validate the graph otherwise: onnxruntime does.

References
----------
https://protobuf.dev/programming-guides/encoding/ for the wire format;
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto for the messages and field numbers.
"""

from dropserve.export.bundle import BundleError

# For each message, the fields to enter, and the message in each.
LEADS: dict[str, dict[int, str]] = {
    "ModelProto": {
        7: "GraphProto",  # graph
        8: "OperatorSetIdProto",  # opset_import
        20: "TrainingInfoProto",  # training_info
        25: "FunctionProto",  # functions
    },
    "GraphProto": {
        1: "NodeProto",  # node
        5: "TensorProto",  # initializer
        15: "SparseTensorProto",  # sparse_initializer
    },
    "NodeProto": {5: "AttributeProto"},  # attribute
    "AttributeProto": {
        5: "TensorProto",  # t
        6: "GraphProto",  # g
        10: "TensorProto",  # tensors
        11: "GraphProto",  # graphs
        22: "SparseTensorProto",  # sparse_tensor
        23: "SparseTensorProto",  # sparse_tensors
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},  # values, indices
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},  # initialization, algorithm
    "FunctionProto": {
        7: "NodeProto",  # node
        9: "OperatorSetIdProto",  # opset_import
        11: "AttributeProto",  # attribute_proto
    },
    "OperatorSetIdProto": {},
    "TensorProto": {},
}
# The field ``domain`` of each message that names the domain of an operator.
DOMAINS = {"NodeProto": 7, "OperatorSetIdProto": 1, "FunctionProto": 10}
ONNX_DOMAINS = (b"", b"ai.onnx")
# Fields of TensorProto; the second is an enumeration whose 0 means that the data are in place.
EXTERNAL_DATA, DATA_LOCATION = 13, 14

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED = {FIXED64: 8, FIXED32: 4}
MAX_VARINT_BYTES = 10
MAX_TAG = 2**32 - 1
# Levels of nested messages, as in protobuf itself.
MAX_DEPTH = 100
# Bytes 4 to 8 of a file in onnxruntime's own format, which they mark even if the file is valid
# protobuf, too.
ORT_FORMAT = b"ORTM"


class Malformed(Exception):
    """The bytes are not a protobuf message."""


def check(file: str, graph: bytes) -> None:
    """Raise BundleError unless a serialized ModelProto is a self-contained model.

    Time is linear in the number of fields; memory is bounded by ``MAX_DEPTH``.

    Parameters
    ----------
    file
        Name of the graph's file, for the error message.
    graph
        Content of the file.

    Raises
    ------
    BundleError
        If any tensor has external data, any operator is not one of ONNX's own, or the graph is
        malformed.
    """
    if graph[4:8] == ORT_FORMAT:
        raise BundleError(f"{file} is in a format of onnxruntime's own, not in ONNX's")
    try:
        fault = find_fault(graph)
    except Malformed as error:
        raise BundleError(f"{file} does not load: it is no ONNX model: {error}") from None
    if fault:
        raise BundleError(f"{file} {fault}")


def find_fault(graph: bytes) -> str | None:
    """Return how a serialized ModelProto reaches outside its own bytes; None if it does not.

    Raises
    ------
    Malformed
        If the bytes are not a ModelProto.
    """
    at = 0
    # The messages around this position, each with its end. Not recursive: the graph would choose
    # the depth of the recursion.
    around = [("ModelProto", len(graph))]
    while around:
        message, end = around[-1]
        if at == end:
            around.pop()
            continue
        start = at
        tag, at = read_varint(graph, at, end)
        field, wire_type = tag >> 3, tag & 7
        # Protobuf would drop bits of a larger tag, and so see another field.
        if field == 0 or tag > MAX_TAG:
            raise Malformed(f"no field at byte {start}")
        value = 0
        if wire_type == VARINT:
            value, at = read_varint(graph, at, end)
            after = at
        elif wire_type == BYTES:
            value, at = read_varint(graph, at, end)
            after = at + value
        elif wire_type in FIXED:
            after = at + FIXED[wire_type]
        else:  # 3 and 4, groups, are not in ONNX; 6 and 7 are not in protobuf
            raise Malformed(f"wire type {wire_type} at byte {start}")
        if after > end:
            raise Malformed(f"the field at byte {start} extends beyond its enclosing message")

        inner = LEADS[message].get(field)
        is_domain = DOMAINS.get(message) == field
        if (inner or is_domain) and wire_type != BYTES:
            raise Malformed(f"wire type {wire_type} at byte {start}")
        if message == "TensorProto" and (
            field == EXTERNAL_DATA or (field == DATA_LOCATION and value != 0)
        ):
            return "keeps data outside itself, as external data"
        if is_domain and (domain := graph[at : min(after, at + 64)]) not in ONNX_DOMAINS:
            return f"has operators of the domain {domain.decode(errors='replace')!r}, not ONNX's"
        if inner:
            if len(around) > MAX_DEPTH:
                raise Malformed(f"more than {MAX_DEPTH} messages in each other at byte {start}")
            around.append((inner, after))
        else:
            at = after
    return None


def read_varint(graph: bytes, at: int, end: int) -> tuple[int, int]:
    """Return the varint at a position (seven bits a byte), and the position after it."""
    value = 0
    for count, byte in enumerate(graph[at : min(at + MAX_VARINT_BYTES, end)]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    raise Malformed(f"no number at byte {at}")
