"""A client that leaves ends the work on its request, and nothing else does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from dropserve.app.http.disconnect import TICK_SECONDS, DisconnectWatcher

SOON, LATE = TICK_SECONDS / 10, 5 * TICK_SECONDS


class Client:
    """What a request is received from."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


def watched(scenario: Callable[[DisconnectWatcher, Client], Awaitable[None]]) -> None:
    """Run a scenario; nothing may be left of it."""

    async def main() -> None:
        watcher = DisconnectWatcher()
        await scenario(watcher, Client())
        await asyncio.sleep(LATE)
        kept = [watcher.new, watcher.older, watcher.watchers, watcher.left]
        assert not any(kept)
        assert not watcher.ticking
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def work(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "done"


@pytest.mark.parametrize("seconds", [0, SOON, LATE])
def test_work_gives_its_result_however_long_it_takes(seconds: float) -> None:
    async def scenario(watcher: DisconnectWatcher, client: Client) -> None:
        results = [watcher.watch(client.receive, work(seconds)) for _ in range(3)]
        assert await asyncio.gather(*results) == ["done"] * 3

    watched(scenario)


def test_a_client_that_leaves_ends_its_own_work() -> None:
    async def scenario(watcher: DisconnectWatcher, client: Client) -> None:
        stays = asyncio.create_task(watcher.watch(Client().receive, work(LATE)))
        leaves = asyncio.create_task(watcher.watch(client.receive, work(60)))
        client.gone.set()
        with pytest.raises(ClientDisconnect):
            await leaves
        assert await stays == "done"

    watched(scenario)


@pytest.mark.parametrize("seconds", [0, SOON, LATE])
def test_what_work_raises_is_raised(seconds: float) -> None:
    async def fails() -> None:
        await asyncio.sleep(seconds)
        raise ZeroDivisionError

    async def scenario(watcher: DisconnectWatcher, client: Client) -> None:
        with pytest.raises(ZeroDivisionError):
            await watcher.watch(client.receive, fails())

    watched(scenario)


@pytest.mark.parametrize("seconds", [SOON, LATE])
def test_another_cancellation_stays_one(seconds: float) -> None:
    async def scenario(watcher: DisconnectWatcher, client: Client) -> None:
        task = asyncio.create_task(watcher.watch(client.receive, work(60)))
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    watched(scenario)
