"""One process of the service: builds its parts and serves; the same for one process or several."""

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
from dropserve.app.http.context import Context
from dropserve.app.inference import memory
from dropserve.app.inference.registry import Engines, Served, load_engines
from dropserve.app.inference.service import Service
from dropserve.app.observability import logs, metrics, tracing
from dropserve.app.observability.metrics import Counts, Snapshot
from dropserve.app.processes.ipc import Group
from dropserve.app.processes.supervisor import Start
from dropserve.app.security.api_keys import Keys
from dropserve.app.security.hosts import Hosts
from dropserve.app.security.loopback import is_loopback
from dropserve.app.server.connection import Limits, connection_class
from dropserve.app.server.server import Server
from dropserve.app.settings import Settings

log = logging.getLogger(__name__)


class Load(NamedTuple):
    """Message to all workers: serve the versions of a model that the models folder holds."""

    name: str


class Unload(NamedTuple):
    """Message to all workers: stop serving a model."""

    name: str


class Reload(NamedTuple):
    """Message to all workers: read the API keys and the models folder again."""


class Count(NamedTuple):
    """Message to all workers: return your metrics."""


class Worker:
    """One process of the service.

    Parameters
    ----------
    settings
        The settings of the service.
    engines
        The models to start with.
    start
        From the supervisor of several workers; None: this is the only one.
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
            self.service.registry.unloaded |= start.state.unloaded
        self.metrics = metrics.Metrics()
        self.spans = tracing.open_spans()
        self.context = Context(
            # In place of a worker that has died, it starts while the service runs.
            keys=read_keys(settings, starting=start is None or start.state is None),
            allow_local_admin=is_loopback(settings.host),
            timeout_ms=settings.timeout_ms,
            metrics=self.metrics,
            hosts=Hosts(settings.names()),
            log=logs.RequestLog(sys.stderr.fileno()),
            spans=self.spans,
        )
        self.group = Group(
            self.handle, start.link if start else None, self.stop, self.service.registry.state
        )
        self.application = app.create(
            self.service,
            debug=settings.debug,
            max_body_bytes=settings.max_body_bytes,
            max_unread_bytes=settings.max_unread_bytes,
            context=self.context,
            load=lambda name: self.group.change(Load(name)),
            unload=lambda name: self.group.change(Unload(name)),
            metrics=self.exposition,
            counts=self.counts,
            startup=self.startup,
            shutdown=self.shutdown,
            origins=settings.origins(),
        )
        limits = Limits(
            settings.max_connections,
            settings.max_head_bytes,
            settings.receive_seconds,
            settings.send_seconds,
        )
        self.server = Server(
            uvicorn.Config(
                self.application,
                http=connection_class(self.application, limits),
                # uvicorn cannot tell, as its __call__ is not a coroutine function.
                interface="asgi3",
                # The client's address is not used.
                proxy_headers=False,
                # uvicorn would collect the fields of each line even if none is logged.
                access_log=False,
                server_header=False,
                ws="none",
                # Declared as an int, but only ever passed on as a timeout.
                timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
                log_config=None,
                log_level="warning",
            ),
            drain_delay=settings.drain_delay_seconds,
            drain_seconds=settings.drain_seconds,
            draining=self.application.drain,
            alone=self.alone,
        )

    def serve(self, listener: socket.socket) -> None:
        """Serve until the process is told to stop and all responses are out."""
        memory.freeze()
        self.server.run([listener])
        if self.spans:
            self.spans.close()

    def startup(self) -> None:
        """Start to listen to the other processes and to signals, on the event loop."""
        self.group.start()
        # Signals reach the main thread only; embedded in another program, this may be another.
        if self.alone and threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            # The loop keeps only a weak reference to a task.
            tasks: set[asyncio.Task[object]] = set()

            def hang_up() -> None:
                task = loop.create_task(self.handle(Reload()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            loop.add_signal_handler(signal.SIGHUP, hang_up)

    def shutdown(self) -> None:
        """Release the resources, after the last response."""
        self.group.close()
        self.service.close()

    def stop(self) -> None:
        """Stop as on SIGTERM, unless stopping already: the supervisor is gone."""
        if not self.server.server_state.draining:
            self.server.stop()

    async def handle(self, message: object) -> object:
        """Handle a message to all workers."""
        match message:
            case Load(name):
                await self.service.registry.load(name)
            case Unload(name):
                await self.service.registry.unload(name)
            case Reload():
                await self.reload()
            case Count():
                connections = len(self.server.server_state.connections)
                return self.metrics.snapshot(
                    pid=os.getpid(),
                    queue=self.service.admission.held,
                    connections=connections,
                    loads=self.service.registry.loads,
                    batch_sizes=self.service.registry.batch_sizes(),
                )
        return None

    async def reload(self) -> None:
        """Read the API keys and the models folder again; a faulty one changes nothing."""
        try:
            # Aside from the loop: the file may be on a slow or broken network.
            self.context.keys = await asyncio.to_thread(read_keys, self.settings, starting=False)
        except StartError as error:
            log.error("the keys stay as they were: %s", error)
        try:
            await self.service.registry.reload()
        except LoadError as error:
            log.error("not all was loaded: %s", error)

    async def counts(self) -> Counts:
        """Return the counts of all workers together, those that died included."""
        found = await self.group.ask(Count())
        gone = found.gone if isinstance(found.gone, dict) else {}
        return metrics.merged(
            [gone, *(each.counts for each in found.answers if isinstance(each, Snapshot))]
        )

    async def exposition(self) -> bytes:
        """Return the metrics of all workers, for Prometheus."""
        found = await self.group.ask(Count())
        snapshots = [each for each in found.answers if isinstance(each, Snapshot)]
        gone = found.gone if isinstance(found.gone, dict) else {}
        return metrics.exposition(
            snapshots,
            gone=gone,
            deaths=found.deaths,
            queue_limit=self.service.admission.limit,
            models=self.service.registry.infos(),
        )


def read_keys(settings: Settings, *, starting: bool) -> Keys | None:
    """Read the API keys; None: no key is needed.

    Parameters
    ----------
    settings
        The settings of the service.
    starting
        Whether the service starts, which it does not with a file that holds no key. Once it runs,
        emptying the file revokes all keys.

    Raises
    ------
    StartError
        If the file is faulty, or if other machines could connect without a key unintendedly.
    """
    if settings.api_keys_file is not None:
        keys = Keys.read(settings.api_keys_file)
        if not keys.entries:
            if starting:
                raise StartError(f"the keys file {str(settings.api_keys_file)!r} holds no key")
            log.warning("all keys are revoked: the keys file holds none")
        return keys
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
    # The first process has logged this already.
    logs.configure(logging.ERROR)
    try:
        only = start.state.versions if isinstance(start.state, Served) else None
        engines = load_engines(settings.models, settings.device, threads, only)
        worker = Worker(settings, engines, start)
        # An unloaded model must not be kept alive.
        del engines
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        # With any other status the worker would be restarted, in vain.
        sys.exit(STARTUP_FAILURE)
    logging.getLogger().setLevel(logging.INFO)
    worker.serve(listener)


def kept(answer: object) -> bool:
    """Tell whether an answer holds counts that must outlive its worker."""
    return isinstance(answer, Snapshot)


def fold(gone: object, answer: object) -> object:
    """Add the counts of a worker that died to those of earlier ones."""
    assert isinstance(answer, Snapshot)
    return metrics.merged([gone if isinstance(gone, dict) else {}, answer.counts])
