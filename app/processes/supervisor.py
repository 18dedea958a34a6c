"""The parent of several worker processes: starts them, replaces dead ones, stops them all.

It serves no clients itself. It passes on requests from one worker to all (see ``group``), and keeps
what must outlive a worker: the state that all are to serve, and the counts of dead ones.

The state is decided here: it is what the worker that makes a change first serves afterwards. All
others follow, new ones begin with it, and a worker that does not get there is replaced.

Its event loop waits for signals, for messages of workers and for their ends at once. It never
blocks on a worker: one that does not answer is left out of an answer, and killed after a while.
"""

import asyncio
import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from typing import NamedTuple

from uvicorn.config import STARTUP_FAILURE

from dropserve.app.processes.changes import Changes
from dropserve.app.processes.group import (
    Broadcast,
    Change,
    Changed,
    Follow,
    Left,
    Pending,
    Replace,
    Replies,
    Serving,
)
from dropserve.app.processes.ipc import Unanswered
from dropserve.app.processes.process import Start, WorkerProcess
from dropserve.app.server.server import STOPS, Stops

# Once this many workers have died within this many seconds, one is replaced after each pause.
QUICK_DEATHS, QUICK_SECONDS, PAUSE_SECONDS = 3, 10.0, 1.0
# Longest wait for the last messages of a worker that has ended.
SILENCE_SECONDS = 1.0
# Most workers that try to make a change first: it may be the change that kills them.
TRIES = 2

log = logging.getLogger(__name__)


class Keep(NamedTuple):
    """Rules for the answers that outlive a dead worker: its last ``kept`` one, folded into one."""

    kept: Callable[[object], bool]
    fold: Callable[[object, object], object]  # (result of earlier folds or None, answer) -> both


class Limits(NamedTuple):
    """Longest times in seconds."""

    start: Callable[[object], float]  # a worker takes to start, given the state to serve
    stuck: float  # a worker does not answer before it is killed
    stop: float  # workers take to stop before they are killed
    # A worker takes to answer the request of another. Whoever asks for the metrics waits for them.
    answer: float = 0.8


def supervise(
    serve: Callable[[Start], None],
    workers: int,
    *,
    state: object,
    closing: Callable[[], None],
    on_hangup: object,
    keep: Keep,
    limits: Limits,
) -> int:
    """Run workers until SIGTERM or SIGINT; return the exit status.

    Both are passed on to the workers as ``STOP``, a second one, too, unless it comes within a
    second. What a terminal or systemd sends to all processes never reaches a worker directly.

    Parameters
    ----------
    serve
        Main function of a worker process, which returns after a graceful shutdown; must be
        picklable. If a worker exits with uvicorn's STARTUP_FAILURE before the ``Group`` of any is
        started, all are stopped and 1 is returned.
    workers
        Number of workers.
    state
        What they are to serve at first.
    closing
        Called when the workers are told to stop; it must close this process's copy of the socket
        that they listen on. Otherwise clients could still connect, and nobody would answer.
    on_hangup
        The change to make after SIGHUP.
    keep
        Rules for the answers that outlive a worker.
    limits
        Longest times.
    """
    # Before any signal is blocked: starting the tracker leaves SIGINT unblocked.
    resource_tracker.ensure_running()
    # Whoever started this process may ignore it, and then nobody learns how a worker has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return asyncio.run(Supervisor(serve, state, closing, on_hangup, keep, limits).run(workers))


