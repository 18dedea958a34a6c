"""What requests share a run, where it is made, and what they do not share."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from dropserve.app.errors import DeadlineExceeded
from dropserve.app.inference.batcher import ON_LOOP_SECONDS, Batcher, Pace, measure
from dropserve.app.inference.executor import Executor
from dropserve.app.observability.record import RequestRecord

SHORT, LONG = Pace(0, 0), Pace(1, 0)


@contextmanager
def thread() -> Iterator[Executor]:
    executor = Executor()
    try:
        yield executor
    finally:
        executor.close()


def call(seconds: float = 60) -> RequestRecord:
    return RequestRecord("POST", "test", "id", seconds)


class Doubler:
    """Doubles numbers, refuses negative ones, and keeps note of its runs."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.threads: set[threading.Thread] = set()

    def run(self, jobs: Sequence[int]) -> Sequence[int | Exception]:
        self.runs.append(list(jobs))
        self.threads.add(threading.current_thread())
        if 0 in jobs:
            raise ZeroDivisionError
        return [2 * job if job > 0 else ValueError(f"{job} is negative") for job in jobs]


def answers(doubler: Doubler, pace: Pace, jobs: Sequence[int], most: int = 100) -> list[object]:
    """Submit jobs of size 1 at once."""

    async def main() -> list[object]:
        with thread() as executor:
            batcher = Batcher(doubler.run, pace, most, executor)
            submitted = (batcher.submit(job, 1, call()) for job in jobs)
            return list(await asyncio.gather(*submitted, return_exceptions=True))

    return asyncio.run(main())


@pytest.mark.parametrize("pace", [SHORT, LONG])
def test_what_is_asked_for_at_once_is_one_run(pace: Pace) -> None:
    doubler = Doubler()
    assert answers(doubler, pace, [1, 2, 3]) == [2, 4, 6]
    assert doubler.runs == [[1, 2, 3]]


@pytest.mark.parametrize("pace", [SHORT, LONG])
def test_a_run_holds_no_more_than_it_may_and_keeps_the_order(pace: Pace) -> None:
    doubler = Doubler()
    assert answers(doubler, pace, [1, 2, 3, 4, 5], most=2) == [2, 4, 6, 8, 10]
    assert doubler.runs == [[1, 2], [3, 4], [5]]


def test_while_jobs_come_one_at_a_time_each_is_run_at_once_and_those_beside_it_share_the_next() -> (
    None
):
    doubler = Doubler()

    async def main() -> None:
        with thread() as executor:
            batcher = Batcher(doubler.run, SHORT, 100, executor)
            assert await batcher.submit(1, 1, call()) == 2
            # No turn of the loop passes before the result is there.
            with pytest.raises(StopIteration, match="4"):
                batcher.submit(2, 1, call()).send(None)
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="-3 is negative"):
                await batcher.submit(-3, 1, call())
            await asyncio.sleep(0)
            for _ in range(2):
                submitted = (batcher.submit(job, 1, call()) for job in (4, 5, 6))
                assert await asyncio.gather(*submitted) == [8, 10, 12]
                await asyncio.sleep(0)

    asyncio.run(main())
    assert doubler.runs == [[1], [2], [-3], [4], [5, 6], [4, 5, 6]]


def test_what_two_turns_of_the_loop_bring_is_one_run() -> None:
    doubler = Doubler()

    async def main() -> list[int]:
        with thread() as executor:
            batcher = Batcher(doubler.run, SHORT, 100, executor)
            first = asyncio.create_task(batcher.submit(1, 1, call()))
            await asyncio.sleep(0)
            # Read only now, as the next request that waits at the socket.
            second = asyncio.create_task(batcher.submit(2, 1, call()))
            return [await first, await second]

    assert asyncio.run(main()) == [2, 4]
    assert doubler.runs == [[1, 2]]


def test_jobs_that_keep_coming_in_pairs_share_their_runs() -> None:
    doubler = Doubler()

    async def client(batcher: Batcher[int, int], jobs: Sequence[int]) -> None:
        for job in jobs:
            assert await batcher.submit(job, 1, call()) == 2 * job

    async def main() -> None:
        with thread() as executor:
            batcher = Batcher(doubler.run, SHORT, 100, executor)
            await batcher.submit(9, 1, call())
            await asyncio.sleep(0)
            await asyncio.gather(client(batcher, [1, 3, 5]), client(batcher, [2, 4, 6]))

    asyncio.run(main())
    # When the first came, no other was to be expected.
    assert doubler.runs == [[9], [1], [3, 2], [5, 4], [6]]


