"""From a request's bytes to a response's bytes: dispatch, admission, body, answer, response.

FastAPI's own way (middleware, routing, Request and Response objects) costs a request several times
as much; benchmarks/README.md has the figures. FastAPI handles only requests that match no endpoint.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Generic, TypeVar

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dropserve.app.errors import Misdirected, Overloaded
from dropserve.app.http import problems
from dropserve.app.http.bodies import (
    LIST_WEIGHT,
    PAUSE,
    SHORT_BYTES,
    SHORT_RESPONSE_BYTES,
    Headers,
    Request,
    Response,
    complete,
    count_lists,
    encode,
    encoding_send,
    read_body,
    send_response,
)
from dropserve.app.http.context import Context
from dropserve.app.http.disconnect import DisconnectWatcher
from dropserve.app.http.problems import RECORD
from dropserve.app.inference.admission import Admission, Admitted
from dropserve.app.inference.executor import Executor
from dropserve.app.observability.record import CLIENT_DISCONNECTED, RequestRecord
from dropserve.app.security.api_keys import Scope as KeyScope

# Set in the scope of a request that holds a place in the queue until its handler starts.
RESERVED = "dropserve.reserved"
# Route under which requests without a route are counted.
UNKNOWN = "other"
HEALTH = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
# Bodies beyond this size are parsed aside from the event loop, which they would hold up for more
# than some milliseconds.
LONG_BYTES = 2**19
# Responses beyond this size are counted while they are sent: a thousand shorter ones take a few
# dozen MB.
COUNTED_RESPONSE_BYTES = 2**16
# Headers that pages of an allowed origin may send, and read.
REQUEST_HEADERS = (
    *("authorization", "content-encoding", "content-type", "inference-header-content-length"),
    *("traceparent", "x-api-key", "x-request-id", "x-request-timeout-ms"),
)
RESPONSE_HEADERS = ("inference-header-content-length", "retry-after", "x-request-id")

# In the scope of a request: its endpoint, once found.
ENDPOINT = "dropserve.endpoint"

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class Endpoint(Generic[Asked, Answered]):
    """A route that takes one kind of POST request.

    Parameters
    ----------
    route
        Path template under which requests are counted.
    key_scope
        Scope that an API key needs.
    parse
        Turns a request into the typed query that it holds.
    ask
        Answers the query.
    write
        Turns the answer into a response.
    context
        Opens the record of each request.
    admission
        The queue of the service.
    max_body_bytes
        Longest body.
    bodies
        Accounts for the bytes of all bodies except short ones, of all endpoints.
    unread
        Accounts for the bytes of all long responses that their clients have yet to read.
    executor
        Where long bodies are parsed.
    """

    def __init__(
        self,
        route: str,
        key_scope: KeyScope,
        parse: Callable[[Request], Asked],
        ask: Callable[[Asked, RequestRecord], Awaitable[Answered]],
        write: Callable[[Answered], Response],
        *,
        context: Context,
        admission: Admission,
        max_body_bytes: int,
        bodies: Admission,
        unread: Admission,
        executor: Executor,
    ) -> None:
        self.route = route
        self.key_scope = key_scope
        self.parse = parse
        self.ask = ask
        self.write = write
        self.context = context
        self.admission = admission
        self.max_body_bytes = max_body_bytes
        self.bodies = bodies
        self.unread = unread
        self.executor = executor
        self.disconnects = DisconnectWatcher()

    def shed(self, scope: Scope) -> Response | None:
        """Refuse a request if the queue is full; else reserve a place of one row for it.

        No task is started for it: hundreds of refused requests would keep the admitted ones
        waiting.
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
            response = problems.respond(error, scope["path"], record)
            scope[PAUSE] = record.rejected == "queue"
        return complete(response, record.id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request through ASGI."""
        if scope.pop(RESERVED, False):
            self.admission.release(1)
        headers, held = dict(scope["headers"]), 0

        def hold(size: int) -> None:
            nonlocal held
            self.bodies.acquire(size)
            held += size

        async def read() -> bytes | bytearray:
            body = await read_body(headers, receive, self.max_body_bytes, hold)
            if len(body) > SHORT_BYTES:
                hold(LIST_WEIGHT * count_lists(body))
            return body

        with self.context.request("POST", self.route, headers) as record:
            scope[RECORD] = record
            watch = partial(self.disconnects.watch, receive)
            try:
                response = await self.respond(scope["path"], headers, read, watch, record)
            except ClientDisconnect:
                return
            finally:
                self.bodies.release(held)
            scope[PAUSE] = record.rejected == "queue"
            size = len(response.content)
            if size <= COUNTED_RESPONSE_BYTES:
                await send_response(send, response, record)
                return
            try:
                with Admitted(self.unread, size, 0):
                    await send_response(send, response, record)
            except Overloaded as full:
                refusal = problems.respond(full, scope["path"], record)
                await send_response(send, complete(refusal, record.id), record)

    async def respond(
        self,
        path: str,
        headers: Headers,
        read: Callable[[], Awaitable[bytes | bytearray]],
        watch: Callable[[Awaitable[Answered]], Awaitable[Answered]],
        record: RequestRecord,
    ) -> Response:
        """Turn a request's bytes into the complete response; an error is a response, too.

        Parameters
        ----------
        path, headers
            The head of the request.
        read
            Returns the body, once the head is accepted.
        watch
            Awaits the answer, and cancels it if the client disconnects.
        record
            The record of the request.

        Raises
        ------
        ClientDisconnect
            If the client disconnects first.
        """
        try:
            self.context.check(record, headers, self.key_scope)
            self.admission.check()
            # No name refers to the body: it is freed once parsed, and so makes room for its
            # numbers, which take ten times its memory.
            asked = await self._parse(Request(path, headers, await read()))
            response = self.write(await watch(self.ask(asked, record)))
            if len(response.content) > SHORT_RESPONSE_BYTES:
                response = await encode(response, headers)
            record.status = response.status
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:
            # Cancelled by the server, whose grace period is over.
            ended = Overloaded("the service ended before the answer was ready", 1)
            response = problems.respond(ended, path, record)
        except Exception as error:
            response = problems.respond(error, path, record)
        return complete(response, record.id)

    async def _parse(self, request: Request) -> Asked:
        """Parse a request, aside from the event loop if it is long."""
        if len(request.body) <= LONG_BYTES:
            return self.parse(request)
        return await self.executor.submit(partial(self.parse, request), long=True)


class Application:
    """The endpoints, and FastAPI for every other request.

    Parameters
    ----------
    endpoints
        The endpoints, by path.
    patterns
        The endpoints whose paths hold names of models, each with the pattern of its paths.
    rest
        FastAPI's application. It knows the endpoints, too, to refuse other methods.
    context
        Opens the record of each request.
    origins
        Origins whose pages may send requests.
    """

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint[Any, Any]],
        patterns: Sequence[tuple[re.Pattern[str], Endpoint[Any, Any]]],
        rest: FastAPI,
        context: Context,
        origins: tuple[str, ...],
    ) -> None:
        self.endpoints = endpoints
        self.patterns = patterns
        self.rest = rest
        self.context = context
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
        endpoint = scope.pop(ENDPOINT, None) or self._find(scope)
        return endpoint(scope, receive, send) if endpoint else self._other(scope, receive, send)

    def _find(self, scope: Scope) -> Endpoint[Any, Any] | None:
        """Return the endpoint of a request."""
        if scope["method"] != "POST":
            return None
        path = scope["path"]
        return self.endpoints.get(path) or next(
            (endpoint for pattern, endpoint in self.patterns if pattern.fullmatch(path)), None
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
                try:
                    await send(message)
                except OSError:
                    record.rejected, record.status = "unread", CLIENT_DISCONNECTED

            try:
                self.context.check_host(headers)
            except Misdirected as error:
                response = problems.respond(error, scope["path"], record)
                await send_response(send, complete(response, record.id), record)
                return
            if scope["method"] == "HEAD":
                # As GET (RFC 9110, section 9.3.2); the server leaves out the content.
                scope = {**scope, "method": "GET"}
            try:
                await self.rest(scope, receive, encoding_send(send_with_id, headers))
            except Exception:
                # FastAPI raises an unexpected error again once ``problems`` has answered it.
                if record.rejected != problems.ERROR:
                    raise
            finally:
                record.route = getattr(scope.get("route"), "path", UNKNOWN)

    def shed(self, scope: Scope) -> Response | None:
        """Refuse a request whose head has arrived if there is no room for it."""
        # The middleware has to add headers to a refusal, too.
        endpoint = None if self.cors else self._find(scope)
        if endpoint is None:
            return None
        scope[ENDPOINT] = endpoint
        return endpoint.shed(scope)

    async def crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request on a connection beyond the limit, which may send only health probes."""
        if scope["path"] in HEALTH:
            await self(scope, receive, send)
            return
        headers = dict(scope["headers"])
        with self.context.request(scope["method"], UNKNOWN, headers) as record:
            error = Overloaded("too many connections are open", 1)
            response = problems.respond(error, scope["path"], record)
            record.rejected = "connections"
            await send_response(send, complete(response, record.id), record)

    def malformed(self, status: HTTPStatus, detail: str, scope: Scope | None) -> Response:
        """Answer a request that is not valid HTTP, too long or too slow.

        ``scope`` is the request's if its head was valid, else None.
        """
        record: RequestRecord | None = scope.get(RECORD) if scope else None
        if record is None:
            with self.context.request("", UNKNOWN, {}) as record:
                record.status, record.rejected = int(status), "head"
        else:
            record.status = int(status)
        return complete(problems.write(problems.Problem(status, detail), record.id), record.id)

    def drain(self) -> None:
        """Report from now on that the service is not ready."""
        self.draining = True
