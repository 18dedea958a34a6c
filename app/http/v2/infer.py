"""``infer`` of the Open Inference Protocol v2: tensors to rows, answers to tensors.

A model takes one input tensor, named in its manifest. Beside each model NAME there is NAME.mc,
which answers with the mean and the standard deviation of train-mode passes. Fields and parameters
that cannot change the answer are taken, whatever client writes them; those that could, and are not
supported, are refused.

References
----------
https://github.com/kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``
"""

import re
from dataclasses import replace
from http import HTTPStatus
from typing import NamedTuple

import numpy as np
from starlette.exceptions import HTTPException

from dropserve.app.errors import InputError, UnknownModel
from dropserve.app.http.bodies import JSON, Headers, Request, Response
from dropserve.app.http.schemas import TensorDescription, UncertaintyRequest
from dropserve.app.http.v2 import codec
from dropserve.app.http.v2.codec import Column, InferRequest, WantedOutput
from dropserve.app.inference.answers import Answer
from dropserve.app.inference.query import PredictQuery, Query
from dropserve.app.inference.rows import Rows
from dropserve.app.inference.runner import ModelRunner
from dropserve.app.inference.service import Service
from dropserve.app.observability.record import RequestRecord
from dropserve.export.bundle import RESERVED_SUFFIX as MC

ROUTES = ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")
PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
HEADER_LENGTH = b"inference-header-content-length"
# Content types that forms have.
SIMPLE_TYPES = (b"application/x-www-form-urlencoded", b"multipart/form-data", b"text/plain")
# Parameters that NAME.mc takes.
PARAMETERS = ("passes", "seed", "masks", "tolerance", "interval", "coverage")
# Outputs of NAME.mc that come, unless requested by name, only with the parameter of that name.
OPTIONAL = {
    "interval": ("lower", "upper"),
    "coverage": ("prediction_set", "prediction_lower", "prediction_upper"),
}
# Coverage of a requested prediction set or interval without that parameter.
COVERAGE = Query.interval


class Target(NamedTuple):
    """The model that a request is for, and whether its Monte Carlo answer is wanted."""

    name: str
    version: int | None
    mc: bool


class Asked(NamedTuple):
    """A parsed request: the name in its path, its target, the target's model, and the content."""

    name: str
    target: Target
    runner: ModelRunner
    content: InferRequest


def parse_version(text: str) -> int:
    """Parse the number of a version in a path; raise UnknownModel if it is not one."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UnknownModel(f"no version {text[:20]!r}: versions are whole numbers")
    return int(text)


def parse_target(name: str, version: str | None) -> Target:
    """Parse a model's name and version in a path."""
    number = None if version is None else parse_version(version)
    return Target(name.removesuffix(MC), number, name.endswith(MC))


class Answered(NamedTuple):
    """An answer: its fields besides the outputs; and the outputs, in binary form or not."""

    head: dict[str, object]
    outputs: list[tuple[str, Column, bool]]


class Infer:
    """Parses ``infer`` requests, and answers them with a service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def parse(self, request: Request) -> Asked:
        """Parse a request, for a model that is served."""
        found = PATH.fullmatch(request.path)
        assert found
        target = parse_target(found[1], found[2])
        runner = self.service.registry.find(target.name, target.version)
        check_content_type(request.headers)
        length = parse_header_length(request.headers)
        content = codec.parse_request(request.body, length, self.service.most_lists)
        return Asked(found[1], target, runner, content)

    async def answer(self, asked: Asked, record: RequestRecord) -> Answered:
        """Answer a request."""
        name, target, runner, request = asked
        record.time_limit = min(record.time_limit, request.time_limit)
        check_model(asked)
        x = rows_of(runner, request)
        outputs = wanted_outputs(runner, request, mc=target.mc)
        manifest = runner.manifest
        head: dict[str, object] = {"model_name": name, "model_version": str(manifest.version)}
        if request.id is not None:
            head["id"] = request.id
        if target.mc:
            mc_query = parse_query(request, x, outputs, runner)
            answer = await self.service.uncertainty(mc_query, record)
            told = (
                ["passes", "seed"]
                if mc_query.tolerance is None
                else ["passes", "seed", "converged"]
            )
            head["parameters"] = {name: answer[name] for name in told}
        else:
            # Others cannot change the answer; these would change that of NAME.mc.
            for parameter in request.parameters.keys() & set(PARAMETERS):
                raise InputError(f"parameters.{parameter}", f"is allowed only for {name}{MC}")
            query = PredictQuery(x, manifest.name, manifest.version)
            answer = await self.service.predict(query, record)
        columns = [(each.name, column(runner, answer, each.name), each.binary) for each in outputs]
        return Answered(head, columns)


def write(answered: Answered) -> Response:
    """Write an answer."""
    content, length = codec.write_response(answered.head, answered.outputs)
    if length is None:
        return Response(200, content, [(b"content-type", JSON)])
    header_length = (HEADER_LENGTH, str(length).encode())
    return Response(200, content, [(b"content-type", b"application/octet-stream"), header_length])


def check_content_type(headers: Headers) -> None:
    """Raise HTTPException (415) for a content type that a foreign page may send unasked.

    A browser sends a page's request to another origin at once, and only then tells the page that it
    may not read the response, if its content type is that of a form, plain text, or left out (the
    Fetch standard, "CORS-safelisted request-header"). Clients that are no browsers, tritonclient
    among them, may leave it out, too; a browser says the page's origin.
    """
    content_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if content_type in SIMPLE_TYPES or (not content_type and b"origin" in headers):
        said = content_type.decode("latin-1") or "left out"
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the content type must be application/json or application/octet-stream, not {said!r}",
        )


def parse_header_length(headers: Headers) -> int | None:
    """Return the length of the JSON in front of the binary tensors; None without the header."""
    value = headers.get(HEADER_LENGTH)
    if value is None:
        return None
    if not re.fullmatch(rb"[0-9]{1,10}", value):
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, "Inference-Header-Content-Length must be a whole number"
        )
    return int(value)


def rows_of(runner: ModelRunner, request: InferRequest) -> Rows:
    """Return the model's input tensor as rows."""
    expected = runner.manifest.input
    for number, tensor in enumerate(request.inputs):
        if tensor.name != expected.name:
            raise InputError(
                f"inputs.{number}.name",
                f"must be {expected.name}, the one input, not {tensor.name[:100]!r}",
            )
    (tensor,) = request.inputs
    count, *rest = tensor.values.shape
    if rest not in (list(expected.shape), [runner.row_length]):
        raise InputError(
            "inputs.0.shape",
            f"must be {[-1, *expected.shape]}, not {list(tensor.values.shape)}",
        )
    return tensor.values.reshape(count, *expected.shape)


