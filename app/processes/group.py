"""The worker processes of a service, as one of them sees them: ask all of them, change all of them.

A worker's request to all others goes to the parent (``supervisor``), which passes it on and gathers
the answers. A change is made by one worker first; the parent decides by the state that comes of it,
and the others follow.
"""

import asyncio
import socket
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol

from dropserve.app.processes.changes import Changes
from dropserve.app.processes.ipc import Channel, Unanswered, portable

# Longest wait for the parent, where it need not wait for other workers for long.
PARENT_SECONDS = 2.0


class Replies(NamedTuple):
    """The outcome of a request to all workers."""

    answers: list[object]  # one for each worker that answers, the asking one's first
    last: list[object]  # the last answers that were kept of living workers that do not answer now
    gone: object  # dead workers' answers, folded by the parent; None: none kept
    deaths: int  # workers that have died since the service was started
    silences: int  # requests since then that a living worker did not answer in time


class Serving(NamedTuple):
    """Message to the parent: this worker's event loop is running."""

    state: object  # served by the worker


class Broadcast(NamedTuple):
    """Request to the parent: put a request to all other workers, and gather their answers."""

    content: object
    answer: object  # of the worker that asks


class Change(NamedTuple):
    """Request to the parent, or from it to the first worker: change the served state."""

    content: object


class Changed(NamedTuple):
    """Response to it of that worker, which may have changed something in spite of an error."""

    state: object  # served now
    error: Exception | None


class Follow(NamedTuple):
    """Request to a worker: serve what another does after a change; returns the new state."""

    state: object
    change: object


class Pending(NamedTuple):
    """Request to the parent: return the changes that are not made yet."""


class Replace(NamedTuple):
    """Message to the parent: replace this worker."""

    reason: str


class Leave(NamedTuple):
    """Message to a worker: another takes your place, so answer what you have accepted and end."""


class Left(NamedTuple):
    """Request to the parent before such an end: keep this answer, which is the last."""

    answer: object


class Ping(NamedTuple):
    """Request to a worker: answer, to show that the event loop is not stuck."""


class Member(Protocol):
    """One process of a service, as its group needs it."""

    async def handle(self, content: object) -> object:
        """Answer a request, on the event loop.

        Two workers may send requests to each other at the same moment, so it must not wait for a
        lock that is held during a request.
        """

    async def follow(self, state: object, change: object) -> None:
        """Serve ``state``, which came of a change that another worker has made."""

    def state(self) -> object:
        """Return the served state."""

    def stop(self) -> None:
        """End as on a signal, since the parent is gone."""

    def leave(self) -> None:
        """End once the accepted requests are answered, since another worker takes over."""


class Group:
    """All worker processes of a service.

    Parameters
    ----------
    member
        This process.
    link
        Socket to the parent; None: this is the only process.
    """

    def __init__(self, member: Member, link: socket.socket | None) -> None:
        self.member = member
        self.channel = None if link is None else Channel(link, self.answer, member.stop)
        # Of the only process; otherwise the parent has them.
        self.changes = Changes()

    def start(self) -> None:
        """Take requests, and tell the parent so; called on the running event loop."""
        if self.channel:
            self.channel.start()
            self.channel.notify(Serving(self.member.state()))

    async def close(self, answer: object = None) -> None:
        """Leave the group: no requests go out or come in any more.

        ``answer``, if any, is the last of a worker that is replaced.
        """
        if self.channel:
            if answer is not None:
                with suppress(Unanswered):
                    await self.channel.request(Left(answer), PARENT_SECONDS)
            self.channel.close()

    async def answer(self, content: object) -> object:
        """Answer a request of the parent."""
        match content:
            case Change(change):
                error: Exception | None = None
                try:
                    await self.member.handle(change)
                # Any exception concerns whoever has asked for the change, not this process.
                except Exception as raised:
                    error = portable(raised)
                return Changed(self.member.state(), error)
            case Follow(state, change):
                await self.member.follow(state, change)
                return self.member.state()
            case Leave():
                self.member.leave()
                return None
            case Ping():
                return None
        return await self.member.handle(content)

    async def ask(self, content: object) -> Replies:
        """Put a request to this worker, then to all others; those that are stuck are left out.

        An exception raised in this worker is raised here, and the others are not asked. An
        exception in another worker is raised here once all have answered.

        Raises
        ------
        Unanswered
            If the parent is gone or stuck.
        """
        answer = await self.member.handle(content)
        if self.channel is None:
            return Replies([answer], [], None, 0, 0)
        replies = await self.channel.request(Broadcast(content, answer), PARENT_SECONDS)
        assert isinstance(replies, Replies)
        return replies

    async def change(self, content: object) -> None:
        """Have all workers change the served state, one change after the other.

        Raises whatever it raises in the worker that makes it first, and Unanswered if the parent is
        gone. Workers started later begin with the new state.
        """
        if self.channel:
            await self.channel.request(Change(content))
        else:
            make = partial(self.member.handle, content)
            await asyncio.shield(self.changes.request(content, make))

    async def pending(self) -> list[object]:
        """Return the changes that are not made yet, as far as the parent answers."""
        if self.channel is None:
            return self.changes.pending()
        with suppress(Unanswered):
            pending = await self.channel.request(Pending(), PARENT_SECONDS)
            assert isinstance(pending, list)
            return pending
        return []

    def replace(self, reason: str) -> None:
        """Have the parent replace this worker."""
        if self.channel:
            self.channel.notify(Replace(reason))
