"""Build the HTTP application: the endpoints, and FastAPI with the rest."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Response
from fastapi import Request as FastAPIRequest
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route

import dropserve
from dropserve.app.http import bodies, console, openapi, problems, v1
from dropserve.app.http.bodies import Request, json_response, parse_query, starlette_response
from dropserve.app.http.context import Context
from dropserve.app.http.handler import Application, Endpoint
from dropserve.app.http.problems import RECORD
from dropserve.app.http.schemas import (
    Alive,
    Live,
    MasksRequest,
    PredictRequest,
    Readiness,
    Ready,
    UncertaintyRequest,
)
from dropserve.app.http.v2 import infer, repository, routes, statistics
from dropserve.app.inference.admission import Admission
from dropserve.app.inference.registry import VersionStatus
from dropserve.app.inference.service import Service
from dropserve.app.observability.metrics import Counts
from dropserve.app.observability.record import RequestRecord
from dropserve.app.security.api_keys import Scope as KeyScope

# Number of bodies of maximum length that may be held at a time. Parsed numbers take about ten times
# the memory of their JSON text.
LONGEST_BODIES = 8
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

DEBUG_ENDPOINTS = ("/debug/mc", "/console/masks")


def create(
    service: Service,
    *,
    debug: bool,
    max_body_bytes: int,
    unread: Admission,
    context: Context,
    load: repository.Change,
    unload: repository.Change,
    index: Callable[[], Awaitable[list[VersionStatus]]],
    metrics: Callable[[], Awaitable[bytes]],
    counts: Callable[[], Awaitable[Counts]],
    startup: Callable[[], None],
    shutdown: Callable[[], Awaitable[None]],
    origins: tuple[str, ...] = (),
) -> Application:
    """Return the application of a service.

    Parameters
    ----------
    service
        Answers the requests.
    debug
        Whether ``POST /debug/mc`` is on.
    max_body_bytes
        Longest request body.
    unread
        Accounts for the bytes of long responses that clients have yet to read.
    context
        Opens the record of each request.
    load, unload
        Have all workers load or unload a model.
    index
        Lists all versions.
    metrics
        Writes the metrics of all workers.
    counts
        Returns the counts of all workers.
    startup, shutdown
        Called on the event loop before the first request and after the last.
    origins
        Origins whose pages may send requests; ``*``: any.
    """
    held_bodies = Admission(LONGEST_BODIES * max_body_bytes, "bytes of bodies")

    def endpoint(
        route: str,
        key_scope: KeyScope,
        parse: Callable[[Request], Asked],
        ask: Callable[[Asked, RequestRecord], Awaitable[Answered]],
        write: Callable[[Answered], bodies.Response],
    ) -> Endpoint[Asked, Answered]:
        return Endpoint(
            route,
            key_scope,
            parse,
            ask,
            write,
            context=context,
            admission=service.admission,
            max_body_bytes=max_body_bytes,
            bodies=held_bodies,
            unread=unread,
            executor=service.executor,
        )

    most = service.most_lists
    parse_predict = partial(parse_query, PredictRequest, PredictRequest.predict_query, most)
    parse_mc = partial(parse_query, UncertaintyRequest, UncertaintyRequest.query, most)
    parse_masks = partial(parse_query, MasksRequest, MasksRequest.query, most)
    endpoints: dict[str, Endpoint[Any, Any]] = {
        each.route: each
        for each in (
            endpoint("/predict", "predict", parse_predict, service.predict, json_response),
            endpoint("/uncertainty", "predict", parse_mc, service.uncertainty, json_response),
            endpoint(DEBUG_ENDPOINTS[0], "debug", parse_mc, service.debug, json_response),
            endpoint(DEBUG_ENDPOINTS[1], "debug", parse_masks, service.masks, json_response),
        )
    }
    v2 = infer.Infer(service)
    infer_endpoint = endpoint(infer.ROUTES[0], "predict", v2.parse, v2.answer, infer.write)
    parse_v1, ask_v1 = partial(v1.parse, most), partial(v1.answer, service)
    v1_endpoint = endpoint(v1.ROUTE, "predict", parse_v1, ask_v1, v1.write)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        startup()
        yield
        await shutdown()

    rest = FastAPIOffline(
        # Their links would be absolute, and miss the prefix that a proxy may strip.
        docs_url=None,
        redoc_url=None,
        servers=[{"url": "."}],
        title="dropserve",
        version=dropserve.__version__,
        description="Predictions of networks with dropout, and how sure they are of them.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    problems.register(rest)
    rest.openapi = lambda: openapi.document(  # type: ignore[method-assign] # as FastAPI documents
        rest, service, keys=context.keys is not None
    )
    patterns: list[tuple[re.Pattern[str], Endpoint[Any, Any]]] = [
        (infer.PATH, infer_endpoint),
        (v1.PATH, v1_endpoint),
    ]
    application = Application(endpoints, patterns, rest, context, origins)

    @rest.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Return the page of the documentation."""
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="dropserve",
            swagger_js_url="static-offline-docs/swagger-ui-bundle.js",
            swagger_css_url="static-offline-docs/swagger-ui.css",
            swagger_favicon_url="console/icon.svg",
        )

    def guard(scope: KeyScope | None) -> Any:
        # FastAPI would call a plain function in a thread.
        async def check(request: FastAPIRequest) -> None:
            context.check(request.scope[RECORD], dict(request.scope["headers"]), scope)

        return Depends(check)

    def is_ready() -> bool:
        return not application.draining and bool(service.registry.served)

    @rest.get("/health/live", response_model=Alive)
    async def live() -> Response:
        """Report that the process responds."""
        return starlette_response({"status": "alive"})

    @rest.get("/health/ready", response_model=Ready)
    async def ready() -> Response:
        """Report whether requests are accepted, for which models and on which device."""
        if not is_ready():
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the service is draining" if application.draining else "no model is served",
            )
        return starlette_response({"status": "ready"} | service.status())

    @rest.get("/v2/health/live", response_model=Live)
    async def protocol_live() -> Response:
        """Report that the server responds."""
        return starlette_response({"live": True})

    @rest.get("/v2/health/ready", response_model=Readiness)
    async def protocol_ready() -> Response:
        """Report whether requests are accepted."""
        return starlette_response({"ready": is_ready()}, 200 if is_ready() else 503)

    @rest.get("/metrics", dependencies=[guard(None)], response_class=Response)
    async def exposition() -> Response:
        """Return the metrics of all workers in Prometheus' text format."""
        return Response(await metrics(), media_type=CONTENT_TYPE_LATEST)

    rest.include_router(statistics.router(service.registry, counts, guard("predict")))
    rest.include_router(routes.router(service, guard("predict")))
    rest.include_router(
        repository.router(
            service.registry, load=load, unload=unload, index=index, guard=guard("admin")
        )
    )
    files = console.Files()
    rest.include_router(console.router(files, service, context, guard("predict"), debug=debug))
    if not debug:
        for path in DEBUG_ENDPOINTS:
            del endpoints[path]

        @rest.post(DEBUG_ENDPOINTS[0], include_in_schema=False)
        @rest.post(DEBUG_ENDPOINTS[1], include_in_schema=False)
        async def debug_off() -> Response:
            raise HTTPException(
                HTTPStatus.NOT_FOUND, "the debug endpoint is off; DROPSERVE_DEBUG=1 switches it on"
            )

    rest.router.routes += [
        Route(path, each, methods=["POST"])
        for path, each in (
            endpoints | dict.fromkeys(infer.ROUTES, infer_endpoint) | {v1.ROUTE: v1_endpoint}
        ).items()
    ]
    # Behind the route of predictions, whose path is like that of a model.
    rest.include_router(v1.router(service, guard("predict")))
    rest.mount("/console", files)
    return application
