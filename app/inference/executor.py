"""The one thread for what would hold up the event loop: short and long work take turns in it.

Long work comes in pieces. Between two of them a piece of short work gets its turn, so that a
request of one row waits for a piece, not for ten thousand passes; and the other way round, so that
long work goes on while short requests keep coming.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class Turn(NamedTuple):
    """Work that waits, and the future that gets its result."""

    work: Callable[[], Any]
    result: "asyncio.Future[Any]"


class Turns:
    """Makes work in one thread, for one event loop."""

    def __init__(self) -> None:
        # One thread: two runs at once would only take each other's core, and double the memory.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run")
        self.short: deque[Turn] = deque()
        self.long: deque[Turn] = deque()
        self.busy = False
        self.was_long = False

    def close(self) -> None:
        """End the thread, once what it is at is done."""
        self.thread.shutdown()

    def submit(self, work: Callable[[], Result], *, long: bool) -> "asyncio.Future[Result]":
        """Make work when its turn comes; cancelled before that, it is not begun."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        (self.long if long else self.short).append(Turn(work, result))
        if not self.busy:
            self.next()
        return result

    def next(self) -> None:
        """Begin the next piece of work, of the kind that did not have the last turn."""
        while self.short or self.long:
            self.was_long = bool(self.long) and not (self.was_long and self.short)
            turn = (self.long if self.was_long else self.short).popleft()
            if not turn.result.cancelled():
                self.busy = True
                made = asyncio.get_running_loop().run_in_executor(self.thread, turn.work)
                made.add_done_callback(partial(self.finish, turn))
                return
        self.busy = False

    def finish(self, turn: Turn, done: "asyncio.Future[Any]") -> None:
        """Begin what is next, and hand out the result."""
        self.next()
        if turn.result.cancelled():
            return
        if error := done.exception():
            turn.result.set_exception(error)
        else:
            turn.result.set_result(done.result())
