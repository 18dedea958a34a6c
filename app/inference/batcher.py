"""Share runs: what requests ask of a graph while one run is under way is the next run.

Nothing waits for a batch to fill. While requests come one at a time, each is run the moment it is
there. As soon as they come together, a run takes what two turns of the event loop have brought. A
run that should be short is made on the event loop, where a hop to a thread and back would cost more
than the run itself; a longer one is made in the worker thread, so that the loop goes on answering,
health probes first of all.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from dropserve.app.errors import DeadlineExceeded
from dropserve.app.inference.executor import Turns
from dropserve.app.observability.record import Call

# What other requests may have to wait for a run on the loop.
ON_LOOP_SECONDS = 0.002
# Sizes that are timed to tell how long a run takes; how often, and how long that may take in all.
ALONE, TOGETHER = 1, 64
TIMINGS, TIMING_SECONDS = 5, 0.1

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pace:
    """How long a run takes: seconds for itself, for each unit of its size, and for each job."""

    run: float
    unit: float
    job: float = 0.0

    def seconds(self, size: int, jobs: int) -> float:
        """Estimate how long a run of ``jobs`` jobs, ``size`` together, takes."""
        return self.run + self.unit * size + self.job * jobs


def measure(run: Callable[[Sequence[int]], object], most: int, clock: Callable[[], float]) -> Pace:
    """Warm up ``run``, which takes the sizes of its jobs, and time it.

    It is timed for a small job, for a larger one, at most ``most``, and for many small ones, by a
    ``clock`` of seconds. On a CPU that should be the thread's own: beside a busy event loop, each
    time that a run lets go of Python's lock costs another 5 ms.
    """
    alone = seconds(run, [ALONE], clock)
    together = min(TOGETHER, most)
    # A run that is slow already is not made again and again, and larger, to see how slow.
    if alone > ON_LOOP_SECONDS or together == ALONE:
        return Pace(alone, alone)
    unit = max(0.0, (seconds(run, [together], clock) - alone) / (together - ALONE))
    job = max(0.0, (seconds(run, [ALONE] * together, clock) - alone) / (together - ALONE) - unit)
    return Pace(max(0.0, alone - unit - job), unit, job)


def seconds(
    run: Callable[[Sequence[int]], object], sizes: Sequence[int], clock: Callable[[], float]
) -> float:
    """Return how long a warm run takes, at best."""
    run(sizes)
    begun = clock()
    best = float("inf")
    for _ in range(TIMINGS):
        start = clock()
        run(sizes)
        end = clock()
        best = min(best, end - start)
        if end - begun > TIMING_SECONDS:
            break
    return best


class Waiting(NamedTuple):
    """A job, whose it is, since when it waits, and the future that gets its result."""

    job: Any
    size: int
    call: Call
    since: float
    result: "asyncio.Future[Any]"


class Timed(NamedTuple, Generic[Result]):
    """The outcomes of a run, and when it began and ended."""

    began: float
    ended: float
    outcomes: Sequence[Result | Exception]


class Batcher(Generic[Job, Result]):
    """Runs of one graph, shared by the requests of one event loop.

    Parameters
    ----------
    run
        Takes the jobs of a run, and returns for each its result or the exception that it met.
    pace
        How long runs take.
    most
        Largest size of a run; a single job may be no larger.
    turns
        Where long runs are made.
    pieces
        Whether the jobs are pieces of long work, whose runs are all made there.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Result | Exception]],
        pace: Pace,
        most: int,
        turns: Turns,
        *,
        pieces: bool = False,
    ) -> None:
        self.run = run
        self.pace = pace
        self.most = most
        self.turns = turns
        self.pieces = pieces
        self.waiting: deque[Waiting] = deque()
        self.running = False
        # Whether jobs came together when last looked at, and how many were run at once since.
        self.crowded = True
        self.at_once = 0
        # How many runs were of which size.
        self.sizes: Counter[int] = Counter()

    async def submit(self, job: Job, size: int, call: Call) -> Result:
        """Return the result of a job; cancelled before its run begins, it is left out of it.

        Raises
        ------
        DeadlineExceeded
            If its time is up before its run begins.
        """
        now = time.monotonic()
        call.check_time(now)
        if not self.running:
            self.running = True
            # Not asked for each job: Python 3.11 makes a system call of it.
            self.loop = asyncio.get_running_loop()
            if self.crowded:
                # Behind those that the loop is about to read: their tasks begin in its next turn.
                self.loop.call_soon(self.loop.call_soon, self.start)
            else:
                self.loop.call_soon(self.start)
                if self.on_loop(size, 1):
                    self.at_once = 1
                    (outcome,) = self.outcomes([job], size)
                    call.ran += time.monotonic() - now
                    if isinstance(outcome, Exception):
                        raise outcome
                    return outcome
        waiting = Waiting(job, size, call, now, self.loop.create_future())
        self.waiting.append(waiting)
        result: Result = await waiting.result
        return result

    def on_loop(self, size: int, jobs: int) -> bool:
        """Tell whether a run is made on the event loop."""
        return not self.pieces and self.pace.seconds(size, jobs) <= ON_LOOP_SECONDS

    def start(self) -> None:
        """Make the next run of what is waiting."""
        batch = self.take()
        self.crowded = self.at_once + len(batch) > 1
        self.at_once = 0
        if not batch:
            self.running = False
            return
        jobs = [waiting.job for waiting in batch]
        size = sum(waiting.size for waiting in batch)
        if self.on_loop(size, len(batch)):
            self.finish(batch, self.timed(jobs, size))
        else:
            run = self.turns.submit(lambda: self.timed(jobs, size), long=self.pieces)
            run.add_done_callback(lambda done: self.finish(batch, done.result()))

    def take(self) -> list[Waiting]:
        """Take as many jobs as one run may hold, in the order they came."""
        batch: list[Waiting] = []
        size = 0
        now = time.monotonic()
        while self.waiting and (not batch or size + self.waiting[0].size <= self.most):
            waiting = self.waiting.popleft()
            if waiting.result.cancelled():
                continue
            try:
                waiting.call.check_time(now)
            except DeadlineExceeded as error:
                waiting.result.set_exception(error)
                continue
            batch.append(waiting)
            size += waiting.size
        return batch

    def timed(self, jobs: Sequence[Job], size: int) -> Timed[Result]:
        """Run jobs; say when the run began, and when it ended."""
        began = time.monotonic()
        outcomes = self.outcomes(jobs, size)
        return Timed(began, time.monotonic(), outcomes)

    def outcomes(self, jobs: Sequence[Job], size: int) -> Sequence[Result | Exception]:
        """Run jobs; what makes the run itself fail is the outcome of each of them."""
        self.sizes[size] += 1
        try:
            return self.run(jobs)
        except Exception as error:
            return [error] * len(jobs)

    def finish(self, batch: Sequence[Waiting], run: Timed[Result]) -> None:
        """Hand out the results of a run, and go on with the next."""
        for waiting, outcome in zip(batch, run.outcomes, strict=True):
            waiting.call.queued += run.began - waiting.since
            waiting.call.ran += run.ended - run.began
            if waiting.result.cancelled():
                continue
            if isinstance(outcome, Exception):
                waiting.result.set_exception(outcome)
            else:
                waiting.result.set_result(outcome)
        if self.waiting:
            self.loop.call_soon(self.start)
        else:
            self.running = False