def test_a_long_run_is_made_in_the_worker_also_where_jobs_come_one_at_a_time() -> None:
    doubler = Doubler()

    async def main() -> None:
        with thread() as executor:
            batcher = Batcher(doubler.run, LONG, 100, executor)
            for job in (1, 2, 3):
                assert await batcher.submit(job, 1, call()) == 2 * job
                await asyncio.sleep(0)

    asyncio.run(main())
    assert threading.current_thread() not in doubler.threads


def test_short_runs_are_made_on_the_loop_and_long_ones_in_the_worker() -> None:
    short, long = Doubler(), Doubler()
    answers(short, SHORT, [1])
    answers(long, LONG, [1])
    assert short.threads == {threading.current_thread()}
    assert long.threads != short.threads


def test_where_a_run_is_made_depends_on_its_size() -> None:
    pace = Pace(run=0, unit=ON_LOOP_SECONDS / 2)
    for jobs, on_loop in (([1, 2], True), ([1, 2, 3], False)):
        doubler = Doubler()
        answers(doubler, pace, jobs)
        assert (doubler.threads == {threading.current_thread()}) == on_loop


@pytest.mark.parametrize("pace", [SHORT, LONG])
def test_what_one_job_meets_does_not_touch_the_others(pace: Pace) -> None:
    first, second, third = answers(Doubler(), pace, [1, -2, 3])
    assert (first, third) == (2, 6)
    assert isinstance(second, ValueError)


@pytest.mark.parametrize("pace", [SHORT, LONG])
def test_a_run_that_fails_fails_for_each_of_its_jobs_and_not_for_the_next(pace: Pace) -> None:
    doubler = Doubler()
    found = answers(doubler, pace, [1, 0, 3], most=2)
    assert [type(each) for each in found] == [ZeroDivisionError, ZeroDivisionError, int]


def answers_of_late_ones(
    doubler: Doubler, first: Sequence[int], late: Sequence[int], cancelled: int
) -> list[int]:
    """Submit jobs, more while their run is under way, and cancel one of them all meanwhile."""
    started, go_on = threading.Event(), threading.Event()

    def run(jobs: Sequence[int]) -> Sequence[int | Exception]:
        started.set()
        assert go_on.wait(10)
        return doubler.run(jobs)

    async def main() -> list[int]:
        with thread() as executor:
            batcher: Batcher[int, int] = Batcher(run, LONG, 100, executor)
            tasks = {job: asyncio.create_task(batcher.submit(job, 1, call())) for job in first}
            assert await asyncio.to_thread(started.wait, 10)
            tasks |= {job: asyncio.create_task(batcher.submit(job, 1, call())) for job in late}
            await asyncio.sleep(0)
            tasks.pop(cancelled).cancel()
            await asyncio.sleep(0)
            go_on.set()
            return [await task for task in tasks.values()]

    return asyncio.run(main())


def test_what_comes_while_a_run_is_under_way_is_the_next_run_without_what_was_cancelled() -> None:
    doubler = Doubler()
    assert answers_of_late_ones(doubler, [1], [2, 3, 4], cancelled=3) == [2, 4, 8]
    assert doubler.runs == [[1], [2, 4]]


def test_a_job_cancelled_while_its_run_is_under_way_harms_no_other() -> None:
    doubler = Doubler()
    assert answers_of_late_ones(doubler, [1, 2], [3], cancelled=1) == [4, 6]
    assert doubler.runs == [[1, 2], [3]]


def test_many_jobs_are_longer_than_one_as_large() -> None:
    pace = Pace(run=0, unit=0, job=ON_LOOP_SECONDS / 2)
    for jobs, on_loop in (([1, 2], True), ([1, 2, 3], False)):
        doubler = Doubler()
        answers(doubler, pace, jobs)
        assert (doubler.threads == {threading.current_thread()}) == on_loop


