"""The Open Inference Protocol, spoken by Triton's own client."""

import json
import re
import struct
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.http import (  # type: ignore[import-untyped] # it ships no types
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.utils import (  # type: ignore[import-untyped]
    InferenceServerException,
    np_to_triton_dtype,
)

Examples = Callable[[str], list[Any]]
Array = NDArray[Any]
Json = dict[str, Any]

LENGTH = "inference-header-content-length"
# The service's default limits.
MAX_ROWS, MAX_PASSES, MAX_BODY = 4096, 10_000, 4 * 2**20


@pytest.fixture(scope="module")
def triton(client: httpx.Client) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}") as triton:
        yield triton


@pytest.fixture(scope="module")
def digits(examples: Examples) -> Array:
    return np.array(examples("digits"), np.float32)  # [B, 8, 8]


def tensor(values: Array, binary: bool = True, name: str = "x") -> InferInput:
    made = InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
    return made.set_data_from_numpy(values, binary_data=binary)


def ask(client: httpx.Client, route: str, **body: object) -> Json:
    answer = client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    document: Json = answer.json()
    return document


def equal(result: InferResult, name: str, expected: object) -> None:
    """Check that an output equals another route's answer to the last bit."""
    found = result.as_numpy(name)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32))


def labels(result: InferResult) -> list[str]:
    return [label.decode() for label in result.as_numpy("labels").tolist()]


# Metadata


def test_the_server_is_live_and_ready_and_says_who_it_is(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.get_server_metadata() == {
        "name": "dropserve",
        "version": metadata.version("dropserve"),
        "extensions": [
            *("binary_tensor_data", "model_configuration", "model_repository", "parameters"),
            "statistics",
        ],
    }


CLASSES = [
    {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
    {"name": "labels", "datatype": "BYTES", "shape": [-1]},
]
MOMENTS = [
    {"name": "mean", "datatype": "FP32", "shape": [-1, 10]},
    {"name": "std", "datatype": "FP32", "shape": [-1, 10]},
    {"name": "mutual_information", "datatype": "FP32", "shape": [-1]},
    {"name": "lower", "datatype": "FP32", "shape": [-1, 10]},
    {"name": "upper", "datatype": "FP32", "shape": [-1, 10]},
    {"name": "prediction_set", "datatype": "BOOL", "shape": [-1, 10]},
]
VALUE_MOMENTS = [
    {"name": name, "datatype": "FP32", "shape": [-1, 1]}
    for name in ("mean", "std", "lower", "upper", "prediction_lower", "prediction_upper")
]


@pytest.mark.parametrize("version", ["", "1"])
@pytest.mark.parametrize(
    ("name", "shape", "outputs"),
    [
        ("digits", [-1, 8, 8], CLASSES),
        ("digits.mc", [-1, 8, 8], MOMENTS),
        ("diabetes", [-1, 10], [{"name": "values", "datatype": "FP32", "shape": [-1, 1]}]),
        ("diabetes.mc", [-1, 10], VALUE_MOMENTS),
    ],
)
def test_a_model_is_ready_and_says_what_it_takes_and_answers(
    triton: InferenceServerClient, name: str, shape: list[int], outputs: list[Json], version: str
) -> None:
    assert triton.is_model_ready(name, version)
    assert triton.get_model_metadata(name, version) == {
        "name": name,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": shape}],
        "outputs": outputs,
    }


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", ["digits", "digits.mc", "diabetes", "diabetes.mc"])
def test_outputs_are_as_the_metadata_describe_them(
    triton: InferenceServerClient, examples: Examples, name: str, binary: bool
) -> None:
    rows = np.array(examples(name.removesuffix(".mc"))[:3], np.float32)
    described = triton.get_model_metadata(name)
    (expected,) = described["inputs"]
    assert list(rows.shape) == [3, *expected["shape"][1:]]
    outputs = [wanted(output["name"], binary) for output in described["outputs"]]
    answer = triton.infer(name, [tensor(rows, name=expected["name"])], outputs=outputs)
    found = answer.get_response()["outputs"]
    for output in found:
        if binary or output["datatype"] != "BYTES":
            assert list(answer.as_numpy(output["name"]).shape) == output["shape"]
        output.pop("parameters", None)
        output.pop("data", None)
        output["shape"][0] = -1
    assert found == described["outputs"]


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("none", "", "no model 'none'; served are: diabetes, digits, double"),
        ("none.mc", "", "no model 'none'; served are: diabetes, digits, double"),
        ("digits.mc.mc", "", "no model 'digits.mc'; served are: diabetes, digits, double"),
        ("digits", "2", "no version 2 of model digits; served are: 1"),
        ("digits.mc", "2", "no version 2 of model digits; served are: 1"),
        ("digits", "0", "no version 0 of model digits; served are: 1"),
        ("digits", "-1", "no version '-1': versions are whole numbers"),
        ("digits", "latest", "no version 'latest': versions are whole numbers"),
    ],
)
def test_a_model_that_is_not_served_is_not_ready_and_a_404(
    triton: InferenceServerClient, digits: Array, name: str, version: str, says: str
) -> None:
    assert not triton.is_model_ready(name, version)
    refused(lambda: triton.get_model_metadata(name, version), 404, says)
    refused(lambda: triton.infer(name, [tensor(digits)], version), 404, says)


