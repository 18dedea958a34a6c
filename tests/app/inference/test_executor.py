"""In which order short and long work is made."""

import asyncio
import threading

import pytest

from dropserve.app.inference.executor import Executor


def order(short: int, long: int) -> str:
    """Submit so much work, behind a piece that is under way; return the order it is made in."""
    made: list[str] = []

    async def main() -> None:
        executor = Executor()
        go_on = threading.Event()
        first = executor.submit(lambda: go_on.wait(10), long=True)
        waiting = [executor.submit(lambda: made.append("l"), long=True) for _ in range(long)]
        waiting += [executor.submit(lambda: made.append("s"), long=False) for _ in range(short)]
        go_on.set()
        await asyncio.gather(first, *waiting)
        executor.close()

    asyncio.run(main())
    return "".join(made)


def test_short_and_long_work_take_turns() -> None:
    assert order(short=3, long=3) == "slslsl"


def test_who_is_alone_need_not_wait() -> None:
    assert order(short=0, long=3) == "lll"
    assert order(short=4, long=1) == "slsss"


def test_what_is_cancelled_before_its_turn_is_not_begun() -> None:
    made: list[int] = []

    async def main() -> None:
        executor = Executor()
        go_on = threading.Event()
        first = executor.submit(lambda: go_on.wait(10), long=False)
        second = executor.submit(lambda: made.append(2), long=False)
        third = executor.submit(lambda: made.append(3), long=False)
        second.cancel()
        go_on.set()
        await asyncio.gather(first, third)
        executor.close()

    asyncio.run(main())
    assert made == [3]


def test_what_work_meets_is_raised_where_it_is_waited_for_and_the_next_goes_on() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    async def main() -> int:
        executor = Executor()
        with pytest.raises(ZeroDivisionError):
            await executor.submit(fail, long=True)
        try:
            return await executor.submit(lambda: 3, long=True)
        finally:
            executor.close()

    assert asyncio.run(main()) == 3
