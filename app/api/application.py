"""Build the ASGI application: routes, problem documents, OpenAPI and its page."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.api import body, problems
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
from app.errors import DebugOff
from app.service import Answer, Query, Service

REFERENCE = "#/components/schemas/{model}"
PROBLEMS = (400, 404, 413, 415, 422, 500)
# Of bodies that FastAPI neither parses nor writes.
DOCUMENTED: tuple[type[BaseModel], ...] = (
    PredictRequest,
    UncertaintyRequest,
    ClassPrediction,
    ValuePrediction,
    ClassUncertainty,
    ValueUncertainty,
    ClassDebug,
    ValueDebug,
    Problem,
)


def create(service: Service, *, debug: bool, max_body_bytes: int) -> FastAPI:
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
    # One thread: two runs at once would only take each other's core, and double the memory.
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown()

    async def run(work: Callable[[], Answer]) -> Response:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(worker, lambda: json_response(work()))

    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="dropserve",
        description="Predictions of networks with dropout, and how sure they are of them.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    problems.register(app)

    @app.post("/predict", **describe(PredictRequest, ClassPrediction, ValuePrediction))
    async def predict(request: Request) -> Response:
        """Predict rows in eval mode."""
        r = await body.read(request, PredictRequest, max_body_bytes)
        return await run(partial(service.predict, r.inputs, r.model, r.version))

    @app.post("/uncertainty", **describe(UncertaintyRequest, ClassUncertainty, ValueUncertainty))
    async def uncertainty(request: Request) -> Response:
        """Run train-mode passes of rows and answer with their statistics."""
        r = await body.read(request, UncertaintyRequest, max_body_bytes)
        return await run(partial(service.uncertainty, query(r)))

    @app.post("/debug/mc", **describe(UncertaintyRequest, ClassDebug, ValueDebug))
    async def debug_mc(request: Request) -> Response:
        """Run train-mode passes of rows and show them. Off unless DROPSERVE_DEBUG=1."""
        if not debug:
            raise DebugOff("the debug endpoint is off; DROPSERVE_DEBUG=1 switches it on")
        r = await body.read(request, UncertaintyRequest, max_body_bytes)
        return await run(partial(service.debug, query(r)))

    @app.get("/health/live", response_model=Alive)
    async def live() -> Response:
        """Tell that the process answers."""
        return json_response({"status": "alive"})

    @app.get("/health/ready", response_model=Ready)
    async def ready() -> Response:
        """Tell that requests are taken, by which models and on which device."""
        return json_response({"status": "ready"} | service.state())

    # FastAPI does not parse these routes' bodies, so it knows only of the answers' models.
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign] # as FastAPI documents
    return app


def json_response(answer: Answer) -> Response:
    """Write an answer; arrays are written as they are."""
    return Response(
        orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )


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


def describe(request: type[BaseModel], *answers: type[BaseModel]) -> dict[str, Any]:
    """Document a route whose body FastAPI does not parse."""
    problem = {"content": {problems.MEDIA_TYPE: {"schema": reference(Problem)}}}
    return {
        "responses": {
            200: {
                "content": {"application/json": {"schema": {"anyOf": [*map(reference, answers)]}}}
            },
            **{status: problem | {"description": HTTPStatus(status).phrase} for status in PROBLEMS},
        },
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": reference(request)}},
            }
        },
    }


def reference(model: type[BaseModel]) -> dict[str, str]:
    """Point to a model's schema."""
    return {"$ref": REFERENCE.format(model=model.__name__)}


def openapi(app: FastAPI) -> dict[str, Any]:
    """Write the OpenAPI document, the schemas of unparsed bodies included."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        _, definitions = models_json_schema(
            [(model, "validation") for model in DOCUMENTED], ref_template=REFERENCE
        )
        document["components"]["schemas"] |= definitions["$defs"]
        app.openapi_schema = document
    return app.openapi_schema