# Inference


@pytest.mark.parametrize("binary_output", [True, False, None])
@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_classes_are_those_of_predict(
    triton: InferenceServerClient,
    client: httpx.Client,
    digits: Array,
    flat: bool,
    binary_input: bool,
    binary_output: bool | None,
) -> None:
    expected = ask(client, "/predict", inputs=digits.tolist(), model="digits")
    rows = digits.reshape(len(digits), 64) if flat else digits
    outputs = None
    if binary_output is not None:
        outputs = [InferRequestedOutput(n, binary_output) for n in ("probabilities", "labels")]
    result = triton.infer("digits", [tensor(rows, binary_input)], outputs=outputs)
    equal(result, "probabilities", expected["probabilities"])
    assert labels(result) == expected["labels"] if binary_output is not False else True
    assert result.get_output("labels")["datatype"] == "BYTES"
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == ("digits", "1")
    as_binary = ["data" not in output for output in answer["outputs"]]
    assert as_binary == [binary_output is not False] * 2


def test_stratified_masks_and_a_tolerance_are_those_of_uncertainty(
    triton: InferenceServerClient, client: httpx.Client, digits: Array
) -> None:
    asked = {"passes": 4000, "seed": 5, "masks": "stratified", "tolerance": 0.01}
    expected = ask(client, "/uncertainty", inputs=digits.tolist(), model="digits", **asked)
    assert expected["converged"]
    result = triton.infer("digits.mc", [tensor(digits)], parameters=asked)
    told = {name: expected[name] for name in ("passes", "seed", "converged")}
    assert result.get_response()["parameters"] == told
    equal(result, "mean", expected["mean"])
    equal(result, "std", expected["std"])


def test_labels_in_json_are_strings(
    triton: InferenceServerClient, client: httpx.Client, digits: Array
) -> None:
    expected = ask(client, "/predict", inputs=digits.tolist(), model="digits")
    result = triton.infer("digits", [tensor(digits)], outputs=[wanted("labels", False)])
    assert result.get_output("labels")["data"] == expected["labels"]


def wanted(name: str, binary: bool = True) -> InferRequestedOutput:
    return InferRequestedOutput(name, binary_data=binary)


@pytest.mark.parametrize("binary", [True, False])
def test_values_are_those_of_predict(
    triton: InferenceServerClient, client: httpx.Client, examples: Examples, binary: bool
) -> None:
    rows = np.array(examples("diabetes"), np.float32)
    expected = ask(client, "/predict", inputs=rows.tolist(), model="diabetes")
    result = triton.infer("diabetes", [tensor(rows, binary)], outputs=[wanted("values", binary)])
    equal(result, "values", expected["values"])


def test_requested_outputs_come_in_the_order_and_form_of_the_request(
    triton: InferenceServerClient, client: httpx.Client, digits: Array
) -> None:
    body = {"inputs": digits.tolist(), "model": "digits", "seed": 3}
    expected = ask(client, "/uncertainty", **body)
    asked = [("mutual_information", True), ("std", False), ("mean", True)]
    for some in (asked, asked[::-1], asked[:1], asked[1:2]):
        outputs = [wanted(*each) for each in some]
        result = triton.infer(
            "digits.mc", [tensor(digits)], outputs=outputs, parameters={"seed": 3}
        )
        found = result.get_response()["outputs"]
        assert [(each["name"], "data" not in each) for each in found] == some
        for name, _ in some:
            equal(result, name, expected[name])


