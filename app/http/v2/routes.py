"""The Open Inference Protocol v2: what is served, and ``infer``, as KServe, Triton and MLServer do.

A model takes one input tensor, under the name that its manifest has for it. Beside each model NAME
there is NAME.mc, which answers mean and standard deviation of train-mode passes.

References
----------
https://github.com/kserve/open-inference-protocol, ``specification/protocol/inference_rest.md``
"""

import re
from collections.abc import Sequence
from http import HTTPStatus
from importlib import metadata
from typing import NamedTuple

import numpy as np
from fastapi import APIRouter
from fastapi.params import Depends as Dependency
from numpy.typing import NDArray
from starlette.types import Scope

from dropserve.app.errors import InputError, UnknownModel
from dropserve.app.http import responses
from dropserve.app.http.context import Headers
from dropserve.app.http.problems import BodyError
from dropserve.app.http.responses import Reply
from dropserve.app.http.schemas import (
    ModelDescription,
    ModelReadiness,
    ServerDescription,
    TensorDescription,
    UncertaintyRequest,
)
from dropserve.app.http.v2 import codec
from dropserve.app.http.v2.codec import InferRequest, Wanted
from dropserve.app.inference.batch import Rows
from dropserve.app.inference.runner import Model
from dropserve.app.inference.service import Query, Service, Steps
from dropserve.export.bundle import RESERVED_SUFFIX as MC

PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
LENGTH = b"inference-header-content-length"
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ["binary_tensor_data", "model_repository"]
# What may be asked of NAME.mc.
PARAMETERS = ("passes", "seed", "masks", "tolerance")

Column = NDArray[np.float32] | Sequence[str]


class Target(NamedTuple):
    """What a request is about."""

    name: str
    version: int | None
    mc: bool


class Written(NamedTuple):
    """The body of an answer, and the length of its JSON where tensors follow."""

    content: bytes
    length: int | None


def target(name: str, version: str | None) -> Target:
    """Read a model's name and version as they stand in a path."""
    number = None if version is None else version_number(version)
    return Target(name.removesuffix(MC), number, name.endswith(MC))


def version_number(version: str) -> int:
    """Read a version as it stands in a path."""
    if not re.fullmatch("[0-9]{1,9}", version):
        raise UnknownModel(f"no version {version[:20]!r}: versions are whole numbers")
    return int(version)


def infer(
    service: Service, scope: Scope, headers: Headers, body: bytes | bytearray
) -> Steps[Written]:
    """Answer the protocol's ``infer``."""
    found = PATH.fullmatch(scope["path"])
    assert found
    asked = target(found[1], found[2])
    model = service.models.find(asked.name, asked.version)
    request = codec.read(body, header_length(headers))
    x = rows(model, request)
    outputs = wanted(model, asked.mc, request)
    head: dict[str, object] = {
        "model_name": found[1],
        "model_version": str(model.manifest.version),
    }
    if request.id is not None:
        head["id"] = request.id
    if asked.mc:
        query = read_query(request, x, model)
        answer = yield from service.uncertainty_steps(query)
        told = ("passes", "seed") if query.tolerance is None else ("passes", "seed", "converged")
        head["parameters"] = {name: answer[name] for name in told}
    else:
        if request.parameters:
            raise InputError("parameters", f"none are allowed but for {asked.name}{MC}")
        manifest = model.manifest
        answer = yield from service.predict_steps(x, manifest.name, manifest.version)
    columns = [(each.name, column(answer[each.name]), each.binary) for each in outputs]
    return Written(*codec.write(head, columns))


def write(written: Written) -> Reply:
    """Put an answer into a reply."""
    if written.length is None:
        return responses.json(200, written.content)
    length = (LENGTH, str(written.length).encode())
    return Reply(200, written.content, [(b"content-type", b"application/octet-stream"), length])


def header_length(headers: Headers) -> int | None:
    """Read how long the JSON is that tensors follow."""
    value = headers.get(LENGTH)
    if value is None:
        return None
    if not re.fullmatch(rb"[0-9]{1,10}", value):
        raise BodyError(
            HTTPStatus.BAD_REQUEST, "Inference-Header-Content-Length must be a whole number"
        )
    return int(value)


