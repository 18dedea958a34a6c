"""The response side of a connection: one write per response, and load shedding without a task.

Refused requests would otherwise take time from the admitted ones.
"""

import fcntl
import os
import random
import socket
import struct
import termios
from asyncio import AbstractEventLoop, CancelledError, TimerHandle
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from dropserve.app.http.bodies import PAUSE, Response

# Longest pause in reading from a client that was refused because the queue is full. It doubles with
# each further refusal, up to a limit.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 1.0
# What a client must read of its responses in ``send_seconds``, unless less is left.
LEAST_READ_BYTES = 64 * 2**10


class ServedApplication(Protocol):
    """The interface that the server needs of the application, in addition to ASGI."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a request (ASGI)."""

    def shed(self, scope: Scope) -> Response | None:
        """Return the refusal of a request whose head has arrived, or None to go on with it."""

    def crowded(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a request on a connection beyond the limit (ASGI)."""

    def malformed(self, status: HTTPStatus, detail: str, scope: Scope | None) -> Response:
        """Return the response to a request that breaks HTTP or a limit of the connection.

        ``scope`` is the request's if its head was valid, else None.
        """


def has_length(start: Message) -> bool:
    """Tell whether the head of a response states the length of its body."""
    return b"content-length" in dict(start.get("headers", ()))


def unacknowledged(descriptor: int) -> int:
    """Return how many bytes the kernel holds for a socket until its peer has received them."""
    # It may be closed already, and its descriptor be -1.
    with suppress(OSError, ValueError):
        size: int = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0]
        return size
    return 0


class ResponseProtocol(HttpToolsProtocol):
    """A client's connection, as far as responses are concerned."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
        *,
        application: ServedApplication,
        send_seconds: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.application = application
        self.send_seconds = send_seconds
        # Bytes of all responses so far.
        self.written = 0
        # Runs while the client leaves a response unread; and what it had read when last checked.
        self.reading: TimerHandle | None = None
        self.read = 0
        self.lost = False
        # The head of the present response, until it is sent.
        self.start: Message | None = None
        # Whether the next response is the last.
        self.last = False
        # Whether the next request is the first of the bytes just received. Only that one is shed
        # without a task, so that the loop does not refuse thousands in one turn.
        self.first = False
        # Whether the connection is beyond the limit, so that its requests are not shed.
        self.crowding = False
        # Longest next pause after a refusal, and the end of the present one.
        self.pause_seconds = PAUSE_SECONDS
        self.pause: TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.lost = True
        for timer in (self.pause, self.reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # uvicorn and starlette have different types for the same ASGI.
    def _start_asgi_task(  # type: ignore[override]
        self, cycle: RequestResponseCycle, app: ASGIApp
    ) -> None:
        """Have the application answer a request, or shed it without a task."""
        refusal: Response | None = None
        if self.first and not self.crowding and not self.flow.write_paused:
            self.first = False
            refusal = self.application.shed(cast("Scope", cycle.scope))
        if refusal is None:
            self.start = None
            super()._start_asgi_task(cycle, partial(self._begin, app, cycle))
            return
        if self.last:
            cycle.keep_alive = False
        self._respond(cycle, refusal)

    def _begin(
        self,
        app: ASGIApp,
        cycle: RequestResponseCycle,
        scope: Scope,
        receive: Receive,
        uvicorn_send: Send,
    ) -> Awaitable[None]:
        """Start the application on a request."""
        return app(scope, receive, partial(self._send, cycle, uvicorn_send))

    async def _send(
        self, cycle: RequestResponseCycle, uvicorn_send: Send, message: Message
    ) -> None:
        """Send a message of a response; head and body together if the body is one message.

        uvicorn would make a system call for each, which cost more than the matrix products. A long
        response is sent once the client has read nearly all of it.

        Raises
        ------
        ConnectionError
            If the client is gone, and has not read all of the response.
        """
        start, self.start = self.start, None
        if message["type"] == "http.response.start":
            # ASGI: nothing is sent before the first part of the body.
            self.start = message
        elif start is None:
            await uvicorn_send(message)
            self._wrote(len(message.get("body", b"")))
        elif message.get("more_body") or not has_length(start):
            await uvicorn_send(start)
            await uvicorn_send(message)
            self._wrote(len(message.get("body", b"")))
        else:
            if self.flow.write_paused:
                await self._drain()
            if not cycle.disconnected and not self.lost:
                content = message.get("body", b"") if cycle.scope["method"] != "HEAD" else b""
                self._respond(cycle, Response(start["status"], content, start["headers"]))
                if self.flow.write_paused:
                    await self._drain()
            if self.lost:
                raise ConnectionError("the client has not read its response")

    async def _drain(self) -> None:
        """Wait until the client has read nearly all that was written, or is gone."""
        try:
            await self.flow.drain()
        except CancelledError:
            # The grace period of the shutdown is over, and the client still does not read.
            self.lost = True
            self.transport.abort()

    def _respond(self, cycle: RequestResponseCycle, response: Response) -> None:
        """Write a complete response, and go on with the next request."""
        if cycle.waiting_for_100_continue:
            # The client may or may not send the body after all.
            cycle.keep_alive = False
        self.write(response, keep_alive=cycle.keep_alive)
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    def write(self, response: Response, *, keep_alive: bool) -> None:
        """Write a response."""
        parts = [STATUS_LINE[response.status]]
        for headers in (self.server_state.default_headers, response.headers):
            for name, value in headers:
                parts += (name, b": ", value, b"\r\n")
        if not keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", response.content)
        content = b"".join(parts)
        self.transport.write(content)
        self._wrote(len(content))

    def _wrote(self, size: int) -> None:
        """Count written bytes; if the client does not read them at once, limit its time."""
        self.written += size
        if self.reading is None and self.transport.get_write_buffer_size():
            self.limit_reading()

    def unread(self) -> int:
        """Return the bytes written that have not reached the client."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        return self.transport.get_write_buffer_size() + unacknowledged(descriptor)

    def limit_reading(self) -> None:
        """Begin to check that the client reads."""
        if self.reading is None and not self.lost:
            self.read = self.written - self.unread()
            self.reading = self.loop.call_later(self.send_seconds, self._check_reading)

    def _check_reading(self) -> None:
        """End the connection if its client has hardly read since the last check."""
        self.reading = None
        unread = self.unread()
        if not unread:
            return
        if self.written - unread - self.read >= LEAST_READ_BYTES:
            self.limit_reading()
            return
        # With a reset, so that neither the kernel keeps the rest of the response nor the client
        # takes it for complete.
        descriptor = self.transport.get_extra_info("socket").fileno()
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def on_response_complete(self) -> None:
        """Go on with the next request; pause first if the queue was full."""
        was_newest = not self.pipeline
        super().on_response_complete()
        if was_newest:
            self._pause_if(cast("dict[str, Any]", self.cycle.scope).get(PAUSE, False))

    def _pause_if(self, refused: bool) -> None:
        """Stop reading for a while from a client that was refused because the queue is full."""
        if not refused:
            self.pause_seconds = PAUSE_SECONDS
            return
        if self.transport.is_closing():
            return
        self.flow.pause_reading()
        if self.pause is None:
            # Random, so that clients refused together do not return together.
            seconds = random.uniform(self.pause_seconds / 2, self.pause_seconds)
            self.pause_seconds = min(LONGEST_PAUSE_SECONDS, 2 * self.pause_seconds)
            self.pause = self.loop.call_later(seconds, self._end_pause)

    def _end_pause(self) -> None:
        """Resume reading, unless there is another reason not to."""
        self.pause = None
        if not self.pipeline and len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()
