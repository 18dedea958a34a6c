"""Stop working on a request whose client disconnects before its response is out."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

# Most responses are out within this time; clients are watched only after it.
TICK_SECONDS = 0.01

Result = TypeVar("Result")
RequestTask = asyncio.Task[Any]


class DisconnectWatcher:
    """Watches the clients of all requests that take longer than a tick, with one timer.

    It belongs to one event loop. When a pipelining client disconnects, uvicorn tells only its
    newest request, so the work on older ones goes on.
    """

    def __init__(self) -> None:
        self.new: dict[RequestTask, Receive] = {}
        self.older: dict[RequestTask, Receive] = {}
        self.watchers: dict[RequestTask, asyncio.Task[None]] = {}
        self.left: set[RequestTask] = set()
        self.ticking = False

    async def watch(self, receive: Receive, work: Awaitable[Result]) -> Result:
        """Return the result of the work on a request.

        Parameters
        ----------
        receive
            Has returned the whole body; its next message is the client's disconnect.
        work
            Cancelled when the client disconnects.

        Raises
        ------
        ClientDisconnect
            If the client disconnects.
        """
        if not self.ticking:
            self.ticking = True
            # Looked up only here, since Python 3.11 makes a system call for it.
            self.loop = asyncio.get_running_loop()
            self.loop.call_later(TICK_SECONDS, self._tick)
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
            # Before the response is sent, since the end of a response looks like a disconnect, too.
            if self.new.pop(task, None) is None and self.older.pop(task, None) is None:
                self.watchers.pop(task).cancel()
                self.left.discard(task)

    def _tick(self) -> None:
        """Start to watch the clients of requests that are older than a tick."""
        for task, receive in self.older.items():
            self.watchers[task] = asyncio.create_task(self._cancel_on_disconnect(task, receive))
        self.older, self.new = self.new, {}
        self.ticking = bool(self.older)
        if self.ticking:
            self.loop.call_later(TICK_SECONDS, self._tick)

    async def _cancel_on_disconnect(self, task: RequestTask, receive: Receive) -> None:
        """Cancel the task of a request when its client disconnects."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.add(task)
        task.cancel()
