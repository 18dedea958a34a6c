"""From a request's bytes to a response's bytes: dispatch, admission, body, answer, response.

FastAPI's own way (middleware, routing, Request and Response objects) costs a request several times
as much; benchmarks/README.md has the figures. FastAPI answers only what is not for an endpoint.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Generic, TypeVar

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.app.errors import Overloaded
from dropserve.app.http import problems
from dropserve.app.http.context import Context
from dropserve.app.http.disconnect import DisconnectWatcher
from dropserve.app.http.messages import (
    PAUSE,
    Request,
    Response,
    read_body,
    send_response,
    with_id,
)
from dropserve.app.http.problems import RECORD
from dropserve.app.inference.admission import Admission
from dropserve.app.observability.record import RequestRecord
from dropserve.app.security.api_keys import Scope as KeyScope

# Set in the scope of a request that holds a place in the queue until its handler starts.
RESERVED = "dropserve.reserved"
# Route under which requests without a route are counted.
UNKNOWN = "other"
HEALTH = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
# Headers that pages of an allowed origin may send, and read.
REQUEST_HEADERS = (
    *("authorization", "content-type", "inference-header-content-length", "traceparent"),
    *("x-api-key", "x-request-id", "x-request-timeout-ms"),
)
RESPONSE_HEADERS = ("inference-header-content-length", "retry-after", "x-request-id")

Asked = TypeVar("Asked")

log = logging.getLogger("app")


class Endpoint(Generic[Asked]):
    """A route that takes one kind of POST request.

    Parameters
    ----------
    route
        Path template under which requests are counted.
    key_scope
        Scope that an API key needs.
    parse
        Turns a request into the typed query that it holds.
    answer
        Answers the query.
    context
        Opens the record of each request.
    admission
        The queue of the service.
    max_body_bytes
        Longest body.
    bodies
        Accounts for the bytes of all bodies except short ones, of all endpoints.
    """

    def __init__(
        self,
        route: str,
        key_scope: KeyScope,
        parse: Callable[[Request], Asked],
        answer: Callable[[Asked, RequestRecord], Awaitable[Response]],
        *,
        context: Context,
        admission: Admission,
        max_body_bytes: int,
        bodies: Admission,
    ) -> None:
        self.route = route
        self.key_scope = key_scope
        self.parse = parse
        self.answer = answer
        self.context = context
        self.admission = admission
        self.max_body_bytes = max_body_bytes
        self.bodies = bodies
        self.disconnects = DisconnectWatcher()

    def shed(self, scope: Scope) -> Response | None:
        """Refuse a request if the queue is full; else reserve a place of one row for it.

        Without a task: hundreds of refused requests would keep the admitted ones waiting.
        """
        try:
            self.admission.acquire(1)
        except Overloaded as full:
            error: Exception = full
        else:
            scope[RESERVED] = True
            return None
        headers = dict(scope["headers"])
        with self.context.request("POST", self.route, headers) as record:
            try:
                self.context.check(record, headers, self.key_scope)
            except Exception as refusal:
                error = refusal
            response = failure(error, scope["path"], record)
            scope[PAUSE] = record.rejected == "queue"
        return with_id(response, record.id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request through ASGI: read its body, handle it, stop if the client leaves."""
        if scope.pop(RESERVED, False):
            self.admission.release(1)
        path, headers, held = scope["path"], dict(scope["headers"]), 0

        def hold(size: int) -> None:
            nonlocal held
            self.bodies.acquire(size)
            held += size

        with self.context.request("POST", self.route, headers) as record:
            try:
                self.context.check(record, headers, self.key_scope)
                self.admission.check()
                # Without a name for the body, so that it can be freed once it is parsed.
                work = self.handle(
                    Request(
                        path,
                        headers,
                        await read_body(headers, receive, self.max_body_bytes, hold),
                    ),
                    record,
                )
                response = await self.disconnects.watch(receive, work)
            except ClientDisconnect:
                return
            except asyncio.CancelledError:
                # By the server, whose grace period is over.
                ended = Overloaded("the service ended before the answer was ready", 1)
                response = problems.respond(ended, path, record)
            except Exception as error:
                response = failure(error, path, record)
            finally:
                self.bodies.release(held)
            scope[PAUSE] = record.rejected == "queue"
            await send_response(send, response, record.id)

    async def handle(self, request: Request, record: RequestRecord) -> Response:
        """Turn a request into its response; an error, too, is a response."""
        path = request.path
        try:
            asked = self.parse(request)
            # The numbers of JSON take ten times the memory of their text, which is not needed now.
            del request
            response = await self.answer(asked, record)
        except Exception as error:
            return failure(error, path, record)
        record.status = response.status
        return response


