"""The parent of several worker processes: starts them, replaces dead ones, stops them all.

It serves no clients itself. It passes on requests from one worker to all (see ``ipc``), and keeps
the state that must outlive a worker: the served state for new ones, and the counts of dead ones.

Its event loop waits for signals, for messages of workers and for their ends at once. It never
blocks on a worker: messages to a worker that has stopped reading are buffered up to a limit, and
its answers are left out.
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

# Longest wait for a worker's answer to a request of another worker.
ANSWER_SECONDS = 60.0
# Once this many workers have died within this many seconds, one is replaced after each pause.
QUICK_DEATHS, QUICK_SECONDS, PAUSE_SECONDS = 3, 10.0, 1.0
# Longest wait for the last messages of a worker that has ended.
SILENCE_SECONDS = 1.0

spawn = multiprocessing.get_context("spawn")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Arguments that a new worker gets from the parent."""

    link: socket.socket  # of its Group
    state: object  # served by the other workers, or None


class Keep(NamedTuple):
    """Rules for the answers that outlive a dead worker: its last ``kept`` one, folded into one."""

    kept: Callable[[object], bool]
    fold: Callable[[object, object], object]  # (result of earlier folds or None, answer) -> both


class WorkerProcess:
    """A worker process, as the parent sees it.

    Parameters
    ----------
    process
        The process, started.
    link
        Socket to the process.
    handle
        Answers a request of the worker.
    """

    def __init__(
        self,
        process: SpawnProcess,
        link: socket.socket,
        handle: Callable[["WorkerProcess", object], Awaitable[object]],
    ) -> None:
        self.process = process
        # Log lines may need it after the process object is closed.
        self.pid = process.pid
        self.silent = asyncio.Event()
        self.channel = Channel(link, partial(handle, self), self.silent.set)
        self.channel.start()
        # Its last answer that must be kept.
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

    Both are passed on to the workers as SIGTERM, every time. SIGINT and SIGHUP, which a terminal
    sends to all of its processes, never reach a worker directly.

    Parameters
    ----------
    serve
        Main function of a worker process, which returns after a graceful shutdown; must be
        picklable. If a worker exits with uvicorn's STARTUP_FAILURE before the ``Group`` of any is
        started, all are stopped and 1 is returned.
    workers
        Number of workers.
    closing
        Called when the workers are told to stop; it must close this process's copy of the socket
        that they listen on. Otherwise clients could still connect, and nobody would answer.
    on_hangup
        Request to each worker after SIGHUP.
    keep
        Rules for the answers that outlive a worker.
    stop_seconds
        Longest time that workers may take to stop; after it they are killed.
    answer_seconds
        Longest wait for a worker's answer to a request of another worker.
    """
    # Before any signal is blocked: starting the tracker leaves SIGINT unblocked.
    resource_tracker.ensure_running()
    supervisor = Supervisor(serve, closing, on_hangup, keep, stop_seconds, answer_seconds)
    return asyncio.run(supervisor.run(workers))


@dataclass
class Supervisor:
    """The parent of the workers, with the parameters of ``supervise``."""

    serve: Callable[[Start], None]
    closing: Callable[[], None]
    on_hangup: object
    keep: Keep
    stop_seconds: float
    answer_seconds: float
    workers: list[WorkerProcess] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 0
    served: bool = False  # whether any worker has ever served
    state: object = None  # served by all workers, as last reported by one of them
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    hanging_up: set[asyncio.Task[None]] = field(default_factory=set)
    gone: object = None  # folded answers of dead workers
    deaths: int = 0
    # Times when the last few workers ended, and when the last was or will be replaced.
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
        """Tell all workers to stop; kill them later if they do not."""
        if not self.stopping.is_set():
            self.stopping.set()
            self.closing()
            asyncio.get_running_loop().call_later(self.stop_seconds, self.kill)
        for worker in self.workers:
            worker.process.terminate()

    def kill(self) -> None:
        """Kill the workers that have not stopped."""
        for worker in self.workers:
            log.error("worker %d is killed: it does not stop", worker.pid)
            worker.process.kill()

    def hang_up(self) -> None:
        """Put the request of SIGHUP to all workers, in the background."""
        task = asyncio.get_running_loop().create_task(self.change_all())
        self.hanging_up.add(task)
        task.add_done_callback(self.hanging_up.discard)

    async def change_all(self) -> None:
        """Put the request of SIGHUP to all workers; log a failure."""
        try:
            await self.change(None, self.on_hangup)
        # No caller waits for this, so the log is the only place for any exception.
        except Exception as error:
            log.error("the reload after SIGHUP failed: %s", error)

    async def fill(self) -> None:
        """Keep one worker running: when it dies, start another in its place."""
        while not self.stopping.is_set():
            worker = await self.start()
            if worker:
                await self.end(worker)
            await self.pause()

    async def start(self) -> WorkerProcess | None:
        """Start a worker, or log why that fails."""
        # During a change it would be given the previous state, and miss the request to change.
        async with self.changing:
            if self.stopping.is_set():
                return None
            try:
                return self.spawn()
            except OSError as error:
                # The system may be short of memory or processes; the other workers go on meanwhile.
                log.error("a worker cannot be started: %s", error)
                return None

    def spawn(self) -> WorkerProcess:
        """Start a worker that serves the same as the others."""
        ours, theirs = socket.socketpair()
        start = Start(theirs, self.state)
        # As a daemon it is ended, rather than waited for, if this process fails.
        process = spawn.Process(target=self.serve, args=(start,), daemon=True)
        # A worker inherits blocked signals, so these two never reach it: neither while it starts
        # nor later, whatever handlers it sets.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # The worker's end is noticed here only if its copy of the socket is the last one.
            theirs.close()
        worker = WorkerProcess(process, ours, self.answer)
        self.workers.append(worker)
        return worker

    async def end(self, worker: WorkerProcess) -> None:
        """Wait for the end of a worker; keep its counts, or stop all if none can start."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(worker.process.sentinel, ended.set)
        await ended.wait()
        loop.remove_reader(worker.process.sentinel)
        # Its resources, such as a GPU's memory, may take a while to be released.
        await asyncio.to_thread(worker.process.join)
        # Its last messages have yet to be read. If a process that it has started holds a copy of
        # its socket, the connection stays open, hence the limit.
        with suppress(TimeoutError):
            await asyncio.wait_for(worker.silent.wait(), SILENCE_SECONDS)
        status = worker.process.exitcode or 0
        worker.channel.close()
        worker.process.close()
        self.workers.remove(worker)
        if self.stopping.is_set():
            return
        if status == STARTUP_FAILURE and not self.served:
            # Any other worker would fail as well. Once one has served, the cause may pass: a worker
            # that finds no models must not take down the ones that still serve.
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
        """Wait until a worker may be replaced: not at all, unless many have ended recently."""
        now = time.monotonic()
        self.ends.append(now)
        quick = len(self.ends) == QUICK_DEATHS and now - self.ends[0] < QUICK_SECONDS
        self.replaced = max(now, self.replaced + PAUSE_SECONDS) if quick else now
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), self.replaced - now)

    async def answer(self, worker: WorkerProcess, content: object) -> object:
        """Answer a request of a worker."""
        match content:
            case Broadcast(request, answer):
                return await self.ask_others(worker, request, answer)
            case Change(request):
                await self.change(worker, request)
            case Serving(state):
                self.served = True
                if self.state is None:
                    self.state = state
        return None

    async def ask_others(self, asker: WorkerProcess, request: object, answer: object) -> Replies:
        """Put a request to all workers but the asking one, which has answered it itself.

        The request waits for a worker that is still starting. Raises as ``ask_all`` does.
        """
        self.note(asker, answer)
        answers = await self.ask_all([each for each in self.workers if each is not asker], request)
        answers = {asker: answer} | answers
        # The answer of a worker that has died since is in ``gone``, and must not count twice.
        living = [answer for worker, answer in answers.items() if worker in self.workers]
        return Replies(living, self.gone, self.deaths)

    async def change(self, asker: WorkerProcess | None, request: object) -> None:
        """Have all workers change the served state, the asking one first.

        An exception of the asking worker is raised, and the others are not asked; otherwise raises
        as ``ask_all`` does.
        """
        async with self.changing:
            if asker:
                self.state = await asker.channel.request(Change(request), self.answer_seconds)
            others = [worker for worker in self.workers if worker is not asker]
            states = await self.ask_all(others, Change(request))
            if not asker:
                self.state = next(iter(states.values()), self.state)

    async def ask_all(
        self, workers: list[WorkerProcess], request: object
    ) -> dict[WorkerProcess, object]:
        """Put a request to some workers; return the answers, by worker.

        A worker that does not answer is logged and left out. If one raises an exception, it is
        raised here once all have answered.
        """
        answers: dict[WorkerProcess, object] = {}

        async def ask(worker: WorkerProcess) -> None:
            try:
                answers[worker] = await worker.channel.request(request, self.answer_seconds)
            except Unanswered as error:
                log.error("worker %d is left out of an answer: %s", worker.pid, error)
            else:
                self.note(worker, answers[worker])

        outcomes = await asyncio.gather(*map(ask, workers), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        return answers

    def note(self, worker: WorkerProcess, answer: object) -> None:
        """Remember an answer in case its worker dies."""
        if self.keep.kept(answer):
            worker.last = answer
