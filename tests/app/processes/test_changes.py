"""Changes to the served state are made one after the other, and none is taken for another."""

import asyncio
from functools import partial

from dropserve.app.processes.changes import Changes
from dropserve.app.processes.worker import Load, Reload, Unload


def made_of(asked: list[object]) -> list[object]:
    """Ask for changes while one is under way; return those that are made after it, in order."""
    made: list[object] = []

    async def make(change: object) -> None:
        made.append(change)

    async def ask() -> None:
        changes = Changes()
        free = asyncio.Event()
        first = changes.request(Load("first"), free.wait)
        # It is begun.
        await asyncio.sleep(0)
        tasks = [changes.request(change, partial(make, change)) for change in asked]
        assert changes.pending()[0] == Load("first")
        free.set()
        await asyncio.gather(first, *tasks)
        assert changes.pending() == []

    asyncio.run(ask())
    return made


def test_changes_are_made_in_the_order_in_which_they_were_asked_for() -> None:
    asked: list[object] = [Load("a"), Unload("a"), Load("a"), Load("b"), Reload(), Load("a")]
    assert made_of(asked) == asked


def test_a_change_that_equals_the_last_one_waiting_is_made_once_for_both() -> None:
    assert made_of([Reload()] * 2000) == [Reload()]
    assert made_of([Load("a"), Load("a"), Reload(), Reload()]) == [Load("a"), Reload()]


def test_loading_and_unloading_a_model_are_different_changes() -> None:
    assert made_of([Unload("a"), Load("a")]) == [Unload("a"), Load("a")]
