"""How answers go out: each in one write, and refusals of a full queue without a task.

Those who are refused would otherwise take the time of those who are answered.
"""

import random
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Awaitable
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from dropserve.app.http import problems
from dropserve.app.http.responses import Reply
from dropserve.app.observability.record import Call

# How long nothing is read from a client that was refused for the queue, at most; twice as long each
# time that it is refused again.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 1.0


def has_length(start: Message) -> bool:
    """Tell whether the head of an answer says how long the body is."""
    return b"content-length" in dict(start.get("headers", ()))


class Answering(HttpToolsProtocol):
    """A client's connection, as far as answers are concerned.

    The application may have a method ``at_once``, which takes the scope of a request whose head is
    there, and returns the reply to one that it has no room for.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # The head of the answer that is being sent, until it is out.
        self.start: Message | None = None
        # Whether the next answer is the last.
        self.last = False
        # Whether the next request is the first of what has just come: others have a task each, so
        # that the loop does not answer thousands in one turn.
        self.first = False
        # The next pause after a refusal, at most, and what ends the one that is.
        self.pause_seconds = PAUSE_SECONDS
        self.pause: TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self.pause is not None:
            self.pause.cancel()
        super().connection_lost(exc)

    # uvicorn says of what ASGI has in types of its own what starlette says in others.
    def _start_asgi_task(  # type: ignore[override]
        self, cycle: RequestResponseCycle, app: ASGIApp
    ) -> None:
        """Have the application answer a request, or refuse it without making a task of it."""
        refusal: Reply | None = None
        if self.first and not self.flow.write_paused:
            self.first = False
            at_once = getattr(app, "at_once", None)
            refusal = at_once and at_once(cycle.scope)
        if refusal is None:
            self.start = None
            begin = partial(self.begin, app, cycle)
            super()._start_asgi_task(cycle, begin)
            return
        if self.last:
            cycle.keep_alive = False
        self.answer(cycle, refusal)

    def begin(
        self,
        app: ASGIApp,
        cycle: RequestResponseCycle,
        scope: Scope,
        receive: Receive,
        uvicorn_send: Send,
    ) -> Awaitable[None]:
        """Begin the application's answer to a request."""
        return app(scope, receive, partial(self.send, cycle, uvicorn_send))

    async def send(self, cycle: RequestResponseCycle, uvicorn_send: Send, message: Message) -> None:
        """Send a part of an answer; head and body together, if it comes whole.

        uvicorn would take a system call for each, which together cost more than an answer's
        matrix products.
        """
        start, self.start = self.start, None
        if message["type"] == "http.response.start":
            # As ASGI has it, nothing is sent before the first part of the body.
            self.start = message
        elif start is None:
            await uvicorn_send(message)
        elif message.get("more_body") or not has_length(start):
            await uvicorn_send(start)
            await uvicorn_send(message)
        else:
            if self.flow.write_paused and not cycle.disconnected:
                await self.flow.drain()
            if not cycle.disconnected:
                content = message.get("body", b"") if cycle.scope["method"] != "HEAD" else b""
                self.answer(cycle, Reply(start["status"], content, start["headers"]))

    def answer(self, cycle: RequestResponseCycle, answer: Reply) -> None:
        """Answer a request, and go on with the next."""
        if cycle.waiting_for_100_continue:
            # Whether the body comes after all is the client's choice.
            cycle.keep_alive = False
        self.write(answer, keep_alive=cycle.keep_alive)
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    def write(self, answer: Reply, *, keep_alive: bool) -> None:
        """Write an answer."""
        parts = [STATUS_LINE[answer.status]]
        for headers in (self.server_state.default_headers, answer.headers):
            for name, value in headers:
                parts += (name, b": ", value, b"\r\n")
        if not keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", answer.content)
        self.transport.write(b"".join(parts))

    def on_response_complete(self) -> None:
        """Go on with the next request; after a refusal for the queue, in a while."""
        was_newest = not self.pipeline
        super().on_response_complete()
        if was_newest:
            self.rest(cast("dict[str, Any]", self.cycle.scope).get(problems.CALL))

    def rest(self, call: Call | None) -> None:
        """Read nothing for a while from a client that was refused for the queue."""
        if call is None or call.rejected != "queue":
            self.pause_seconds = PAUSE_SECONDS
            return
        if self.transport.is_closing():
            return
        self.flow.pause_reading()
        if self.pause is None:
            # By chance, so that those who were refused together do not come back together.
            seconds = random.uniform(self.pause_seconds / 2, self.pause_seconds)
            self.pause_seconds = min(LONGEST_PAUSE_SECONDS, 2 * self.pause_seconds)
            self.pause = self.loop.call_later(seconds, self.end_pause)

    def end_pause(self) -> None:
        """Read on, unless something else is in the way of that."""
        self.pause = None
        if not self.pipeline and len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()
