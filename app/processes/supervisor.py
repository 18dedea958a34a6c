"""The parent of several worker processes: starts them, replaces those that die, stops them all.

It serves nothing itself. What one worker asks of all it passes on (see ``group``), and it keeps
what must outlive a worker: what a new one has to know, and the counts of those that died.

It runs an event loop of its own and waits there for signals, for what workers say and for their
ends, all at once. It never blocks on a worker: one that has stopped reading has its messages kept
here, to a limit, and its answer left out.
"""

import asyncio
import logging
import multiprocessing
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from uvicorn.config import STARTUP_FAILURE

from dropserve.app.processes.ipc import Broadcast, Change, Channel, Replies, Serving, Unanswered

# How long a worker may take to answer what another asks of all.
ANSWER_SECONDS = 60.0
# Once this many have died within so many seconds, one is replaced after each pause.
QUICK_DEATHS, QUICK_SECONDS, PAUSE_SECONDS = 3, 10.0, 1.0
# How long to read on from a worker that has ended.
SILENCE_SECONDS = 1.0

spawn = multiprocessing.get_context("spawn")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a new worker is given."""

    link: socket.socket  # for its Group
    state: object  # what the others serve, or None


class Keep(NamedTuple):
    """What of a worker's answers outlives it: the last that is ``kept``, folded into a whole."""

    kept: Callable[[object], bool]
    fold: Callable[[object, object], object]  # (None or what is kept of others, answer) -> both


class Worker:
    """A worker process, as the parent sees it.

    Parameters
    ----------
    process
        It, started.
    link
        To it.
    handle
        Answers what it asks.
    """

    def __init__(
        self,
        process: SpawnProcess,
        link: socket.socket,
        handle: Callable[["Worker", object], Awaitable[object]],
    ) -> None:
        self.process = process
        # Its log lines may come after it is closed.
        self.pid = process.pid
        self.silent = asyncio.Event()
        self.channel = Channel(link, partial(handle, self), self.silent.set)
        self.channel.start()
        # Of its answers, the last that is to be kept.
        self.last: object = None


def supervise(
    serve: Callable[[Start], None],
    workers: int,
    *,
    closing: Callable[[], None],
    on_hangup: object,
    keep: Keep,
    stop_seconds: float,
    answer_seconds: float = ANSWER_SECONDS,
) -> int:
    """Run workers until SIGTERM or SIGINT; return the exit status.

    Both are passed on to the workers as SIGTERM, each time they come. Of the signals that a
    terminal sends to every process in it, SIGINT and SIGHUP never reach a worker.

    Parameters
    ----------
    serve
        What a worker process runs, until it has drained; can be pickled. If one exits with
        uvicorn's STARTUP_FAILURE before the ``Group`` of any is started, all are stopped and 1 is
        returned.
    workers
        How many.
    closing
        Called when they are told to stop; it must close what is open here of what they listen on.
        Else clients could still connect, to nobody.
    on_hangup
        What SIGHUP asks of each worker.
    keep
        What outlives a worker.
    stop_seconds
        How long they may take to stop before they are killed.
    answer_seconds
        How long a worker may take to answer what another asks of all.
    """
    # Before any signal is blocked: starting it ends with SIGINT unblocked.
    resource_tracker.ensure_running()
    supervisor = Supervisor(serve, closing, on_hangup, keep, stop_seconds, answer_seconds)
    return asyncio.run(supervisor.run(workers))


