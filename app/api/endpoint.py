"""Answer a POST of JSON: body to typed request to answer, as an ASGI application of its own.

FastAPI's own way (middleware, routing, Request and Response objects) costs a request several
times what all of this does; benchmarks/README.md has the figures.
"""

from collections.abc import Callable
from typing import Generic

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.api import body, problems
from app.api.body import Typed
from app.api.leaving import Leaving
from app.service import Service, Steps


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
        self.leaving = Leaving()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            request = await body.read(scope, receive, self.request, self.max_body_bytes)
            work = self.service.answer(self.steps(request))
            answer = await self.leaving.watch(receive, work)
        except ClientDisconnect:
            # Nobody is there to be answered, and the log has nothing to learn from it.
            return
        except Exception as error:
            response = problems.respond(Request(scope), error)
            await response(scope, receive, send)
            if response.status_code == problems.UNEXPECTED:
                raise
            return
        await send_json(send, orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))


async def send_json(send: Send, content: bytes) -> None:
    """Send an answer."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})
