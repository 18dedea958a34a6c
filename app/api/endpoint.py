"""Answer a POST of JSON: body to typed request to answer, as an ASGI application of its own.

FastAPI's own way (middleware, routing, Request and Response objects) costs a request several
times what all of this does; benchmarks/README.md has the figures.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Generic

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.api import body, problems
from app.api.body import Typed
from app.service import Service, Steps

# Most answers are out sooner than it would take to watch for their client's leaving.
WATCH_AFTER_SECONDS = 0.01


class Endpoint(Generic[Typed]):
    """A route that takes one kind of request.

    Parameters
    ----------
    request
        The model of the body.
    steps
        What its answer takes.
    service
        Makes them.
    max_body_bytes
        Longest body.
    """

    def __init__(
        self,
        request: type[Typed],
        steps: Callable[[Typed], Steps],
        service: Service,
        max_body_bytes: int,
    ) -> None:
        self.request = request
        self.steps = steps
        self.service = service
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        watch = Watch(receive)
        try:
            request = await body.read(scope, receive, self.request, self.max_body_bytes)
            watch.start()
            answer = await self.service.answer(self.steps(request))
        except ClientDisconnect:
            # Nobody is there to be answered, and the log has nothing to learn from it.
            return
        except asyncio.CancelledError:
            if watch.left:
                return
            raise
        except Exception as error:
            watch.stop()
            response = problems.respond(Request(scope), error)
            await response(scope, receive, send)
            if response.status_code == problems.UNEXPECTED:
                raise
            return
        watch.stop()
        await send_json(send, orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))


async def send_json(send: Send, content: bytes) -> None:
    """Send an answer."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class Watch:
    """Cancels the task that answers a request when its client goes away.

    ``receive`` has nothing more to give once the body is read, but for the news of that.
    """

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.left = False
        self.answering: asyncio.Task[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch, if the answer takes a while."""
        self.answering = asyncio.current_task()
        loop = asyncio.get_running_loop()
        self.timer = loop.call_later(WATCH_AFTER_SECONDS, self.begin)

    def begin(self) -> None:
        """Watch from now on."""
        self.watcher = asyncio.create_task(self.cancel_when_left())

    async def cancel_when_left(self) -> None:
        """Wait for the client to leave."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.left = True
        if self.answering:
            self.answering.cancel()

    def stop(self) -> None:
        """Stop before the answer is sent, whose end reads like a leaving, too."""
        if self.timer:
            self.timer.cancel()
        if self.watcher:
            self.watcher.cancel()
