"""Share runs: jobs that arrive for a graph while one run is under way make up the next run.

Nothing waits for a batch to fill. While requests come one at a time, each is run at once. When they
come together, a run takes the jobs of two turns of the event loop. A run that should be short is
made on the event loop, since a hop to a thread and back would cost more than the run itself. A
longer one is made in the executor's thread, so that the loop stays responsive, for health probes
first of all.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from dropserve.app.errors import DeadlineExceeded
from dropserve.app.inference.executor import Executor
from dropserve.app.observability.record import RequestRecord

# Longest run on the event loop: the delay that it may cause to other requests.
ON_LOOP_SECONDS = 0.002
# Sizes of the runs that are timed to predict how long runs take; how often each is timed, and for
# how long in all.
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
        """Estimate how long a run of ``jobs`` jobs, ``size`` in total, takes."""
        return self.run + self.unit * size + self.job * jobs


class Paces(NamedTuple):
    """How long the runs of a model take: in eval mode, and of train-mode passes."""

    predict: Pace
    passes: Pace


def measure(run: Callable[[Sequence[int]], object], most: int, clock: Callable[[], float]) -> Pace:
    """Warm up ``run`` and time it.

    Parameters
    ----------
    run
        Takes the sizes of its jobs. It is timed for one small job, for a larger one, and for many
        small ones.
    most
        Largest size of a job.
    clock
        Returns seconds. On a CPU it should be the thread's own time: beside a busy event loop, each
        time that a run releases Python's lock costs it another 5 ms.
    """
    alone = best_seconds(run, [ALONE], clock)
    together = min(TOGETHER, most)
    if together == ALONE:
        return Pace(alone, alone)
    # A run that is slow already is not repeated on larger sizes, but one that fails must fail here.
    if alone > ON_LOOP_SECONDS:
        run([together])
        return Pace(alone, alone)
    unit = max(0.0, (best_seconds(run, [together], clock) - alone) / (together - ALONE))
    many = best_seconds(run, [ALONE] * together, clock)
    job = max(0.0, (many - alone) / (together - ALONE) - unit)
    return Pace(max(0.0, alone - unit - job), unit, job)


def best_seconds(
    run: Callable[[Sequence[int]], object], sizes: Sequence[int], clock: Callable[[], float]
) -> float:
    """Return the shortest time of a warm run."""
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


class Waiting(NamedTuple, Generic[Job, Result]):
    """A job in the queue, its request, when it was queued, and the future of its result."""

    job: Job
    size: int
    record: RequestRecord
    since: float
    result: "asyncio.Future[Result]"


class TimedRun(NamedTuple, Generic[Result]):
    """When a run began and ended, and the outcome of each job."""

    began: float
    ended: float
    outcomes: Sequence[Result | Exception]


class Batcher(Generic[Job, Result]):
    """Runs of one graph, shared by the requests of one event loop.

    Parameters
    ----------
    run
        Takes the jobs of a run; returns the result of each, or the exception that it met.
    pace
        How long runs take.
    most
        Largest size of a run, and of a job.
    executor
        Where long runs are made.
    pieces
        Whether the jobs are pieces of long work, which are all run in the executor.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Result | Exception]],
        pace: Pace,
        most: int,
        executor: Executor,
        *,
        pieces: bool = False,
    ) -> None:
        self.run = run
        self.pace = pace
        self.most = most
        self.executor = executor
        self.pieces = pieces
        self.waiting: deque[Waiting[Job, Result]] = deque()
        self.running = False
        # Whether jobs came together when last checked, and how many were run at once since then.
        self.crowded = True
        self.at_once = 0
        # Number of runs, by size.
        self.sizes: Counter[int] = Counter()

    async def submit(self, job: Job, size: int, record: RequestRecord) -> Result:
        """Return the result of a job; a job cancelled before its run is left out of it.

        Raises
        ------
        DeadlineExceeded
            If the request's time is up before the run begins.
        """
        now = time.monotonic()
        record.check_deadline(now)
        if not self.running:
            self.running = True
            # Looked up only here, since Python 3.11 makes a system call for it.
            self.loop = asyncio.get_running_loop()
            if self.crowded:
                # Wait for requests that the loop is about to read: their tasks start next turn.
                self.loop.call_soon(self.loop.call_soon, self._start)
            else:
                self.loop.call_soon(self._start)
                if self._fits_loop(size, 1):
                    self.at_once = 1
                    (outcome,) = self._outcomes([job], size)
                    record.run_seconds += time.monotonic() - now
                    if isinstance(outcome, Exception):
                        raise outcome
                    return outcome
        result: asyncio.Future[Result] = self.loop.create_future()
        self.waiting.append(Waiting(job, size, record, now, result))
        return await result

    def _fits_loop(self, size: int, jobs: int) -> bool:
        """Tell whether a run is short enough for the event loop."""
        return not self.pieces and self.pace.seconds(size, jobs) <= ON_LOOP_SECONDS

    def _start(self) -> None:
        """Start the next run, with the waiting jobs."""
        batch = self._take()
        self.crowded = self.at_once + len(batch) > 1
        self.at_once = 0
        if not batch:
            self.running = False
            return
        jobs = [waiting.job for waiting in batch]
        size = sum(waiting.size for waiting in batch)
        if self._fits_loop(size, len(batch)):
            self._finish(batch, self._timed(jobs, size))
        else:
            run = self.executor.submit(lambda: self._timed(jobs, size), long=self.pieces)
            run.add_done_callback(lambda done: self._finish(batch, done.result()))

    def _take(self) -> list[Waiting[Job, Result]]:
        """Take as many jobs as one run may hold, in order of arrival."""
        batch: list[Waiting[Job, Result]] = []
        size = 0
        now = time.monotonic()
        while self.waiting and (not batch or size + self.waiting[0].size <= self.most):
            waiting = self.waiting.popleft()
            if waiting.result.cancelled():
                continue
            try:
                waiting.record.check_deadline(now)
            except DeadlineExceeded as error:
                waiting.result.set_exception(error)
                continue
            batch.append(waiting)
            size += waiting.size
        return batch

    def _timed(self, jobs: Sequence[Job], size: int) -> TimedRun[Result]:
        began = time.monotonic()
        outcomes = self._outcomes(jobs, size)
        return TimedRun(began, time.monotonic(), outcomes)

    def _outcomes(self, jobs: Sequence[Job], size: int) -> Sequence[Result | Exception]:
        """Run jobs; an exception of the run itself is the outcome of every job."""
        self.sizes[size] += 1
        try:
            return self.run(jobs)
        except Exception as error:
            return [error] * len(jobs)

    def _finish(self, batch: Sequence[Waiting[Job, Result]], run: TimedRun[Result]) -> None:
        """Hand out the results of a run, and start the next."""
        for waiting, outcome in zip(batch, run.outcomes, strict=True):
            waiting.record.queue_seconds += run.began - waiting.since
            waiting.record.run_seconds += run.ended - run.began
            if waiting.result.cancelled():
                continue
            if isinstance(outcome, Exception):
                waiting.result.set_exception(outcome)
            else:
                waiting.result.set_result(outcome)
        if self.waiting:
            self.loop.call_soon(self._start)
        else:
            self.running = False