def failure(error: Exception, path: str, record: RequestRecord) -> Response:
    """Answer a request that met an error; log one that is a fault of the service."""
    response = problems.respond(error, path, record)
    if record.status == problems.UNEXPECTED:
        log.error("request %s met an unexpected error", record.id, exc_info=error)
    return response


class Application:
    """The endpoints, and FastAPI for every other request.

    Parameters
    ----------
    endpoints
        By path.
    infer
        The endpoint of the Open Inference Protocol, whose paths hold names of models.
    is_infer
        Tells whether a path is one of these.
    rest
        FastAPI's application. It knows the endpoints, too, to refuse other methods.
    context
        Opens the record of each request.
    origins
        Origins whose pages may send requests.
    """

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint[Any]],
        infer: Endpoint[Any],
        is_infer: Callable[[str], object],
        rest: FastAPI,
        context: Context,
        origins: tuple[str, ...],
    ) -> None:
        self.endpoints = endpoints
        self.infer = infer
        self.is_infer = is_infer
        self.rest = rest
        self.context = context
        self.openapi = rest.openapi
        self.draining = False
        self.dispatch: ASGIApp = self._dispatch
        # Whether responses get headers on their way out.
        self.cors = bool(origins)
        if origins:
            self.dispatch = CORSMiddleware(
                self._dispatch,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=REQUEST_HEADERS,
                expose_headers=RESPONSE_HEADERS,
            )

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a request, or take part in start-up and shutdown."""
        return self.dispatch(scope, receive, send)

    def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self.rest(scope, receive, send)
        endpoint = self._find(scope)
        return endpoint(scope, receive, send) if endpoint else self._other(scope, receive, send)

    def _find(self, scope: Scope) -> Endpoint[Any] | None:
        """Return the endpoint of a request."""
        if scope["method"] != "POST":
            return None
        return self.endpoints.get(scope["path"]) or (
            self.infer if self.is_infer(scope["path"]) else None
        )

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have FastAPI answer a request."""
        headers = dict(scope["headers"])
        with self.context.request(scope["method"], UNKNOWN, headers) as record:
            scope[RECORD] = record

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    record.status = message["status"]
                    request_id = (b"x-request-id", record.id.encode())
                    message["headers"] = [*message.get("headers", ()), request_id]
                await send(message)

            try:
                await self.rest(scope, receive, send_with_id)
            finally:
                record.route = getattr(scope.get("route"), "path", UNKNOWN)

    def shed(self, scope: Scope) -> Response | None:
        """Refuse a request whose head has arrived if there is no room for it."""
        # The middleware has to add headers to a refusal, too.
        endpoint = None if self.cors else self._find(scope)
        return endpoint.shed(scope) if endpoint else None

    async def crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request on a connection beyond the limit: nothing but health probes."""
        if scope["path"] in HEALTH:
            await self(scope, receive, send)
            return
        headers = dict(scope["headers"])
        with self.context.request(scope["method"], UNKNOWN, headers) as record:
            error = Overloaded("too many connections are open", 1)
            response = problems.respond(error, scope["path"], record)
            record.rejected = "connections"
            await send_response(send, response, record.id)

    def malformed(self, status: HTTPStatus, detail: str, *, has_record: bool) -> Response:
        """Answer a request that is not valid HTTP, too long or too slow.

        ``has_record`` tells whether the request has a record already, since its head was complete.
        """
        opened = self.context.request("", UNKNOWN, {})
        if not has_record:
            with opened as record:
                record.status, record.rejected = status, "head"
        problem = problems.Problem(status, detail)
        return with_id(problems.write(problem, opened.record.id), opened.record.id)

    def drain(self) -> None:
        """Report from now on that the service is not ready."""
        self.draining = True
