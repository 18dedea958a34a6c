"""Build what a process serves, and serve it; the same where there is one process and where many."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from typing import NamedTuple

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from dropserve.app.errors import LoadError, StartError
from dropserve.app.http import app
from dropserve.app.http.context import Gate
from dropserve.app.http.v2.repository import Load, Unload
from dropserve.app.inference import memory
from dropserve.app.inference.registry import Engines, Served, load_engines
from dropserve.app.inference.service import Service
from dropserve.app.observability import logs, metrics, tracing
from dropserve.app.observability.metrics import Snapshot
from dropserve.app.processes.ipc import Group
from dropserve.app.processes.supervisor import Start
from dropserve.app.security.api_keys import Keys
from dropserve.app.security.loopback import is_loopback
from dropserve.app.server.connection import Limits, connection_class
from dropserve.app.server.server import Server
from dropserve.app.settings import Settings

log = logging.getLogger("app")


class Reload(NamedTuple):
    """Have a worker read the models folder and the keys again."""


class Count(NamedTuple):
    """Ask what a worker has counted."""


class Worker:
    """What one process serves.

    Parameters
    ----------
    settings
        Of the service.
    engines
        The models to begin with.
    start
        What the parent of several workers gives each; None: there is only this.
    """

    def __init__(self, settings: Settings, engines: Engines, start: Start | None = None) -> None:
        self.settings = settings
        self.alone = start is None
        self.service = Service(
            engines,
            max_rows=settings.max_rows,
            max_passes=settings.max_passes,
            max_row_passes=settings.max_row_passes,
            queue_rows=settings.queue_rows,
            folder=settings.models,
        )
        if start and isinstance(start.state, Served):
            self.service.models.unloaded |= start.state.unloaded
        self.metrics = metrics.Metrics()
        self.spans = tracing.spans()
        self.gate = Gate(
            keys=read_keys(settings),
            admin=is_loopback(settings.host),
            timeout_ms=settings.timeout_ms,
            metrics=self.metrics,
            log=logs.RequestLog(sys.stderr.fileno()),
            spans=self.spans,
        )
        self.group = Group(
            self.handle, start.link if start else None, self.stop, self.service.models.state
        )
        self.application = app.create(
            self.service,
            debug=settings.debug,
            max_body_bytes=settings.max_body_bytes,
            gate=self.gate,
            group=self.group,
            exposition=self.exposition,
            begin=self.begin,
            end=self.end,
            origins=settings.origins(),
        )
        limits = Limits(settings.max_connections, settings.max_head_bytes, settings.receive_seconds)
        self.server = Server(
            uvicorn.Config(
                self.application,
                http=connection_class(limits),
                # It is one, though its __call__ is no coroutine function.
                interface="asgi3",
                # Nothing here asks who the client is.
                proxy_headers=False,
                # It would gather what to log of each request even where nothing is logged.
                access_log=False,
                server_header=False,
                ws="none",
                log_config=None,
                log_level="warning",
            ),
            drain_delay=settings.drain_delay_seconds,
            drain_seconds=settings.drain_seconds,
            draining=self.application.drain,
            alone=self.alone,
        )

    def serve(self, listener: socket.socket) -> None:
        """Answer requests until the process is told to end and all are answered."""
        memory.settle()
        self.server.run([listener])
        if self.spans:
            self.spans.close()

    def begin(self) -> None:
        """Begin to listen to others, on the event loop."""
        self.group.start()
        # Signals reach the main thread alone, which in another's process may not be ours.
        if self.alone and threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            # The loop keeps only a weak reference to a task.
            tasks: set[asyncio.Task[object]] = set()

            def hang_up() -> None:
                task = loop.create_task(self.handle(Reload()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            loop.add_signal_handler(signal.SIGHUP, hang_up)

    def end(self) -> None:
        """Let go of what is not needed any more, all requests being answered."""
        self.group.close()
        self.service.close()

    def stop(self) -> None:
        """End as on SIGTERM, if that has not begun: the parent of the workers is gone."""
        if not self.server.server_state.draining:
            self.server.stop()

    async def handle(self, question: object) -> object:
        """Do what all workers are asked to do."""
        match question:
            case Load(name):
                await self.service.models.load(name)
            case Unload(name):
                await self.service.models.unload(name)
            case Reload():
                await self.reload()
            case Count():
                connections = len(self.server.server_state.connections)
                return self.metrics.snapshot(os.getpid(), self.service, connections)
        return None

    async def reload(self) -> None:
        """Read the keys and the models folder again; what is wrong leaves all as it was."""
        try:
            self.gate.keys = read_keys(self.settings)
        except StartError as error:
            log.error("the keys stay as they were: %s", error)
        try:
            await self.service.models.reload()
        except LoadError as error:
            log.error("not all was loaded: %s", error)

    async def exposition(self) -> bytes:
        """Write the metrics of all workers."""
        found = await self.group.ask(Count())
        snapshots = [each for each in found.answers if isinstance(each, Snapshot)]
        gone = found.gone if isinstance(found.gone, dict) else {}
        return metrics.exposition(snapshots, gone, found.deaths, self.service)


def read_keys(settings: Settings) -> Keys | None:
    """Read who may ask; None: everybody may.

    Raises
    ------
    StartError
        If the file is not as it should be, or everybody may ask where that was not meant.
    """
    if settings.api_keys_file is not None:
        return Keys.read(settings.api_keys_file)
    if not settings.open and not is_loopback(settings.host):
        raise StartError(
            f"host {settings.host} may be reached by others: name a file of keys "
            "(--api-keys-file), or say that it is meant to be open to all (--open)"
        )
    return None


def serve_as_worker(
    settings: Settings, threads: int, listener: socket.socket, start: Start
) -> None:
    """Serve in one of several processes."""
    # What the first process has said already need not be said by each.
    logs.configure(logging.ERROR)
    try:
        only = start.state.versions if isinstance(start.state, Served) else None
        engines = load_engines(settings.models, settings.device, threads, only)
        worker = Worker(settings, engines, start)
        # What is unloaded is to be let go of.
        del engines
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        # Any other status would have the worker started again, in vain.
        sys.exit(STARTUP_FAILURE)
    logging.getLogger().setLevel(logging.INFO)
    worker.serve(listener)


def kept(answer: object) -> bool:
    """Tell whether an answer holds what is still to be counted when its worker has died."""
    return isinstance(answer, Snapshot)


def fold(gone: object, answer: object) -> object:
    """Add what a worker that died has counted to what others have that did."""
    assert isinstance(answer, Snapshot)
    return metrics.merged([gone if isinstance(gone, dict) else {}, answer.counts])
