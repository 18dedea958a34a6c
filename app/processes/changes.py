"""Changes to the served state, made one after the other."""

import asyncio
from collections.abc import Awaitable, Callable


class Changes:
    """The changes that are under way or waiting, in one process.

    Equal changes that wait are one: thousands of SIGHUPs while the models are loaded lead to one
    more reload.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting: dict[object, asyncio.Task[None]] = {}
        # The change under way, if any.
        self.begun: list[object] = []

    def request(self, change: object, make: Callable[[], Awaitable[object]]) -> asyncio.Task[None]:
        """Make a change once those before it are made; an equal one that waits is made for both.

        Whoever awaits the task must shield it, since others may await it, too.
        """
        task = self.waiting.get(change)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._make(change, make))
            # Whoever has asked may have stopped waiting for the outcome.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self.waiting[change] = task
        return task

    async def _make(self, change: object, make: Callable[[], Awaitable[object]]) -> None:
        async with self.lock:
            del self.waiting[change]
            self.begun = [change]
            try:
                await make()
            finally:
                self.begun = []

    def pending(self) -> list[object]:
        """Return the changes that are not made yet."""
        return [*self.begun, *self.waiting]
