"""Build the ASGI application: endpoints, health routes, OpenAPI and its page."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.api import problems
from app.api.endpoint import Endpoint
from app.api.schemas import (
    Alive,
    ClassDebug,
    ClassPrediction,
    ClassUncertainty,
    PredictRequest,
    Problem,
    Ready,
    UncertaintyRequest,
    ValueDebug,
    ValuePrediction,
    ValueUncertainty,
)
from app.service import Answer, Query, Service, Steps

REFERENCE = "#/components/schemas/{model}"
PROBLEMS = (400, 404, 413, 415, 422, 500)
# What the endpoints answer, by path.
ANSWERS: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "/predict": (ClassPrediction, ValuePrediction),
    "/uncertainty": (ClassUncertainty, ValueUncertainty),
    "/debug/mc": (ClassDebug, ValueDebug),
}


class Application:
    """The endpoints, and FastAPI for everything else.

    Parameters
    ----------
    endpoints
        By path; each takes POST.
    rest
        Knows the endpoints too, so that it refuses other methods.
    """

    def __init__(self, endpoints: Mapping[str, Endpoint[Any]], rest: FastAPI) -> None:
        self.endpoints = endpoints
        self.rest = rest
        self.openapi = rest.openapi

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a request, or take part in starting and stopping."""
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self.endpoints.get(scope["path"])
            if endpoint is not None:
                return endpoint(scope, receive, send)
        return self.rest(scope, receive, send)


def create(service: Service, *, debug: bool, max_body_bytes: int) -> Application:
    """Return the application that answers with ``service``.

    Parameters
    ----------
    service
        The models.
    debug
        Whether ``POST /debug/mc`` answers.
    max_body_bytes
        Longest request body.
    """

    def predict(r: PredictRequest) -> Steps:
        """Predict rows in eval mode."""
        return service.predict_steps(r.inputs, r.model, r.version)

    def uncertainty(r: UncertaintyRequest) -> Steps:
        """Run train-mode passes of rows and answer with their statistics."""
        return service.uncertainty_steps(query(r))

    def debug_mc(r: UncertaintyRequest) -> Steps:
        """Run train-mode passes of rows and show them. Off unless DROPSERVE_DEBUG=1."""
        return service.debug_steps(query(r))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    rest = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="dropserve",
        description="Predictions of networks with dropout, and how sure they are of them.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    problems.register(rest)
    endpoints: dict[str, Endpoint[Any]] = {
        "/predict": Endpoint(PredictRequest, predict, service, max_body_bytes),
        "/uncertainty": Endpoint(UncertaintyRequest, uncertainty, service, max_body_bytes),
        "/debug/mc": Endpoint(UncertaintyRequest, debug_mc, service, max_body_bytes),
    }
    # FastAPI neither parses nor writes the endpoints' bodies, so their documentation is ours.
    paths = {path: {"post": describe(path, endpoint)} for path, endpoint in endpoints.items()}
    rest.openapi = lambda: openapi(rest, paths)  # type: ignore[method-assign] # as FastAPI documents

    @rest.get("/health/live", response_model=Alive)
    async def live() -> Response:
        """Tell that the process answers."""
        return json_response({"status": "alive"})

    @rest.get("/health/ready", response_model=Ready)
    async def ready() -> Response:
        """Tell that requests are taken, by which models and on which device."""
        return json_response({"status": "ready"} | service.state())

    if not debug:
        del endpoints["/debug/mc"]

        @rest.post("/debug/mc", include_in_schema=False)
        async def debug_off() -> Response:
            raise HTTPException(
                HTTPStatus.NOT_FOUND, "the debug endpoint is off; DROPSERVE_DEBUG=1 switches it on"
            )

    rest.router.routes += [
        Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()
    ]
    return Application(endpoints, rest)


def json_response(answer: Answer) -> Response:
    """Write a small answer."""
    return Response(orjson.dumps(answer), media_type="application/json")


def query(request: UncertaintyRequest) -> Query:
    """Hand a request to the service without its HTTP origin."""
    return Query(
        inputs=request.inputs,
        model=request.model,
        version=request.version,
        passes=request.passes,
        seed=request.seed,
        interval=request.interval,
    )


def describe(path: str, endpoint: Endpoint[Any]) -> dict[str, Any]:
    """Document an endpoint."""
    problem = {"content": {problems.MEDIA_TYPE: {"schema": reference(Problem)}}}
    answers = {"anyOf": [reference(answer) for answer in ANSWERS[path]]}
    name = endpoint.steps.__name__
    return {
        "summary": name.replace("_", " ").capitalize(),
        "description": inspect.getdoc(endpoint.steps),
        "operationId": name,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": reference(endpoint.request)}},
        },
        "responses": {
            "200": {
                "description": HTTPStatus.OK.phrase,
                "content": {"application/json": {"schema": answers}},
            },
            **{
                str(status): problem | {"description": HTTPStatus(status).phrase}
                for status in PROBLEMS
            },
        },
    }


def reference(model: type[BaseModel]) -> dict[str, str]:
    """Point to a model's schema."""
    return {"$ref": REFERENCE.format(model=model.__name__)}


def openapi(app: FastAPI, paths: Mapping[str, Any]) -> dict[str, Any]:
    """Write the OpenAPI document, with the paths that FastAPI does not know."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        documented: list[type[BaseModel]] = [PredictRequest, UncertaintyRequest, Problem]
        for answers in ANSWERS.values():
            documented += answers
        _, definitions = models_json_schema(
            [(model, "validation") for model in documented], ref_template=REFERENCE
        )
        document["components"]["schemas"] |= definitions["$defs"]
        document["paths"] = dict(paths) | document["paths"]
        app.openapi_schema = document
    return app.openapi_schema