class Clock:
    """A clock that moves only while runs are made."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def timed(self, seconds: Callable[[Sequence[int]], float]) -> Callable[[Sequence[int]], None]:
        """Return a run that takes some seconds, which depend on the sizes of its jobs."""

        def run(sizes: Sequence[int]) -> None:
            self.now += seconds(sizes)

        return run


def test_a_slow_run_is_tried_at_a_larger_size_only_once_and_not_timed_there() -> None:
    tried: list[Sequence[int]] = []

    def slow(sizes: Sequence[int]) -> float:
        tried.append(sizes)
        return 2 * ON_LOOP_SECONDS

    clock = Clock()
    pace = measure(clock.timed(slow), 100, clock)
    # Once, since a graph that fails at that size must not be served.
    assert [sizes for sizes in tried if sizes != [1]] == [[64]]
    assert pace.seconds(1, 1) > ON_LOOP_SECONDS
    assert pace.seconds(100, 1) > 50 * ON_LOOP_SECONDS


def test_what_a_run_costs_a_unit_and_a_job_is_told_apart() -> None:
    clock = Clock()
    run = clock.timed(lambda sizes: 1e-4 + 2e-5 * len(sizes) + 1e-5 * sum(sizes))
    pace = measure(run, 1000, clock)
    assert pace.seconds(1, 1) == pytest.approx(1.3e-4)
    assert pace.seconds(100, 1) == pytest.approx(1.12e-3)
    assert pace.seconds(100, 100) == pytest.approx(3.1e-3)


def test_a_thread_that_is_busy_beside_it_does_not_make_a_run_longer() -> None:
    over = threading.Event()

    def keep_busy() -> None:
        while not over.is_set():
            pass

    def run(sizes: Sequence[int]) -> None:
        end = time.thread_time() + 1e-5 * sum(sizes)
        while time.thread_time() < end:
            # Lets go of Python's lock, as onnxruntime does.
            time.sleep(0)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        pace = measure(run, 1000, time.thread_time)
    finally:
        over.set()
        busy.join()
    assert 0.9e-3 < pace.seconds(100, 1) < ON_LOOP_SECONDS


def test_a_run_is_never_tried_larger_than_it_may_be() -> None:
    tried: list[Sequence[int]] = []
    measure(tried.append, 7, Clock())
    assert max(sum(sizes) for sizes in tried) == 7


def test_a_job_whose_time_is_up_before_its_run_is_left_out_of_it() -> None:
    doubler = Doubler()

    async def main() -> list[object]:
        with thread() as executor:
            batcher = Batcher(doubler.run, SHORT, 100, executor)
            late, punctual = (
                RequestRecord("POST", "test", "late", 0.01),
                RequestRecord("POST", "test", "punctual", 60),
            )
            submitted = [batcher.submit(1, 1, late), batcher.submit(2, 1, punctual)]
            tasks = [asyncio.create_task(each) for each in submitted]
            await asyncio.sleep(0)
            time.sleep(0.02)
            found: list[object] = list(await asyncio.gather(*tasks, return_exceptions=True))
            with pytest.raises(DeadlineExceeded, match="not ready within 10 ms"):
                await batcher.submit(3, 1, late)
            return found

    first, second = asyncio.run(main())
    assert isinstance(first, DeadlineExceeded)
    assert second == 4
    assert doubler.runs == [[2]]


def test_a_call_knows_how_long_it_has_waited_and_how_long_its_run_took() -> None:
    asked = call()

    def run(jobs: Sequence[int]) -> Sequence[int]:
        time.sleep(0.02)
        return jobs

    async def main() -> float:
        with thread() as executor:
            go_on = threading.Event()
            executor.submit(lambda: go_on.wait(10), long=True)
            began = time.monotonic()
            waits = asyncio.create_task(Batcher(run, LONG, 100, executor).submit(1, 1, asked))
            await asyncio.sleep(0)
            time.sleep(0.05)
            go_on.set()
            await waits
            return time.monotonic() - began

    whole = asyncio.run(main())
    assert asked.queue_seconds >= 0.05
    assert asked.run_seconds >= 0.02
    assert asked.queue_seconds + asked.run_seconds <= whole


def test_pieces_of_long_work_are_made_in_the_thread_however_short_they_are() -> None:
    doubler = Doubler()

    async def main() -> int:
        with thread() as executor:
            batcher = Batcher(doubler.run, SHORT, 100, executor, pieces=True)
            return await batcher.submit(1, 1, call())

    assert asyncio.run(main()) == 2
    assert threading.current_thread() not in doubler.threads
