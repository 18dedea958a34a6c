"""Notice that a client went away before its answer was out, and stop working on it."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

# Most answers are out sooner than it would take to watch for their client's leaving.
TICK_SECONDS = 0.01

Result = TypeVar("Result")
Answering = asyncio.Task[Any]


class Leaving:
    """Watches the clients of all requests that take longer than a tick, from one timer.

    It belongs to one event loop. Of a client that sends requests ahead of answers (pipelining),
    uvicorn tells only the newest that it left, so an older one is answered to nobody.
    """

    def __init__(self) -> None:
        self.new: dict[Answering, Receive] = {}
        self.older: dict[Answering, Receive] = {}
        self.watchers: dict[Answering, asyncio.Task[None]] = {}
        self.left: set[Answering] = set()
        self.ticking = False

    async def watch(self, receive: Receive, work: Awaitable[Result]) -> Result:
        """Return the result of a request's work.

        Parameters
        ----------
        receive
            Has given the whole body, and nothing more to give but the news of the client's leaving.
        work
            Is cancelled when the client leaves.

        Raises
        ------
        ClientDisconnect
            If it does.
        """
        if not self.ticking:
            self.ticking = True
            # Not asked for each request: Python 3.11 makes a system call of it.
            self.loop = asyncio.get_running_loop()
            self.loop.call_later(TICK_SECONDS, self.tick)
        task = asyncio.current_task(self.loop)
        assert task
        self.new[task] = receive
        try:
            return await work
        except asyncio.CancelledError:
            if task in self.left:
                raise ClientDisconnect from None
            raise
        finally:
            # Before the answer is sent, whose end reads like a leaving, too.
            if self.new.pop(task, None) is None and self.older.pop(task, None) is None:
                self.watchers.pop(task).cancel()
                self.left.discard(task)

    def tick(self) -> None:
        """Begin to watch what was there a tick ago, and still is."""
        for task, receive in self.older.items():
            self.watchers[task] = asyncio.create_task(self.cancel_when_left(task, receive))
        self.older, self.new = self.new, {}
        self.ticking = bool(self.older)
        if self.ticking:
            self.loop.call_later(TICK_SECONDS, self.tick)

    async def cancel_when_left(self, task: Answering, receive: Receive) -> None:
        """Wait for a client to leave."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.add(task)
        task.cancel()
