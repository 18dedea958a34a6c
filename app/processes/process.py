"""A worker process, as the parent sees it: started, watched, told to end, killed."""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import SpawnProcess

from dropserve.app.processes.group import Leave, Ping
from dropserve.app.processes.ipc import Channel, Unanswered
from dropserve.app.server.server import STOP

# How often a worker is asked whether its event loop runs.
PING_SECONDS = 2.0
# The time that a worker may take to answer is waited for in so many parts. If this process itself
# was suspended, together with the workers, one part of it is over, and not all.
PARTS = 10
# Signals of a terminal, and of whoever signals a whole process group: the parent has them, too, and
# tells its workers.
FOREIGN = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM}

spawn = multiprocessing.get_context("spawn")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Arguments that a new worker gets from the parent."""

    link: socket.socket  # of its Group
    state: object  # that the other workers serve


class WorkerProcess:
    """A worker process.

    Parameters
    ----------
    process
        The process, started.
    link
        Socket to the process.
    state
        The state that it was told to serve.
    handle
        Answers a request of the worker.
    """

    def __init__(
        self,
        process: SpawnProcess,
        link: socket.socket,
        state: object,
        handle: Callable[["WorkerProcess", object], Awaitable[object]],
    ) -> None:
        self.process = process
        assert process.pid is not None
        # Log lines may need it after the process object is closed.
        self.pid = process.pid
        # Whether the end of the process was noticed, so that its pid may be another's soon.
        self.ended = False
        # What it serves, as last heard.
        self.state = state
        self.serving = asyncio.Event()
        # Whether another takes its place while it answers its last requests.
        self.leaving = asyncio.Event()
        self.silent = asyncio.Event()
        self.channel = Channel(link, partial(handle, self), self.silent.set)
        self.channel.start()
        # Its last answer that must be kept.
        self.last: object = None

    @classmethod
    def start(
        cls,
        serve: Callable[[Start], None],
        state: object,
        handle: Callable[["WorkerProcess", object], Awaitable[object]],
    ) -> "WorkerProcess":
        """Start a process that is to serve ``state``; raise OSError if the system cannot."""
        ours, theirs = socket.socketpair()
        # A daemon, as this process would wait at its exit for any other.
        process = spawn.Process(target=serve, args=(Start(theirs, state),), daemon=True)
        # A worker inherits blocked signals, so these never reach it: neither while it starts nor
        # later, whatever handlers it sets.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOREIGN)
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # The worker's end is noticed here only if its copy of the socket is the last one.
            theirs.close()
        return cls(process, ours, state, handle)

    def stop(self) -> None:
        """Tell the process to drain and end, or a second time to end at once.

        As long as it starts, and serves nothing, the signal ends it.
        """
        self.signal(STOP)

    def leave(self) -> None:
        """Tell the process to end once it has answered its last requests."""
        self.leaving.set()
        self.channel.notify(Leave())

    def kill(self, why: str) -> None:
        """End the process at once, if it still runs."""
        if not self.ended:
            log.error("worker %d is killed: %s", self.pid, why)
            self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal, if it still runs."""
        # multiprocessing waits for ended processes whenever it starts one.
        with suppress(ProcessLookupError):
            if not self.ended:
                os.kill(self.pid, number)

    async def watch(self, start_seconds: float, stuck_seconds: float) -> None:
        """Kill the process if it is not there in time, or if its event loop is stuck later on."""
        if not await within_parts(start_seconds, self.serving.wait()):
            self.kill(f"it has not started within {start_seconds:g} s")
            return
        while await within_parts(stuck_seconds, self.answers(stuck_seconds / PARTS)):
            await asyncio.sleep(min(PING_SECONDS, stuck_seconds / 2))
        self.kill(f"it has not answered for {stuck_seconds:g} s")

    async def answers(self, pause: float) -> None:
        """Wait for a sign of life."""
        while True:
            # It may have left too many messages unread to get another; or it is gone, and this is
            # cancelled soon.
            with suppress(Unanswered):
                await self.channel.request(Ping())
                return
            await asyncio.sleep(pause)


async def within_parts(seconds: float, sign: Coroutine[object, object, object]) -> bool:
    """Tell whether a sign comes in time, which is waited for in parts."""
    task = asyncio.ensure_future(sign)
    try:
        for _ in range(PARTS):
            done, _ = await asyncio.wait([task], timeout=seconds / PARTS)
            if done:
                return True
        return False
    finally:
        task.cancel()