def test_all_outputs_come_as_json_if_the_request_names_none(
    client: httpx.Client, digits: Array
) -> None:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [10, 8, 8], "data": digits.tolist()}]
    expected = ask(client, "/predict", inputs=digits.tolist(), model="digits")
    flat = [value for row in expected["probabilities"] for value in row]
    asked: list[Json] = [{}, {"outputs": []}, {"parameters": {"binary_data_output": False}}]
    for more in asked:
        assert ask(client, "/v2/models/digits/infer", inputs=inputs, **more) == {
            "model_name": "digits",
            "model_version": "1",
            "outputs": [
                {"name": "probabilities", "datatype": "FP32", "shape": [10, 10], "data": flat},
                {
                    "name": "labels",
                    "datatype": "BYTES",
                    "shape": [10],
                    "data": expected["labels"],
                },
            ],
        }


@pytest.mark.parametrize("name", ["digits", "digits.mc"])
def test_the_id_and_the_names_of_a_request_come_back(
    triton: InferenceServerClient, digits: Array, name: str
) -> None:
    answer = triton.infer(name, [tensor(digits)], "1", request_id="mine, ü").get_response()
    assert answer["id"] == "mine, ü"
    assert (answer["model_name"], answer["model_version"]) == (name, "1")
    assert "id" not in triton.infer(name, [tensor(digits)]).get_response()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_the_uncertainty_is_that_of_the_same_seed(
    triton: InferenceServerClient,
    client: httpx.Client,
    examples: Examples,
    name: str,
    binary: bool,
) -> None:
    rows = np.array(examples(name), np.float32)
    asked = {"passes": 37, "seed": 2**62 + 1, "masks": "independent"}
    expected = ask(client, "/uncertainty", inputs=rows.tolist(), model=name, **asked)
    result = triton.infer(f"{name}.mc", [tensor(rows, binary)], parameters=asked)
    for output in ("mean", "std", "mutual_information")[: 3 if name == "digits" else 2]:
        equal(result, output, expected[output])
    assert result.get_response()["parameters"] == {"passes": 37, "seed": 2**62 + 1}


def test_a_seed_is_drawn_and_returned_and_gives_the_same_answer_again(
    triton: InferenceServerClient, digits: Array
) -> None:
    drawn = triton.infer("digits.mc", [tensor(digits)])
    parameters = drawn.get_response()["parameters"]
    assert parameters["passes"] == 100
    again = triton.infer("digits.mc", [tensor(digits)], parameters={"seed": parameters["seed"]})
    for output in ("mean", "std", "mutual_information"):
        equal(again, output, drawn.as_numpy(output))
    seeds = {
        triton.infer("digits.mc", [tensor(digits)]).get_response()["parameters"]["seed"]
        for _ in range(10)
    }
    assert len(seeds) == 10


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", ["f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_other_types_of_numbers_are_converted(
    triton: InferenceServerClient, client: httpx.Client, digits: Array, dtype: str, binary: bool
) -> None:
    expected = ask(client, "/predict", inputs=digits.tolist(), model="digits")
    # Pixels are whole numbers up to 16, which all types hold.
    result = triton.infer("digits", [tensor(digits.astype(dtype), binary)])
    equal(result, "probabilities", expected["probabilities"])


def test_a_number_of_fp64_is_the_float32_next_to_it(
    triton: InferenceServerClient, client: httpx.Client, digits: Array
) -> None:
    rows = digits.astype(np.float64) + 0.1
    expected = ask(client, "/predict", inputs=rows.tolist(), model="digits")
    for binary in (True, False):
        result = triton.infer("digits", [tensor(rows, binary)])
        equal(result, "probabilities", expected["probabilities"])


def test_many_requests_of_one_client_at_once_get_the_answers_they_get_alone(
    client: httpx.Client, digits: Array
) -> None:
    url = f"{client.base_url.host}:{client.base_url.port}"
    with InferenceServerClient(url, concurrency=8) as triton:
        rows = [tensor(digits[n % 7 : n % 7 + 3]) for n in range(40)]
        alone = [triton.infer("digits", [each]).as_numpy("probabilities") for each in rows]
        under_way = [
            triton.async_infer("digits", [each], request_id=str(n)) for n, each in enumerate(rows)
        ]
        for number, each in enumerate(under_way):
            result = each.get_result()
            assert result.get_response()["id"] == str(number)
            found = result.as_numpy("probabilities")
            # Another batch size rounds differently.
            np.testing.assert_allclose(found, alone[number], atol=1e-5)


