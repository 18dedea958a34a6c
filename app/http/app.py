"""Build the ASGI application: endpoints, everything else by FastAPI, and the way in for all."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Depends, FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.app.errors import Overloaded
from dropserve.app.http import console, openapi, problems, request_body, responses
from dropserve.app.http.context import Gate, Headers
from dropserve.app.http.handler import CLIENT_LEFT, LONGEST_BODIES, Endpoint
from dropserve.app.http.schemas import (
    Alive,
    Live,
    MasksRequest,
    PredictRequest,
    Readiness,
    Ready,
    UncertaintyRequest,
)
from dropserve.app.http.v2 import repository, routes
from dropserve.app.inference.service import Answer, Query, Queue, Service, Steps
from dropserve.app.processes.ipc import Group
from dropserve.app.security.api_keys import Scope as KeyScope

HEALTH = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
INFER = ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")
# What is counted for a path that nothing is at.
UNKNOWN = "other"
# Headers that a page of an allowed origin may send, and read.
MAY_SEND = (
    *("authorization", "content-type", "inference-header-content-length", "traceparent"),
    *("x-api-key", "x-request-id", "x-request-timeout-ms"),
)
MAY_READ = ("inference-header-content-length", "retry-after", "x-request-id")


class Application:
    """The endpoints, and FastAPI for everything else.

    Parameters
    ----------
    endpoints
        By path; each takes POST.
    infer
        The Open Inference Protocol's, whose path names a model.
    rest
        Knows the endpoints too, so that it refuses other methods.
    gate
        Lets requests of the rest in, and takes note of them.
    origins
        Whose pages may ask.
    """

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint[Any]],
        infer: Endpoint[Any],
        rest: FastAPI,
        gate: Gate,
        origins: tuple[str, ...],
    ) -> None:
        self.endpoints = endpoints
        self.infer = infer
        self.rest = rest
        self.gate = gate
        self.openapi = rest.openapi
        self.draining = False
        self.answer: ASGIApp = self.route
        # Whether answers get headers by the way.
        self.cors = bool(origins)
        if origins:
            self.answer = CORSMiddleware(
                self.route,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=MAY_SEND,
                expose_headers=MAY_READ,
            )

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a request, or take part in starting and stopping."""
        return self.answer(scope, receive, send)

    def route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Find who answers a request."""
        if scope["type"] != "http":
            return self.rest(scope, receive, send)
        endpoint = self.find(scope)
        return endpoint(scope, receive, send) if endpoint else self.other(scope, receive, send)

    def find(self, scope: Scope) -> Endpoint[Any] | None:
        """Return the endpoint that a request is for."""
        if scope["method"] != "POST":
            return None
        if routes.PATH.fullmatch(scope["path"]):
            return self.infer
        return self.endpoints.get(scope["path"])

    def at_once(self, scope: Scope) -> responses.Reply | None:
        """Refuse a request whose head is there if there is no room for it; see ``Endpoint``."""
        endpoint = self.find(scope)
        return endpoint.at_once(scope) if endpoint and not self.cors else None

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is for no endpoint."""
        scope[problems.CALL] = call = self.gate.enter(
            scope["method"], UNKNOWN, dict(scope["headers"])
        )
        status = CLIENT_LEFT

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = (b"x-request-id", call.id.encode())
                message["headers"] = [*message.get("headers", ()), name]
            await send(message)

        try:
            await self.rest(scope, receive, send_named)
        finally:
            call.route = getattr(scope.get("route"), "path", UNKNOWN)
            self.gate.leave(call, status)

    async def crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of a connection that is one too many: only how the service is."""
        if scope["path"] in HEALTH:
            await self(scope, receive, send)
            return
        scope[problems.CALL] = call = self.gate.enter(
            scope["method"], UNKNOWN, dict(scope["headers"])
        )
        answer = problems.respond(scope, Overloaded("too many connections are open", 1))
        call.rejected = "connections"
        await responses.send(send, answer, call.id)
        self.gate.leave(call, answer.status)

    def refused(self, status: int) -> str:
        """Take note of a request that was refused for its form; return the id it is given."""
        call = self.gate.enter("", UNKNOWN, {})
        call.rejected = "head"
        self.gate.leave(call, status)
        return call.id

    def drain(self) -> None:
        """Say from now on that no requests should be sent here."""
        self.draining = True


def create(
    service: Service,
    *,
    debug: bool,
    max_body_bytes: int,
    gate: Gate,
    group: Group,
    exposition: Callable[[], Awaitable[bytes]],
    begin: Callable[[], None],
    end: Callable[[], None],
    origins: tuple[str, ...] = (),
) -> Application:
    """Return the application that answers with ``service``.

    Parameters
    ----------
    service
        The models.
    debug
        Whether ``POST /debug/mc`` answers.
    max_body_bytes
        Longest request body.
    gate
        Lets requests in.
    group
        Has all workers change what is served.
    exposition
        Writes the metrics of all workers.
    begin, end
        Called on the event loop before the first request, and after the last.
    origins
        Whose pages may ask, ``*``: everybody's.
    """

    def predict(_: Scope, headers: Headers, content: bytes | bytearray) -> Steps[Answer]:
        """Predict rows in eval mode."""
        r = request_body.parse(headers, content, PredictRequest)
        return service.predict_steps(r.inputs, r.model, r.version)

    def uncertainty(_: Scope, headers: Headers, content: bytes | bytearray) -> Steps[Answer]:
        """Run train-mode passes of rows and answer with their statistics."""
        return service.uncertainty_steps(
            query(request_body.parse(headers, content, UncertaintyRequest))
        )

    def debug_mc(_: Scope, headers: Headers, content: bytes | bytearray) -> Steps[Answer]:
        """Run train-mode passes of rows and show them. Off unless DROPSERVE_DEBUG=1."""
        return service.debug_steps(query(request_body.parse(headers, content, UncertaintyRequest)))

    def masks(_: Scope, headers: Headers, content: bytes | bytearray) -> Steps[Answer]:
        """Show the masks of a request's first pass. Off unless DROPSERVE_DEBUG=1."""
        r = request_body.parse(headers, content, MasksRequest)
        return service.masks_steps(r.model, r.version, r.passes, r.seed, r.masks)

    def infer(scope: Scope, headers: Headers, content: bytes | bytearray) -> Steps[routes.Written]:
        """Answer the Open Inference Protocol."""
        return routes.infer(service, scope, headers, content)

    bodies = Queue(LONGEST_BODIES * max_body_bytes, "bytes of bodies")
    made = (service, gate, max_body_bytes, bodies)
    endpoints: dict[str, Endpoint[Any]] = {
        "/predict": Endpoint("/predict", "predict", predict, json_reply, *made),
        "/uncertainty": Endpoint("/uncertainty", "predict", uncertainty, json_reply, *made),
        "/debug/mc": Endpoint("/debug/mc", "debug", debug_mc, json_reply, *made),
        "/console/masks": Endpoint("/console/masks", "debug", masks, json_reply, *made),
    }
    inferring = Endpoint(INFER[0], "predict", infer, routes.write, *made)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        begin()
        yield
        end()

    rest = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        title="dropserve",
        description="Predictions of networks with dropout, and how sure they are of them.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    problems.register(rest)
    rest.openapi = lambda: openapi.document(  # type: ignore[method-assign] # as FastAPI documents
        rest, service, keys=gate.keys is not None
    )
    application = Application(endpoints, inferring, rest, gate, origins)

    def guard(scope: KeyScope | None) -> Any:
        # A plain function would be called in a thread.
        async def check(request: Request) -> None:
            headers = dict(request.scope["headers"])
            gate.check(request.scope[problems.CALL], headers, scope)

        return Depends(check)

    def ready_now() -> bool:
        return not application.draining and bool(service.models.served)

    @rest.get("/health/live", response_model=Alive)
    async def live() -> Response:
        """Tell that the process answers."""
        return responses.response({"status": "alive"})

    @rest.get("/health/ready", response_model=Ready)
    async def ready() -> Response:
        """Tell that requests are taken, by which models and on which device."""
        if not ready_now():
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the service is draining" if application.draining else "no model is served",
            )
        return responses.response({"status": "ready"} | service.state())

    @rest.get("/v2/health/live", response_model=Live)
    async def protocol_live() -> Response:
        """Tell that the server answers."""
        return responses.response({"live": True})

    @rest.get("/v2/health/ready", response_model=Readiness)
    async def protocol_ready() -> Response:
        """Tell that requests are taken."""
        return responses.response({"ready": ready_now()}, 200 if ready_now() else 503)

    @rest.get("/metrics", dependencies=[guard(None)], response_class=Response)
    async def metrics() -> Response:
        """Tell Prometheus how the service does, all its workers together."""
        return Response(await exposition(), media_type=CONTENT_TYPE_LATEST)

    rest.include_router(routes.router(service, guard("predict")))
    rest.include_router(repository.router(service.models, group, guard("admin")))
    files = console.Files()
    rest.include_router(console.router(files, service, gate, guard("predict"), debug=debug))
    if not debug:
        del endpoints["/debug/mc"], endpoints["/console/masks"]

        @rest.post("/debug/mc", include_in_schema=False)
        @rest.post("/console/masks", include_in_schema=False)
        async def debug_off() -> Response:
            raise HTTPException(
                HTTPStatus.NOT_FOUND, "the debug endpoint is off; DROPSERVE_DEBUG=1 switches it on"
            )

    rest.router.routes += [
        Route(path, endpoint, methods=["POST"])
        for path, endpoint in (endpoints | dict.fromkeys(INFER, inferring)).items()
    ]
    rest.mount("/console", files)
    return application


def json_reply(answer: Answer) -> responses.Reply:
    """Write an answer that may hold arrays."""
    return responses.json(200, orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))


def query(request: UncertaintyRequest) -> Query:
    """Hand a request to the service without its HTTP origin."""
    return Query(
        inputs=request.inputs,
        model=request.model,
        version=request.version,
        passes=request.passes,
        seed=request.seed,
        interval=request.interval,
        masks=request.masks,
        tolerance=request.tolerance,
        coverage=request.coverage,
    )