@dataclass
class Supervisor:
    """The parent of some workers; the parameters are those of ``supervise``."""

    serve: Callable[[Start], None]
    closing: Callable[[], None]
    on_hangup: object
    keep: Keep
    stop_seconds: float
    answer_seconds: float
    workers: list[Worker] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 0
    served: bool = False  # whether any worker has
    state: object = None  # what all workers serve, as one of them last said
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    hanging_up: set[asyncio.Task[None]] = field(default_factory=set)
    gone: object = None
    deaths: int = 0
    # When the last few ended, and when the last was replaced or is to be.
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=QUICK_DEATHS))
    replaced: float = 0.0

    async def run(self, workers: int) -> int:
        """Run workers until they are stopped; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.hang_up)
        async with asyncio.TaskGroup() as places:
            for _ in range(workers):
                places.create_task(self.fill())
        return self.status

    def stop(self) -> None:
        """Tell all workers to stop, and see to it that they do."""
        if not self.stopping.is_set():
            self.stopping.set()
            self.closing()
            asyncio.get_running_loop().call_later(self.stop_seconds, self.kill)
        for worker in self.workers:
            worker.process.terminate()

    def kill(self) -> None:
        """End the workers that have not stopped."""
        for worker in self.workers:
            log.error("worker %d is killed: it does not stop", worker.pid)
            worker.process.kill()

    def hang_up(self) -> None:
        """Pass on SIGHUP."""
        task = asyncio.get_running_loop().create_task(self.change_all())
        self.hanging_up.add(task)
        task.add_done_callback(self.hanging_up.discard)

    async def change_all(self) -> None:
        """Have all workers do what SIGHUP asks."""
        try:
            await self.change(None, self.on_hangup)
        # Whatever it is, nobody waits for it.
        except Exception as error:
            log.error("a worker cannot do what SIGHUP asks: %s", error)

    async def fill(self) -> None:
        """Keep one worker running: when it dies, another in its place."""
        while not self.stopping.is_set():
            worker = await self.start()
            if worker:
                await self.end(worker)
            await self.pause()

    async def start(self) -> Worker | None:
        """Start a worker, or say in the log why that cannot be done."""
        # Within a change it would be given what was served before, and not be asked to change.
        async with self.changing:
            if self.stopping.is_set():
                return None
            try:
                return self.spawn()
            except OSError as error:
                # No memory or no process is to be had for the moment; the others go on meanwhile.
                log.error("a worker cannot be started: %s", error)
                return None

    def spawn(self) -> Worker:
        """Start a worker, which serves what the others do."""
        ours, theirs = socket.socketpair()
        start = Start(theirs, self.state)
        # It is a daemon so that none is left, and waited for, should this process fail.
        process = spawn.Process(target=self.serve, args=(start,), daemon=True)
        # A worker inherits what is blocked, so these cannot reach it even while it starts, nor
        # whatever handlers it sets.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # Only when the worker's copy is the last one does its end show here.
            theirs.close()
        worker = Worker(process, ours, self.answer)
        self.workers.append(worker)
        return worker

    async def end(self, worker: Worker) -> None:
        """Wait for the end of a worker, and see what it means."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(worker.process.sentinel, ended.set)
        await ended.wait()
        loop.remove_reader(worker.process.sentinel)
        # What it holds may take a while to be given back, as a GPU's memory.
        await asyncio.to_thread(worker.process.join)
        # What it said last is still to be read. Its end of the link does not close with it where a
        # process that it has started holds a copy, so this is not waited for without a limit.
        with suppress(TimeoutError):
            await asyncio.wait_for(worker.silent.wait(), SILENCE_SECONDS)
        status = worker.process.exitcode or 0
        worker.channel.close()
        worker.process.close()
        self.workers.remove(worker)
        if self.stopping.is_set():
            return
        if status == STARTUP_FAILURE and not self.served:
            # So would any other. Once one has served, that may change again: a worker that finds no
            # models to serve must not take those with it that do.
            log.error("worker %d cannot start; all are stopped", worker.pid)
            self.status = 1
            self.stop()
            return
        how = f"status {status}"
        if status < 0:
            how = f"signal {-status} ({signal.strsignal(-status)})"
        log.error("worker %d has ended with %s, and is replaced", worker.pid, how)
        self.deaths += 1
        if worker.last is not None:
            self.gone = self.keep.fold(self.gone, worker.last)

    async def pause(self) -> None:
        """Wait until a worker may be replaced: at once, unless many have ended of late."""
        now = time.monotonic()
        self.ends.append(now)
        quick = len(self.ends) == QUICK_DEATHS and now - self.ends[0] < QUICK_SECONDS
        self.replaced = max(now, self.replaced + PAUSE_SECONDS) if quick else now
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), self.replaced - now)

    async def answer(self, worker: Worker, content: object) -> object:
        """Answer what a worker asks."""
        match content:
            case Broadcast(question, answer):
                return await self.ask_others(worker, question, answer)
            case Change(question):
                await self.change(worker, question)
            case Serving(state):
                self.served = True
                if self.state is None:
                    self.state = state
        return None

    async def ask_others(self, asker: Worker, question: object, answer: object) -> Replies:
        """Ask all workers but one what that one has answered itself; raise what one of them raises.

        One that is still starting has the question wait for it.
        """
        self.note(asker, answer)
        answers = await self.ask_all([each for each in self.workers if each is not asker], question)
        answers = {asker: answer} | answers
        # What one has answered that is dead by now is in what is kept of it, and must not count
        # twice.
        living = [answer for worker, answer in answers.items() if worker in self.workers]
        return Replies(living, self.gone, self.deaths)

    async def change(self, asker: Worker | None, question: object) -> None:
        """Have all workers change what they serve, first the one who asks: raise what it raises."""
        async with self.changing:
            if asker:
                self.state = await asker.channel.request(Change(question), self.answer_seconds)
            others = [worker for worker in self.workers if worker is not asker]
            states = await self.ask_all(others, Change(question))
            if not asker:
                self.state = next(iter(states.values()), self.state)

    async def ask_all(self, workers: list[Worker], question: object) -> dict[Worker, object]:
        """Return the answers of some workers; raise what one of them raises, once all have said."""
        answers: dict[Worker, object] = {}

        async def ask(worker: Worker) -> None:
            try:
                answers[worker] = await worker.channel.request(question, self.answer_seconds)
            except Unanswered as error:
                log.error("worker %d is left out of an answer: %s", worker.pid, error)
            else:
                self.note(worker, answers[worker])

        outcomes = await asyncio.gather(*map(ask, workers), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        return answers

    def note(self, worker: Worker, answer: object) -> None:
        """Keep an answer for when its worker dies."""
        if self.keep.kept(answer):
            worker.last = answer