# Errors


def refused(call: Callable[[], object], status: int, says: str) -> None:
    """Check that Triton's client raises the service's status and message."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() == str(status)
    assert caught.value.message() == says


class Wrong(NamedTuple):
    """A call that the service refuses."""

    says: str
    rows: Array
    model: str = "digits"
    name: str = "x"
    outputs: tuple[str, ...] = ()
    parameters: Json | None = None


ROWS = np.zeros((2, 8, 8), np.float32)
TYPES = "FP32, FP64, FP16, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64"
NAN, INF, BEYOND = (np.full((1, 64), value) for value in (np.nan, -np.inf, 1e39))
FINITE = "must hold finite numbers, at most 3.402823e+38 in size"
WRONG = {
    "another input": Wrong(
        "inputs.0.name: must be x, the one input, not 'pixels'", ROWS, name="pixels"
    ),
    "one dimension": Wrong("inputs.0.shape: must be [-1, 8, 8], not [64]", ROWS[0].reshape(64)),
    "another shape": Wrong(
        "inputs.0.shape: must be [-1, 8, 8], not [2, 4, 16]", ROWS.reshape(2, 4, 16)
    ),
    "one value too few": Wrong(
        "inputs.0.shape: must be [-1, 8, 8], not [2, 63]", ROWS.reshape(2, 64)[:, 1:]
    ),
    "the shape of another model": Wrong(
        "inputs.0.shape: must be [-1, 10], not [2, 8, 8]", ROWS, "diabetes"
    ),
    "no rows": Wrong("inputs: at least one row is needed", ROWS[:0]),
    "too many rows": Wrong(
        "inputs: at most 4096 rows are allowed, not 4097",
        np.zeros((MAX_ROWS + 1, 64), np.uint8),
    ),
    "booleans": Wrong(
        f"inputs.0.datatype: must be one of {TYPES}, not 'BOOL'", ROWS.astype(np.bool_)
    ),
    "text": Wrong(f"inputs.0.datatype: must be one of {TYPES}, not 'BYTES'", ROWS.astype("S")),
    "NaN": Wrong(f"inputs.0: {FINITE}", NAN.astype(np.float32)),
    "NaN of FP64": Wrong(f"inputs.0: {FINITE}", NAN),
    "NaN of FP16": Wrong(f"inputs.0: {FINITE}", NAN.astype(np.float16)),
    "infinity": Wrong(f"inputs.0: {FINITE}", INF.astype(np.float32)),
    "beyond float32": Wrong(f"inputs.0: {FINITE}", BEYOND),
    "another output": Wrong(
        "outputs.1.name: must be one of probabilities, labels, not 'mean'",
        ROWS,
        outputs=("labels", "mean"),
    ),
    "another output of uncertainty": Wrong(
        "outputs.0.name: must be one of mean, std, mutual_information, lower, upper, "
        "prediction_set, not 'labels'",
        ROWS,
        "digits.mc",
        outputs=("labels",),
    ),
    "mutual information of a regression": Wrong(
        "outputs.0.name: must be one of mean, std, lower, upper, prediction_lower, "
        "prediction_upper, not 'mutual_information'",
        np.zeros((1, 10)),
        "diabetes.mc",
        outputs=("mutual_information",),
    ),
    "an output twice": Wrong(
        "outputs.1.name: 'labels' is there twice", ROWS, outputs=("labels", "labels")
    ),
    "a parameter of a prediction": Wrong(
        "parameters.seed: is allowed only for digits.mc", ROWS, parameters={"seed": 1}
    ),
    "an unknown parameter": Wrong(
        "parameters: allowed are passes, seed, masks, tolerance, interval, coverage, not 'pases'",
        ROWS,
        "digits.mc",
        parameters={"pases": 1},
    ),
    "an interval of more than all": Wrong(
        "interval: Input should be less than 1", ROWS, "digits.mc", parameters={"interval": 1.5}
    ),
    "a coverage that the bundle cannot give": Wrong(
        "coverage: may be at most 0.996309 here, as the bundle holds 270 scores",
        ROWS,
        "digits.mc",
        parameters={"coverage": 0.9999},
    ),
    "another codec": Wrong(
        "parameters.content_type: must be one of np, pd, str, not 'base64'",
        ROWS,
        parameters={"content_type": "base64"},
    ),
    "no passes": Wrong(
        "passes: Input should be greater than or equal to 1",
        ROWS,
        "digits.mc",
        parameters={"passes": 0},
    ),
    "passes as text": Wrong(
        "passes: Input should be a valid integer", ROWS, "digits.mc", parameters={"passes": "10"}
    ),
    "too many passes": Wrong(
        "passes: must be at most 10000, not 10001",
        ROWS,
        "digits.mc",
        parameters={"passes": MAX_PASSES + 1},
    ),
    "too many rows x passes": Wrong(
        "passes: rows x passes may be at most 1000000, not 101 x 10000",
        np.zeros((101, 64)),
        "digits.mc",
        parameters={"passes": MAX_PASSES},
    ),
    "a negative seed": Wrong(
        "seed: Input should be greater than or equal to 0",
        ROWS,
        "digits.mc",
        parameters={"seed": -1},
    ),
    "a seed beyond 63 bits": Wrong(
        "seed: Input should be less than 9223372036854775808",
        ROWS,
        "digits.mc",
        parameters={"seed": 2**63},
    ),
    "masks that are not": Wrong(
        "masks: Input should be 'independent' or 'stratified'",
        ROWS,
        "digits.mc",
        parameters={"masks": "striped"},
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_tritons_client_raises_what_the_service_says_is_wrong(
    triton: InferenceServerClient, wrong: Wrong
) -> None:
    asked = [wanted(name) for name in wrong.outputs]
    inputs = [tensor(wrong.rows, name=wrong.name)]
    refused(
        lambda: triton.infer(wrong.model, inputs, outputs=asked, parameters=wrong.parameters),
        400,
        wrong.says,
    )


def test_two_inputs_are_one_too_many(triton: InferenceServerClient) -> None:
    refused(
        lambda: triton.infer("digits", [tensor(ROWS), tensor(ROWS)]),
        400,
        "inputs.1.name: 'x' is there twice",
    )
    refused(
        lambda: triton.infer("digits", [tensor(ROWS), tensor(ROWS, name="y")]),
        400,
        "inputs.1.name: must be x, the one input, not 'y'",
    )


def test_shared_memory_and_classifications_are_refused(triton: InferenceServerClient) -> None:
    x = InferInput("x", [2, 8, 8], "FP32")
    x.set_shared_memory("region", 512)
    unsupported = "is not supported, leave it out"
    refused(
        lambda: triton.infer("digits", [x]),
        400,
        f"inputs.0.parameters.shared_memory_region: {unsupported}",
    )
    outputs = [InferRequestedOutput("probabilities", class_count=3)]
    refused(
        lambda: triton.infer("digits", [tensor(ROWS)], outputs=outputs),
        400,
        f"outputs.0.parameters.classification: {unsupported}",
    )


def test_a_body_that_is_too_large_is_a_413(triton: InferenceServerClient) -> None:
    rows = np.zeros((MAX_BODY // 256 + 1, 64), np.float32)
    says = f"the body may be at most {MAX_BODY} bytes long"
    refused(lambda: triton.infer("digits", [tensor(rows)]), 413, says)


# Requests that Triton's client cannot send

X = {"name": "x", "shape": [1, 64], "datatype": "FP32"}
JSON_X = X | {"data": [0] * 64}
RAW = struct.pack("<64f", *range(64))


def binary(size: object = 256) -> Json:
    return X | {"parameters": {"binary_data_size": size}}


def send(
    client: httpx.Client,
    document: object,
    tail: bytes = b"",
    length: int | str | None = None,
    model: str = "digits",
) -> httpx.Response:
    """Send JSON with bytes behind it, and the JSON's length or another in its place."""
    head = document if isinstance(document, bytes) else json.dumps(document).encode()
    headers = {}
    if tail or length is not None:
        headers[LENGTH] = str(len(head) if length is None else length)
    return client.post(f"/v2/models/{model}/infer", content=head + tail, headers=headers)