def check_model(asked: Asked) -> None:
    """Raise InputError if the body of a request names another model than its path."""
    name, _, runner, request = asked
    if request.model_name not in ("", name):
        said = codec.quote(request.model_name)
        raise InputError("model_name", f"must be {name}, as in the path, not {said}")
    version = str(runner.manifest.version)
    if request.model_version not in ("", version):
        said = codec.quote(request.model_version)
        raise InputError("model_version", f"must be {version}, which the path means, not {said}")


def wanted_outputs(runner: ModelRunner, request: InferRequest, *, mc: bool) -> list[WantedOutput]:
    """Return the outputs that a request names, or those that it gets by default."""
    names = [each.name for each in model_outputs(runner, mc=mc)]
    if request.outputs is None:
        left_out = {
            name
            for parameter, some in OPTIONAL.items()
            if request.parameters.get(parameter) is None
            for name in some
        }
        return [WantedOutput(name, request.binary) for name in names if name not in left_out]
    for number, output in enumerate(request.outputs):
        if output.name not in names:
            raise InputError(
                f"outputs.{number}.name",
                f"must be one of {', '.join(names)}, not {output.name[:100]!r}",
            )
    return request.outputs


def parse_query(
    request: InferRequest, x: Rows, outputs: list[WantedOutput], runner: ModelRunner
) -> Query:
    """Return the query of a request for some outputs of NAME.mc."""
    for name in request.parameters.keys() - set(PARAMETERS):
        raise InputError("parameters", f"allowed are {', '.join(PARAMETERS)}, not {name[:100]!r}")
    asked = UncertaintyRequest.model_validate({"inputs": [], **request.parameters})
    coverage = asked.coverage
    if coverage is None and any(each.name in OPTIONAL["coverage"] for each in outputs):
        coverage = COVERAGE
    manifest = runner.manifest
    return replace(
        asked.query(),
        inputs=x,
        model=manifest.name,
        version=manifest.version,
        coverage=coverage,
    )


def column(runner: ModelRunner, answer: Answer, name: str) -> Column:
    """Return the values of an output from an answer, where parts of them are nested."""
    values = answer.get(name)
    if name in OPTIONAL["interval"]:
        values = part(answer, "interval")[name]
    elif name in ("prediction_lower", "prediction_upper"):
        values = part(answer, "prediction_interval")[name.removeprefix("prediction_")]
    elif name == "prediction_set":
        assert isinstance(values, list)
        # [B, C]: tensors have no rows of different lengths.
        values = np.array([[label in row for label in runner.labels] for row in values])
    assert isinstance(values, np.ndarray | list)
    return values


def part(answer: Answer, name: str) -> dict[str, object]:
    """Return an object inside an answer."""
    found = answer[name]
    assert isinstance(found, dict)
    return found


def model_outputs(runner: ModelRunner, *, mc: bool) -> list[TensorDescription]:
    """Describe the outputs of a model, or of its Monte Carlo answer."""
    matrix = [-1, len(runner.labels)]
    columns: dict[str, tuple[str, list[int]]]
    if not mc:
        columns = {"probabilities" if runner.is_classifier else "values": ("FP32", matrix)}
        if runner.is_classifier:
            columns["labels"] = ("BYTES", [-1])
    else:
        columns = dict.fromkeys(("mean", "std"), ("FP32", matrix))
        if runner.is_classifier:
            columns["mutual_information"] = ("FP32", [-1])
        columns |= dict.fromkeys(OPTIONAL["interval"], ("FP32", matrix))
        if runner.manifest.conformal_scores is not None:
            in_set, *bounds = OPTIONAL["coverage"]
            if runner.is_classifier:
                columns[in_set] = ("BOOL", matrix)
            else:
                columns |= dict.fromkeys(bounds, ("FP32", matrix))
    return [
        TensorDescription(name=name, datatype=datatype, shape=shape)
        for name, (datatype, shape) in columns.items()
    ]
