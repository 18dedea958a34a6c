"""Write the OpenAPI document: FastAPI's, and what FastAPI does not know.

It neither parses nor writes the endpoints' bodies, and knows neither what is served at the moment
nor how a request may be refused on its way in.
"""

import copy
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dropserve.app.http import problems
from dropserve.app.http.schemas import (
    ClassDebug,
    ClassPrediction,
    ClassUncertainty,
    InferAnswer,
    InferDocument,
    PredictRequest,
    Problem,
    ProtocolError,
    UncertaintyRequest,
    ValueDebug,
    ValuePrediction,
    ValueUncertainty,
)
from dropserve.app.inference.rows import BEYOND
from dropserve.app.inference.runner import Model
from dropserve.app.inference.service import Service
from dropserve.export.bundle import NAME_PATTERN, RESERVED_SUFFIX

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
# How requests may be refused: all of them, those with a body, and those that need a key.
REFUSED = (400, 404, 500, 503)
REFUSED_BODY = (408, 413, 415, 422, 504)
REFUSED_KEY = (401, 403)
VERSION = {"type": "string", "pattern": "^[1-9][0-9]{0,8}$"}


class Documented(NamedTuple):
    """An endpoint, for those who ask."""

    name: str
    says: str
    request: type[BaseModel]
    answers: Sequence[type[BaseModel]]


ENDPOINTS = {
    "/predict": Documented(
        "predict",
        "Predict rows in eval mode.",
        PredictRequest,
        (ClassPrediction, ValuePrediction),
    ),
    "/uncertainty": Documented(
        "uncertainty",
        "Run train-mode passes of rows and answer with their statistics.",
        UncertaintyRequest,
        (ClassUncertainty, ValueUncertainty),
    ),
    "/debug/mc": Documented(
        "debug_mc",
        "Run train-mode passes of rows and show them. Off unless DROPSERVE_DEBUG=1.",
        UncertaintyRequest,
        (ClassDebug, ValueDebug),
    ),
    "/v2/models/{name}/infer": Documented(
        "infer",
        "Predict rows; for NAME.mc answer mean and standard deviation of train-mode passes.",
        InferDocument,
        (InferAnswer,),
    ),
    "/v2/models/{name}/versions/{version}/infer": Documented(
        "infer_version", "The same of one version.", InferDocument, (InferAnswer,)
    ),
}


def document(app: FastAPI, service: Service, *, keys: bool) -> Schema:
    """Write the document, as things are at the moment.

    Parameters
    ----------
    app
        Knows the paths that are no endpoints.
    service
        What it serves and allows is what is documented.
    keys
        Whether requests need one.
    """
    if app.openapi_schema is None:
        app.openapi_schema = lasting(app, keys=keys)
    written = copy.deepcopy(app.openapi_schema)
    schemas = written["components"]["schemas"]
    newest = [service.models.find(name, None) for name in service.models.served]
    for request in (PredictRequest, UncertaintyRequest):
        schema = schemas[request.__name__]
        if "passes" in schema["properties"]:
            schema["properties"]["passes"]["maximum"] = service.max_passes
        if newest:
            schemas[request.__name__] = {
                "description": schema.pop("description"),
                "anyOf": [of_model(schema, each, service, len(newest)) for each in newest],
            }
    names = [name for model in newest for name in (model.manifest.name, mc(model))]
    for path, methods in written["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "name" and names and path.startswith("/v2/models"):
                    parameter["schema"] = {"type": "string", "enum": names}
    return written


def lasting(app: FastAPI, *, keys: bool) -> Schema:
    """Write what does not depend on what is served."""
    written = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    models: list[type[BaseModel]] = [Problem, ProtocolError]
    for each in ENDPOINTS.values():
        models += [each.request, *each.answers]
    _, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], ref_template=REFERENCE
    )
    components = written["components"]
    components["schemas"].update(definitions["$defs"])
    # Ours are other documents.
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    endpoints = {path: {"post": describe(path, each)} for path, each in ENDPOINTS.items()}
    written["paths"] = endpoints | written["paths"]
    for path, methods in written["paths"].items():
        for operation in methods.values():
            refuse(path, operation, keys=keys)
            for parameter in operation.get("parameters", ()):
                pattern = {"type": "string", "pattern": NAME_PATTERN}
                parameter["schema"] = VERSION if parameter["name"] == "version" else pattern
    if keys:
        components["securitySchemes"] = KEYS
    return written


def of_model(schema: Schema, model: Model, service: Service, served: int) -> Schema:
    """Say what a request to one model is."""
    manifest = model.manifest
    number: Schema = {"type": "number", "exclusiveMinimum": -BEYOND, "exclusiveMaximum": BEYOND}
    nested = number
    for length in reversed(manifest.input.shape):
        nested = array(nested, length)
    flat = array(number, model.row_length)
    row = flat if len(manifest.input.shape) == 1 else {"anyOf": [flat, nested]}
    found = copy.deepcopy(schema)
    properties = found["properties"]
    properties["inputs"] |= {"items": row, "minItems": 1, "maxItems": service.max_rows}
    properties["inputs"]["examples"] = [[[0.0] * model.row_length]]
    name: Schema = {"type": "string", "enum": [manifest.name]}
    properties["model"] |= {"anyOf": [name] if served > 1 else [name, {"type": "null"}]}
    if served > 1:
        properties["model"].pop("default", None)
        found["required"] = [*found["required"], "model"]
    versions = [*service.models.versions(manifest.name)]
    properties["version"]["anyOf"] = [{"type": "integer", "enum": versions}, {"type": "null"}]
    return found | {"title": manifest.name}


def array(items: Schema, length: int) -> Schema:
    """Describe an array of some length."""
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


def mc(model: Model) -> str:
    """Return the name of a model's uncertainty."""
    return model.manifest.name + RESERVED_SUFFIX


def describe(path: str, endpoint: Documented) -> Schema:
    """Document an endpoint."""
    answers = {"anyOf": [reference(answer) for answer in endpoint.answers]}
    ok: Schema = {"application/json": {"schema": answers}}
    if path.startswith(problems.PROTOCOL):
        ok["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": endpoint.name.replace("_", " ").capitalize(),
        "description": endpoint.says,
        "operationId": endpoint.name,
        "parameters": [
            {"name": name, "in": "path", "required": True}
            for name in ("name", "version")
            if f"{{{name}}}" in path
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": reference(endpoint.request)}},
        },
        "responses": {"200": {"description": HTTPStatus.OK.phrase, "content": ok}},
    }


def refuse(path: str, operation: Schema, *, keys: bool) -> None:
    """Document how an operation refuses."""
    protocol = path.startswith(problems.PROTOCOL)
    error = (
        {"application/json": {"schema": reference(ProtocolError)}}
        if protocol
        else {problems.MEDIA_TYPE: {"schema": reference(Problem)}}
    )
    statuses = [*REFUSED]
    if "requestBody" in operation:
        statuses += REFUSED_BODY
    if keys and "/health/" not in path:
        statuses += REFUSED_KEY
        operation["security"] = [{name: []} for name in KEYS]
    responses: Schema = operation["responses"]
    # FastAPI's own, in a form that nothing here answers.
    responses.pop("422", None)
    for status in statuses:
        described = {"description": HTTPStatus(status).phrase, "content": error}
        responses.setdefault(str(status), described)


def reference(model: type[BaseModel]) -> Mapping[str, str]:
    """Point to a model's schema."""
    return {"$ref": REFERENCE.format(model=model.__name__)}
