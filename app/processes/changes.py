"""Changes to the served state, made one after the other."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable


class Changes:
    """The changes that are under way or waiting, in one process.

    A change that equals the last one waiting is one with it: thousands of SIGHUPs while the models
    are loaded lead to one more reload. An earlier one does not count: load, unload, load are three.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting: deque[tuple[object, asyncio.Task[None]]] = deque()
        # The change under way, if any.
        self.begun: list[object] = []

    def request(self, change: object, make: Callable[[], Awaitable[object]]) -> asyncio.Task[None]:
        """Make a change once those before it are made; an equal last one is made for both.

        Whoever awaits the task must shield it, since others may await it, too.
        """
        if self.waiting and self.waiting[-1][0] == change:
            return self.waiting[-1][1]
        task = asyncio.get_running_loop().create_task(self._make(change, make))
        # Whoever has asked may have stopped waiting for the outcome.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.waiting.append((change, task))
        return task

    async def _make(self, change: object, make: Callable[[], Awaitable[object]]) -> None:
        # Tasks get the lock in the order in which they were made.
        async with self.lock:
            self.waiting.popleft()
            self.begun = [change]
            try:
                await make()
            finally:
                self.begun = []

    def pending(self) -> list[object]:
        """Return the changes that are not made yet."""
        return [*self.begun, *(change for change, _ in self.waiting)]