@dataclass
class Supervisor:
    """The parent of the workers, with the parameters of ``supervise``."""

    serve: Callable[[Start], None]
    state: object
    closing: Callable[[], None]
    on_hangup: object
    keep: Keep
    limits: Limits
    workers: list[WorkerProcess] = field(default_factory=list)
    tasks: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)
    changes: Changes = field(default_factory=Changes)
    stops: Stops = field(default_factory=Stops)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 0
    served: bool = False  # whether any worker has ever served
    gone: object = None  # folded answers of dead workers
    deaths: int = 0
    silences: int = 0  # requests that a living worker did not answer in time
    # Times when the last few workers ended, and when the last was or will be replaced.
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=QUICK_DEATHS))
    replaced: float = 0.0

    async def run(self, workers: int) -> int:
        """Run workers until they are stopped; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in STOPS:
            loop.add_signal_handler(number, self.signalled)
        loop.add_signal_handler(signal.SIGHUP, self.hang_up)
        try:
            async with self.tasks:
                for _ in range(workers):
                    self.tasks.create_task(self.fill())
        finally:
            # Left only if this process fails. They would wait for its end, and it for theirs.
            self.kill("the parent process has failed")
        return self.status

    def signalled(self) -> None:
        """Tell all workers to stop; a second time, to end at once."""
        if self.stops.is_echo():
            return
        if not self.stopping.is_set():
            self.stop()
        else:
            for worker in self.workers:
                worker.stop()

    def stop(self) -> None:
        """Tell all workers to stop; kill them later if they do not."""
        self.stopping.set()
        asyncio.get_running_loop().call_later(self.limits.stop, self.kill, "it does not stop")
        self.closing()
        for worker in self.workers:
            # To one that leaves already, it would mean to end at once.
            if not worker.leaving.is_set():
                worker.stop()

    def kill(self, why: str) -> None:
        """Kill all workers."""
        for worker in self.workers:
            worker.kill(why)

    def hang_up(self) -> None:
        """Make the change of SIGHUP, in the background."""
        self.changes.request(self.on_hangup, self.change_all)

    async def change_all(self) -> None:
        """Make the change of SIGHUP; log a failure."""
        try:
            await self.change(None, self.on_hangup)
        # No caller waits for this, so the log is the only place for any exception.
        except Exception as error:
            log.error("the reload after SIGHUP failed: %s", error)

    async def fill(self) -> None:
        """Keep one worker running: when it dies or leaves, start another in its place."""
        while not self.stopping.is_set():
            if worker := self.start():
                watch = worker.watch(self.limits.start(worker.state), self.limits.stuck)
                end = self.tasks.create_task(self.end(worker, self.tasks.create_task(watch)))
                leaving = self.tasks.create_task(worker.leaving.wait())
                await asyncio.wait([end, leaving], return_when=asyncio.FIRST_COMPLETED)
                leaving.cancel()
            await self.pause()

    def start(self) -> WorkerProcess | None:
        """Start a worker that serves the same as the others, or log why that fails."""
        try:
            worker = WorkerProcess.start(self.serve, self.state, self.answer)
        except OSError as error:
            # The system may be short of memory or processes; the other workers go on meanwhile.
            log.error("a worker cannot be started: %s", error)
            return None
        self.workers.append(worker)
        return worker

    def replace(self, worker: WorkerProcess, reason: str) -> None:
        """Have another worker take the place of one, which answers its last requests meanwhile."""
        if worker.leaving.is_set() or self.stopping.is_set():
            return
        log.error("worker %d is replaced: %s", worker.pid, reason)
        worker.leave()
        kill = partial(worker.kill, "it does not stop")
        asyncio.get_running_loop().call_later(self.limits.stop, kill)

    async def end(self, worker: WorkerProcess, watch: asyncio.Task[None]) -> None:
        """Wait for the end of a worker; keep its counts, or stop all if none can start."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(worker.process.sentinel, ended.set)
        await ended.wait()
        loop.remove_reader(worker.process.sentinel)
        worker.ended = True
        watch.cancel()
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
        if worker.last is not None:
            self.gone = self.keep.fold(self.gone, worker.last)
        if worker.leaving.is_set() and status == 0:
            return
        how = f"status {status}"
        if status < 0:
            how = f"signal {-status} ({signal.strsignal(-status)})"
        log.error("worker %d has ended with %s, and is replaced", worker.pid, how)
        self.deaths += 1

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
            case Change(change):
                made = self.changes.request(change, partial(self.change, worker, change))
                await asyncio.shield(made)
            case Pending():
                return self.changes.pending()
            case Serving(state):
                self.served = True
                if state != worker.state:
                    # It was told to serve the same as the others, so another would not do better.
                    log.error(
                        "worker %d serves other models than the others, since the models folder "
                        "has changed: %s in place of %s",
                        *(worker.pid, state, worker.state),
                    )
                worker.state = state
                worker.serving.set()
            case Replace(reason):
                self.replace(worker, reason)
            case Left(answer):
                worker.last = answer
        return None

    async def ask_others(self, asker: WorkerProcess, request: object, answer: object) -> Replies:
        """Put a request to all serving workers but the asking one, which has answered it itself.

        A worker that does not answer in time is counted and left out. If one raises an exception,
        it is raised here once all have answered.
        """
        answers: dict[WorkerProcess, object] = {}

        def note(worker: WorkerProcess, found: object) -> None:
            answers[worker] = found
            if self.keep.kept(found):
                worker.last = found

        async def ask(worker: WorkerProcess) -> None:
            try:
                found = await worker.channel.request(request, self.limits.answer)
            except Unanswered as error:
                if not worker.channel.closed:
                    self.silences += 1
                    log.error("worker %d is left out of an answer: %s", worker.pid, error)
            else:
                note(worker, found)

        note(asker, answer)
        others = [each for each in self.workers if each is not asker and each.serving.is_set()]
        outcomes = await asyncio.gather(*map(ask, others), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome
        # The answer of a worker that has died since is in ``gone``, and must not count twice.
        living = [found for worker, found in answers.items() if worker in self.workers]
        last = [each.last for each in self.workers if each not in answers and each.last is not None]
        return Replies(living, last, self.gone, self.deaths, self.silences)

    async def change(self, asker: WorkerProcess | None, change: object) -> None:
        """Have one worker make a change, the asking one if possible, and then all others follow.

        An exception of that worker is raised. If nothing has changed, the others are not asked.

        Raises
        ------
        Unanswered
            If no worker has made the change.
        """
        first, (state, error) = await self.decide(asker, change)
        has_changed = state != self.state
        self.state = first.state = state
        if has_changed or error is None:
            followers = {
                worker: self.tasks.create_task(self.follow(worker, change))
                for worker in self.workers
                if worker is not first and not worker.leaving.is_set()
            }
            # Those that still start are given the change, but nobody waits for them.
            serving = [made for worker, made in followers.items() if worker.serving.is_set()]
            await asyncio.gather(*serving)
        if error:
            raise error

    async def decide(
        self, asker: WorkerProcess | None, change: object
    ) -> tuple[WorkerProcess, Changed]:
        """Have a worker make a change; if it dies or is stuck, another."""
        tried: set[WorkerProcess] = set()
        while len(tried) < TRIES and not self.stopping.is_set():
            # Best is one that serves what was decided so far: it decides for all.
            worker = min(
                (each for each in self.workers if each not in tried and not each.leaving.is_set()),
                key=lambda each: (
                    not each.serving.is_set(),
                    each.state != self.state,
                    each is not asker,
                ),
                default=None,
            )
            if worker is None:
                break
            tried.add(worker)
            try:
                changed = await worker.channel.request(Change(change))
            except Unanswered as error:
                log.error("worker %d has not made a change: %s", worker.pid, error)
            else:
                assert isinstance(changed, Changed)
                return worker, changed
        raise Unanswered("no worker has made the change")

    async def follow(self, worker: WorkerProcess, change: object) -> None:
        """Have a worker follow a change; replace it if it then serves anything else."""
        decided = self.state
        try:
            worker.state = await worker.channel.request(Follow(decided, change))
        except Unanswered:
            # It has ended, and its replacement begins with the state decided here.
            return
        # Whatever keeps a worker from following, another may do better.
        except Exception as error:
            self.replace(worker, f"it cannot follow a change: {error}")
            return
        if worker.state != decided and self.state is decided:
            self.replace(worker, f"it serves {worker.state} in place of {decided}")
