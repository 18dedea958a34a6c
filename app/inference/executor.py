"""One thread for work that would hold up the event loop; short and long work alternate in it.

Long work comes in pieces. Between two pieces a waiting short job gets its turn, so a request of one
row waits for one piece and not for ten thousand passes. The reverse holds, too: long work makes
progress while short jobs keep coming.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class Job(NamedTuple):
    """Waiting work, and the future that gets its result."""

    work: Callable[[], Any]
    result: "asyncio.Future[Any]"


class Executor:
    """Runs jobs in one thread, for one event loop."""

    def __init__(self) -> None:
        # One thread: two runs at once would compete for the core, and take twice the memory.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run")
        self.short: deque[Job] = deque()
        self.long: deque[Job] = deque()
        self.busy = False
        self.was_long = False

    def close(self) -> None:
        """End the thread after the present job."""
        self.thread.shutdown()

    def submit(self, work: Callable[[], Result], *, long: bool) -> "asyncio.Future[Result]":
        """Run work when its turn comes; a job cancelled before that is skipped."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        (self.long if long else self.short).append(Job(work, result))
        if not self.busy:
            self._start_next()
        return result

    def _start_next(self) -> None:
        """Start the next job, of the kind that did not have the last turn."""
        while self.short or self.long:
            self.was_long = bool(self.long) and not (self.was_long and self.short)
            job = (self.long if self.was_long else self.short).popleft()
            if not job.result.cancelled():
                self.busy = True
                run = asyncio.get_running_loop().run_in_executor(self.thread, job.work)
                run.add_done_callback(partial(self._finish, job))
                return
        self.busy = False

    def _finish(self, job: Job, done: "asyncio.Future[Any]") -> None:
        self._start_next()
        if job.result.cancelled():
            return
        if error := done.exception():
            job.result.set_exception(error)
        else:
            job.result.set_result(done.result())