def rows(model: Model, request: InferRequest) -> Rows:
    """Find the model's input in a request, as rows."""
    expected = model.manifest.input
    for number, tensor in enumerate(request.inputs):
        if tensor.name != expected.name:
            raise InputError(
                f"inputs.{number}.name",
                f"must be {expected.name}, the one input, not {tensor.name[:100]!r}",
            )
    (tensor,) = request.inputs
    count, *rest = tensor.values.shape
    flat = [model.row_length]
    if rest not in (list(expected.shape), flat):
        raise InputError(
            "inputs.0.shape",
            f"must be {[-1, *expected.shape]}, not {list(tensor.values.shape)}",
        )
    return tensor.values.reshape(count, *expected.shape)


def wanted(model: Model, mc: bool, request: InferRequest) -> list[Wanted]:
    """List the outputs that a request asks for, all where it does not say."""
    there = [each.name for each in outputs_of(model, mc)]
    if request.outputs is None:
        return [Wanted(name, request.binary) for name in there]
    for number, output in enumerate(request.outputs):
        if output.name not in there:
            raise InputError(
                f"outputs.{number}.name",
                f"must be one of {', '.join(there)}, not {output.name[:100]!r}",
            )
    return request.outputs


def read_query(request: InferRequest, x: Rows, model: Model) -> Query:
    """Read what is asked of NAME.mc."""
    for name in request.parameters.keys() - set(PARAMETERS):
        raise InputError("parameters", f"allowed are {', '.join(PARAMETERS)}, not {name[:100]!r}")
    asked = UncertaintyRequest.model_validate({"inputs": [], **request.parameters})
    return Query(
        x,
        model.manifest.name,
        model.manifest.version,
        asked.passes,
        asked.seed,
        asked.interval,
        asked.masks,
        asked.tolerance,
    )


def column(values: object) -> Column:
    """Say that what an answer holds under an output's name is an array, or labels."""
    assert isinstance(values, np.ndarray | list)
    return values


def outputs_of(model: Model, mc: bool) -> list[TensorDescription]:
    """Describe the outputs of a model, or of its uncertainty."""
    width = len(model.manifest.outputs.labels)
    matrix = [-1, width]
    if mc:
        columns = {"mean": matrix, "std": matrix}
        if model.classification:
            columns["mutual_information"] = [-1]
    else:
        columns = {"probabilities" if model.classification else "values": matrix}
    found = [TensorDescription(name=n, datatype="FP32", shape=s) for n, s in columns.items()]
    if model.classification and not mc:
        found.append(TensorDescription(name="labels", datatype="BYTES", shape=[-1]))
    return found


def router(service: Service, guard: Dependency) -> APIRouter:
    """Return the routes that say what is served."""
    routes = APIRouter(prefix="/v2", dependencies=[guard])

    @routes.get("")
    async def server() -> ServerDescription:
        """Describe the server."""
        return ServerDescription(
            name="dropserve", version=metadata.version("dropserve"), extensions=EXTENSIONS
        )

    def describe(name: str, version: str | None) -> ModelDescription:
        asked = target(name, version)
        model = service.models.find(asked.name, asked.version)
        versions = service.models.versions(asked.name)
        expected = model.manifest.input
        return ModelDescription(
            name=name,
            versions=[str(each) for each in versions],
            platform=PLATFORM,
            inputs=[
                TensorDescription(name=expected.name, datatype="FP32", shape=[-1, *expected.shape])
            ],
            outputs=outputs_of(model, asked.mc),
        )

    def ready(name: str, version: str | None) -> ModelReadiness:
        asked = target(name, version)
        service.models.find(asked.name, asked.version)
        return ModelReadiness(name=name, ready=True)

    @routes.get("/models/{name}")
    async def model(name: str) -> ModelDescription:
        """Describe a model, its newest version."""
        return describe(name, None)

    @routes.get("/models/{name}/versions/{version}")
    async def model_version(name: str, version: str) -> ModelDescription:
        """Describe a version of a model."""
        return describe(name, version)

    @routes.get("/models/{name}/ready")
    async def model_ready(name: str) -> ModelReadiness:
        """Tell that a model is served."""
        return ready(name, None)

    @routes.get("/models/{name}/versions/{version}/ready")
    async def model_version_ready(name: str, version: str) -> ModelReadiness:
        """Tell that a version of a model is served."""
        return ready(name, version)

    return routes
