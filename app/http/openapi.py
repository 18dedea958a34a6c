"""The OpenAPI document: FastAPI's, plus the parts that FastAPI cannot know.

FastAPI neither parses nor writes the bodies of the endpoints, and knows neither the served models
nor how requests are refused.
"""

import copy
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dropserve.app.http import problems, v1
from dropserve.app.http.schemas import (
    ClassDebug,
    ClassPrediction,
    ClassUncertainty,
    InferAnswer,
    InferDocument,
    PredictionAnswer,
    PredictionRequest,
    PredictRequest,
    Problem,
    ProtocolError,
    UncertaintyRequest,
    ValueDebug,
    ValuePrediction,
    ValueUncertainty,
)
from dropserve.app.inference.rows import BEYOND
from dropserve.app.inference.runner import ModelRunner
from dropserve.app.inference.service import Service
from dropserve.export.bundle import NAME_PATTERN, RESERVED_SUFFIX

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
# Statuses of refusals: of any request, of one with a body, of one that needs a key.
REFUSED = (400, 404, 421, 500, 503)
REFUSED_BODY = (408, 413, 415, 422, 504)
REFUSED_KEY = (401, 403)
VERSION = {"type": "string", "pattern": "^[1-9][0-9]{0,8}$"}


class Documented(NamedTuple):
    """The documentation of an endpoint."""

    name: str
    description: str
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
        "Run train-mode passes of rows and return their statistics.",
        UncertaintyRequest,
        (ClassUncertainty, ValueUncertainty),
    ),
    "/debug/mc": Documented(
        "debug_mc",
        "Run train-mode passes of rows and return them. Off unless DROPSERVE_DEBUG=1.",
        UncertaintyRequest,
        (ClassDebug, ValueDebug),
    ),
    "/v2/models/{name}/infer": Documented(
        "infer",
        "Predict rows; for NAME.mc return mean and standard deviation of train-mode passes.",
        InferDocument,
        (InferAnswer,),
    ),
    "/v2/models/{name}/versions/{version}/infer": Documented(
        "infer_version", "The same of one version.", InferDocument, (InferAnswer,)
    ),
    v1.ROUTE: Documented(
        "predict_v1",
        "Predict rows in eval mode, by KServe's first protocol.",
        PredictionRequest,
        (PredictionAnswer,),
    ),
}


def document(app: FastAPI, service: Service, *, keys: bool) -> Schema:
    """Return the document for the present models.

    Parameters
    ----------
    app
        FastAPI's application, with the other paths.
    service
        The service whose models and limits are documented.
    keys
        Whether requests need an API key.
    """
    if app.openapi_schema is None:
        app.openapi_schema = constant_part(app, keys=keys)
    written = copy.deepcopy(app.openapi_schema)
    schemas = written["components"]["schemas"]
    newest = [service.registry.find(name, None) for name in service.registry.served]
    for request in (PredictRequest, UncertaintyRequest):
        schema = schemas[request.__name__]
        if "passes" in schema["properties"]:
            schema["properties"]["passes"]["maximum"] = service.max_passes
        if newest:
            schemas[request.__name__] = {
                "description": schema.pop("description"),
                "anyOf": [schema_for(schema, each, service, len(newest)) for each in newest],
            }
    names = {
        "/v1/models": [model.manifest.name for model in newest],
        "/v2/models": [name for model in newest for name in (model.manifest.name, mc(model))],
    }
    for path, methods in written["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "name" and newest and path[:10] in names:
                    parameter["schema"] = {"type": "string", "enum": names[path[:10]]}
    return written


def constant_part(app: FastAPI, *, keys: bool) -> Schema:
    """Return the part that does not depend on the models."""
    written = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        servers=app.servers,
    )
    models: list[type[BaseModel]] = [Problem, ProtocolError]
    for each in ENDPOINTS.values():
        models += [each.request, *each.answers]
    _, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], ref_template=REFERENCE
    )
    components = written["components"]
    components["schemas"].update(definitions["$defs"])
    # FastAPI's schemas of errors, which this service does not use.
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    endpoints = {path: {"post": operation_of(path, each)} for path, each in ENDPOINTS.items()}
    written["paths"] = endpoints | written["paths"]
    for path, methods in written["paths"].items():
        for operation in methods.values():
            add_refusals(path, operation, keys=keys)
            for parameter in operation.get("parameters", ()):
                pattern = {"type": "string", "pattern": NAME_PATTERN}
                parameter["schema"] = VERSION if parameter["name"] == "version" else pattern
    if keys:
        components["securitySchemes"] = KEYS
    return written


def schema_for(schema: Schema, model: ModelRunner, service: Service, served: int) -> Schema:
    """Return the schema of a request to one model."""
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
    versions = [*service.registry.versions(manifest.name)]
    properties["version"]["anyOf"] = [{"type": "integer", "enum": versions}, {"type": "null"}]
    return found | {"title": manifest.name}


def array(items: Schema, length: int) -> Schema:
    """Describe an array of a given length."""
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


def mc(model: ModelRunner) -> str:
    """Return the name of a model's Monte Carlo answer."""
    return model.manifest.name + RESERVED_SUFFIX


def operation_of(path: str, endpoint: Documented) -> Schema:
    """Document an endpoint."""
    answers = {"anyOf": [reference(answer) for answer in endpoint.answers]}
    ok: Schema = {"application/json": {"schema": answers}}
    if endpoint.request is InferDocument:
        ok["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": endpoint.name.replace("_", " ").capitalize(),
        "description": endpoint.description,
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


def add_refusals(path: str, operation: Schema, *, keys: bool) -> None:
    """Document the refusals of an operation."""
    protocol = path.startswith(problems.PROTOCOLS)
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
    # FastAPI's own form of 422, which is never returned.
    responses.pop("422", None)
    for status in statuses:
        described = {"description": HTTPStatus(status).phrase, "content": error}
        responses.setdefault(str(status), described)


def reference(model: type[BaseModel]) -> Mapping[str, str]:
    """Return a reference to a schema."""
    return {"$ref": REFERENCE.format(model=model.__name__)}