def error(answer: httpx.Response, status: int = 400) -> str:
    """Check that a response is an error of the protocol; return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document.keys() == {"error"}
    says: str = document["error"]
    assert says
    return says


def test_a_binary_request_by_hand_is_answered_in_binary(
    client: httpx.Client, triton: InferenceServerClient
) -> None:
    body = {"inputs": [binary()], "parameters": {"binary_data_output": True}}
    answer = send(client, body, RAW)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[LENGTH])
    header = json.loads(answer.content[:length])
    assert header["outputs"][0] == {
        "name": "probabilities",
        "datatype": "FP32",
        "shape": [1, 10],
        "parameters": {"binary_data_size": 40},
    }
    expected = ask(client, "/predict", inputs=[list(range(64))], model="digits")
    found = np.frombuffer(answer.content, "<f4", 10, length)
    np.testing.assert_array_equal(found, np.float32(expected["probabilities"][0]))
    (label,) = expected["labels"]
    assert answer.content[length + 40 :] == struct.pack("<I", 1) + label.encode()


@pytest.mark.parametrize(
    ("size", "tail", "says"),
    [
        (255, RAW, "inputs.0.parameters.binary_data_size: must be 256, 4 x 64, not 255"),
        (257, RAW, "inputs.0.parameters.binary_data_size: must be 256, 4 x 64, not 257"),
        ("256", RAW, "inputs.0.parameters.binary_data_size: must be 256, 4 x 64, not a string"),
        (
            256,
            RAW[1:],
            "inputs.0.parameters.binary_data_size: expecting 256 bytes behind the JSON and earlier "
            "tensors, got 255 (see Inference-Header-Content-Length)",
        ),
        (256, RAW + b"\0", "inputs: expecting 256 bytes after the JSON, got 257"),
    ],
)
def test_binary_data_of_the_wrong_size_are_refused(
    client: httpx.Client, size: object, tail: bytes, says: str
) -> None:
    assert error(send(client, {"inputs": [binary(size)]}, tail)) == says


@pytest.mark.parametrize(
    ("length", "says"),
    [
        ("x", "must be a whole number"),
        ("-1", "must be a whole number"),
        ("1.5", "must be a whole number"),
        ("", "must be a whole number"),
        ("9" * 30, "must be a whole number"),
        ("999", r"must be from 0 to \d+, the length of the body, not 999"),
    ],
)
def test_an_impossible_length_of_the_json_is_refused(
    client: httpx.Client, length: str, says: str
) -> None:
    found = error(send(client, {"inputs": [binary()]}, RAW, length))
    assert re.fullmatch(f"Inference-Header-Content-Length {says}", found)


@pytest.mark.parametrize("length", [0, 1, 50, 300])
def test_a_wrong_length_of_the_json_is_refused(client: httpx.Client, length: int) -> None:
    says = error(send(client, {"inputs": [binary()]}, RAW, length))
    assert says.startswith(f"the body, in its first {length} bytes, is not JSON: ")


BY_HAND: dict[str, tuple[object, str]] = {
    "a list": ([], "body: must be an object, not a list"),
    "nothing in it": ({}, "inputs: must be a list, not null"),
    "no inputs": ({"inputs": []}, "inputs: at least one tensor is needed"),
    "an unknown field": (
        {"inputs": [JSON_X], "colour": 1},
        "body: allowed are id, model_name, model_version, parameters, inputs, outputs, "
        "not 'colour'",
    ),
    "an id that is a number": (
        {"inputs": [JSON_X], "id": 1},
        "id: must be a string of at most 128 characters, no control characters",
    ),
    "too few elements": (
        {"inputs": [X | {"data": [0] * 63}]},
        "inputs.0.data: expecting 64 elements, got 63",
    ),
    "too many elements": (
        {"inputs": [X | {"data": [0] * 65}]},
        "inputs.0.data: expecting 64 elements, got 65",
    ),
    "nested to another shape": (
        {"inputs": [X | {"data": [[0] * 32] * 2}]},
        "inputs.0.data: must be flat, or nested as [1, 64]",
    ),
    "no data": (
        {"inputs": [X]},
        "inputs.0: needs data or parameters.binary_data_size, and not both",
    ),
    "data twice": (
        {"inputs": [JSON_X | {"parameters": {"binary_data_size": 256}}]},
        "inputs.0: needs data or parameters.binary_data_size, and not both",
    ),
    "a string for a number": (
        {"inputs": [X | {"data": ["1", *[0] * 63]}]},
        "inputs.0.data.0: must be a number, not a string",
    ),
    "beyond the type": (
        {"inputs": [JSON_X | {"datatype": "UINT8", "data": [0] * 63 + [256]}]},
        "inputs.0.data.63: must be a whole number from 0 to 255",
    ),
    "an unknown type": (
        {"inputs": [JSON_X | {"datatype": "FP128"}]},
        f"inputs.0.datatype: must be one of {TYPES}, not 'FP128'",
    ),
    "a shape of which one is negative": (
        {"inputs": [JSON_X | {"shape": [-1, 64]}]},
        "inputs.0.shape: must list whole numbers, 0 or more",
    ),
    "a shape of more than there is": (
        {"inputs": [JSON_X | {"shape": [2**25, 64]}]},
        "inputs.0.shape: must be of at most 2147483647 elements",
    ),
}


@pytest.mark.parametrize(("document", "says"), BY_HAND.values(), ids=BY_HAND.keys())
def test_a_refusal_says_what_is_wrong(client: httpx.Client, document: object, says: str) -> None:
    assert error(send(client, document)) == says


@pytest.mark.parametrize("text", [b"", b"hello", b'{"inputs": [NaN]}', b"[" * 9000, b"\xff"])
def test_a_body_that_is_not_json_is_refused(client: httpx.Client, text: bytes) -> None:
    assert error(send(client, text)).startswith("the body is not JSON: ")


def test_unknown_methods_and_paths_are_errors_of_the_protocol(client: httpx.Client) -> None:
    error(client.get("/v2/models/digits/infer"), 405)
    error(client.post("/v2/models/digits"), 405)
    error(client.get("/v2/models/digits/weights"), 404)
    error(client.post("/v2/models/%2e%2e%2fdigits/infer", json={}), 404)
    error(client.post("/v2/models/digits%2f1/infer", json={}), 404)


GOOD: Json = {
    "id": "1",
    "parameters": {"binary_data_output": True, "passes": 2, "seed": 1, "masks": "independent"},
    "inputs": [binary()],
    "outputs": [{"name": "mean", "parameters": {"binary_data": False}}, {"name": "std"}],
}
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats() | st.text()
ANY = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
TELLING: st.SearchStrategy[object] = st.sampled_from(
    [
        *("FP32", "FP64", "INT8", "BYTES", "x", "mutual_information", "independent"),
        *(0, 1, 64, 256, -1, 2**31, 2**63, 1.0, True, None, [], {}, [0], [1, 64]),
        *([64], [64, 1], [1, 8, 8], [0, 64], [2, 32], [0] * 64, [[[0] * 8] * 8], [[0] * 64]),
    ]
)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_good_request_with_something_changed_is_answered_or_refused(
    client: httpx.Client, data: st.DataObject
) -> None:
    document = json.loads(json.dumps(GOOD))
    for _ in range(data.draw(st.integers(0, 2))):
        part = document
        while True:
            keys: Any = range(len(part)) if isinstance(part, list) else sorted(part)
            key = data.draw(st.sampled_from(keys))
            inner = part[key]
            if not isinstance(inner, list | dict) or not inner or data.draw(st.booleans()):
                break
            part = inner
        if data.draw(st.integers(0, 4)) == 0:
            del part[key]
            if not document:
                break
        else:
            # A copy, as a later change may be of a part of it.
            part[key] = json.loads(json.dumps(data.draw(TELLING | ANY)))
    tail = data.draw(st.sampled_from([RAW, RAW, RAW, RAW[1:], RAW * 2, b"", b"\xff" * 256]))
    head = json.dumps(document).encode()
    off = data.draw(st.sampled_from([0, 0, 0, 0, -1, 1, 4]))
    answer = send(client, head, tail, max(0, len(head) + off), model="digits.mc")
    if answer.status_code == 200:
        length = int(answer.headers.get(LENGTH, len(answer.content)))
        for output in json.loads(answer.content[:length])["outputs"]:
            values = output.get("data", [])
            assert np.isfinite(values).all()
    else:
        assert 400 <= answer.status_code < 500, answer.text
        error(answer, answer.status_code)
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 200
