"""Answer a POST: body to steps to answer, as an ASGI application of its own.

FastAPI's own way (middleware, routing, Request and Response objects) costs a request several
times what all of this does; benchmarks/README.md has the figures.
"""

import asyncio
from collections.abc import Callable
from typing import Generic

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dropserve.app.errors import Overloaded
from dropserve.app.http import problems, request_body, responses
from dropserve.app.http.context import Gate, Headers
from dropserve.app.http.disconnect import Leaving
from dropserve.app.http.responses import Reply
from dropserve.app.inference.service import Answered, Queue, Service, Steps
from dropserve.app.security.api_keys import Scope as KeyScope

CLIENT_LEFT = 499  # as nginx logs it
# Bodies of the greatest length that may be held at a time, or as many more as are shorter: the
# numbers of JSON take some ten times their text in memory.
LONGEST_BODIES = 8
# Whether a request holds a place in the queue stands in its scope under this.
PLACE = "dropserve.place"


class Endpoint(Generic[Answered]):
    """A route that takes one kind of request.

    Parameters
    ----------
    route
        What is counted under.
    key
        What a key must be good for.
    steps
        Makes of a request's scope, headers and body what its answer takes.
    write
        Writes the answer.
    service
        Makes the steps.
    gate
        Lets requests in.
    max_body_bytes
        Longest body.
    bodies
        Holds the bytes of all bodies but short ones, other endpoints' too.
    """

    def __init__(
        self,
        route: str,
        key: KeyScope,
        steps: Callable[[Scope, Headers, bytes | bytearray], Steps[Answered]],
        write: Callable[[Answered], Reply],
        service: Service,
        gate: Gate,
        max_body_bytes: int,
        bodies: Queue,
    ) -> None:
        self.route = route
        self.key = key
        self.steps = steps
        self.write = write
        self.service = service
        self.gate = gate
        self.max_body_bytes = max_body_bytes
        self.bodies = bodies
        self.leaving = Leaving()

    def at_once(self, scope: Scope) -> Reply | None:
        """Refuse a request if the queue is full; else keep a row's place until it is begun.

        A task for each of hundreds that are refused would keep those waiting that are not.
        """
        try:
            self.service.queue.enter(1, 0.0)
        except Overloaded as full:
            error: Exception = full
        else:
            scope[PLACE] = True
            return None
        headers = dict(scope["headers"])
        scope[problems.CALL] = call = self.gate.enter("POST", self.route, headers)
        try:
            self.gate.check(call, headers, self.key)
        except problems.REFUSALS as refusal:
            error = refusal
        answer = problems.respond(scope, error)
        self.gate.leave(call, answer.status)
        return responses.named(answer, call.id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope.pop(PLACE, False):
            self.service.queue.leave(1, 0.0)
        headers = dict(scope["headers"])
        scope[problems.CALL] = call = self.gate.enter("POST", self.route, headers)
        status = CLIENT_LEFT
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            self.bodies.enter(size, 0.0)
            held += size

        try:
            self.gate.check(call, headers, self.key)
            self.service.queue.check()
            # Without a name, so that the text is let go of once it is parsed.
            steps = self.steps(
                scope, headers, await request_body.read(headers, receive, self.max_body_bytes, hold)
            )
            work = self.service.answer(steps, call)
            answer = self.write(await self.leaving.watch(receive, work))
            status = answer.status
            await responses.send(send, answer, call.id)
        except ClientDisconnect:
            # Nobody is there to be answered.
            return
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                # By the server, which has waited long enough to end.
                error = Overloaded("the service ended before the answer was ready", 1)
            answer = problems.respond(scope, error)
            status = answer.status
            await responses.send(send, answer, call.id)
            if status == problems.UNEXPECTED:
                raise
        finally:
            self.bodies.leave(held, 0.0)
            self.gate.leave(call, status)
