"""One process of the service: builds its parts and serves; the same for one process or several."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

import uvicorn
from starlette.exceptions import HTTPException
from uvicorn.config import STARTUP_FAILURE

from dropserve.app.errors import LoadError, StartError
from dropserve.app.http import app
from dropserve.app.http.context import Context
from dropserve.app.inference import loading, memory
from dropserve.app.inference.admission import Admission
from dropserve.app.inference.registry import Engines, Served, VersionStatus, load_engines
from dropserve.app.inference.service import Service
from dropserve.app.observability import logs, metrics, tracing
from dropserve.app.observability.metrics import Counts, Snapshot
from dropserve.app.processes.group import Group, Replies
from dropserve.app.processes.ipc import Unanswered
from dropserve.app.processes.process import Start
from dropserve.app.security.api_keys import Keys
from dropserve.app.security.hosts import Hosts
from dropserve.app.security.loopback import is_loopback
from dropserve.app.server.connection import Limits, connection_class
from dropserve.app.server.server import Server
from dropserve.app.settings import Settings
from dropserve.export.bundle import BundleError

# Longest time in which a worker is there, apart from loading its models.
PYTHON_SECONDS = 60
# Time that processes get to exit after the drain, before they are killed.
MARGIN_SECONDS = 5

log = logging.getLogger(__name__)


# Named tuples with equal fields would be equal, whatever their classes.
@dataclass(frozen=True)
class Load:
    """Message to all workers: serve the versions of a model that the models folder holds."""

    name: str


@dataclass(frozen=True)
class Unload:
    """Message to all workers: stop serving a model."""

    name: str


@dataclass(frozen=True)
class Reload:
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
        # Whether another worker takes over.
        self.leaving = False
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
        self.unread = Admission(
            settings.max_unread_bytes, "bytes of responses that clients have yet to read"
        )
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
        self.group = Group(self, start.link if start else None)
        # Changes under way, since the loop keeps only weak references to tasks.
        self.changing: set[asyncio.Task[None]] = set()
        self.application = app.create(
            self.service,
            debug=settings.debug,
            max_body_bytes=settings.max_body_bytes,
            unread=self.unread,
            context=self.context,
            load=lambda name, seconds: self.change(Load(name), seconds),
            unload=lambda name, seconds: self.change(Unload(name), seconds),
            index=self.index,
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
            draining=self.drain,
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
            loop.add_signal_handler(signal.SIGHUP, self.hang_up)

    def hang_up(self) -> None:
        """Reload in the background, after SIGHUP."""
        self.start_change(Reload())

    async def shutdown(self) -> None:
        """Release the resources, after the last response."""
        await self.group.close(self.snapshot() if self.leaving else None)
        self.service.close()

    def state(self) -> Served:
        """Return what this process serves."""
        return self.service.registry.state()

    def stop(self) -> None:
        """Stop as on a signal, unless stopping already: the supervisor is gone."""
        if not self.server.server_state.draining:
            # Otherwise the supervisor does this.
            self.end_in_time()
            self.server.stop()

    def leave(self) -> None:
        """Answer what was accepted and end: another worker takes over."""
        self.leaving = True
        self.server.leave()

    def drain(self) -> None:
        """Report that the service is not ready; see to it that the process ends in time."""
        self.application.drain()
        if self.alone:
            self.end_in_time()

    def end_in_time(self) -> None:
        """End the process if the drain does not."""
        # Another main thread is not this program's.
        if threading.current_thread() is threading.main_thread():
            end = threading.Timer(stop_seconds(self.settings), end_at_once)
            end.daemon = True
            end.start()

    async def change(self, message: Load | Unload, seconds: float) -> bool:
        """Have all workers change what they serve; return whether it is done within ``seconds``.

        Otherwise it goes on. Raises whatever the change raises in that time; HTTPException (503) if
        no worker makes it.
        """
        task = self.start_change(message)
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            return False
        try:
            await task
        except Unanswered as error:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE, f"the models are unchanged: {error}"
            ) from None
        return True

    def start_change(self, message: Load | Unload | Reload) -> "asyncio.Task[None]":
        """Begin to have all workers change what they serve."""
        task = asyncio.get_running_loop().create_task(self.group.change(message))
        self.changing.add(task)
        task.add_done_callback(self.changing.discard)
        # The outcome may come when nobody waits for it any more; refusals are logged by themselves.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def index(self) -> list[VersionStatus]:
        """Return the status of every version that is served, loading or in the models folder."""
        registry = self.service.registry
        pending = await self.group.pending()
        names = {change.name for change in pending if isinstance(change, Load)}

        def is_loading(status: VersionStatus) -> bool:
            reloaded = Reload() in pending and status.name not in registry.unloaded
            return not status.served and (reloaded or status.name in names)

        return [each._replace(loading=is_loading(each)) for each in await registry.index()]

    async def handle(self, message: object) -> object:
        """Handle a message to all workers, or make a change before the others do."""
        match message:
            case Load(name):
                await self.service.registry.load(name)
            case Unload(name):
                await self.service.registry.unload(name)
            case Reload():
                await self.reload()
            case Count():
                return self.snapshot()
        self.clean()
        return None

    async def follow(self, state: object, change: object) -> None:
        """Serve what came of a change that another worker has made."""
        assert isinstance(state, Served)
        if isinstance(change, Reload):
            await self.read_keys_again()
        await self.service.registry.follow(state)
        self.clean()

    def clean(self) -> None:
        """Have this process replaced if a load that was given up goes on all the same."""
        if loading.is_stuck():
            self.group.replace("a load that was given up does not end")

    def snapshot(self) -> Snapshot:
        """Return the metrics of this process."""
        return self.metrics.snapshot(
            pid=os.getpid(),
            queue=self.service.admission.held,
            connections=len(self.server.server_state.connections),
            unread=self.unread.held,
            loads=self.service.registry.loads,
            batch_sizes=self.service.registry.batch_sizes(),
        )

    async def reload(self) -> None:
        """Read the API keys and the models folder again; a faulty one changes nothing."""
        await self.read_keys_again()
        try:
            await self.service.registry.reload()
        except LoadError as error:
            log.error("not all was loaded: %s", error)

    async def count(self) -> tuple[Replies, list[Snapshot], list[Counts]]:
        """Count in all workers; return the replies, what they hold, and the counts of the others.

        Raises
        ------
        HTTPException
            503 if the parent does not answer. Counts of this process alone would look as if all
            others had started anew.
        """
        try:
            found = await self.group.ask(Count())
        except Unanswered:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE, "the parent process does not answer"
            ) from None
        snapshots = [each for each in found.answers if isinstance(each, Snapshot)]
        earlier = [each.counts for each in found.last if isinstance(each, Snapshot)]
        if isinstance(found.gone, dict):
            earlier.append(found.gone)
        return found, snapshots, earlier

    async def counts(self) -> Counts:
        """Return the counts of all workers together, those that died included."""
        _, snapshots, earlier = await self.count()
        return metrics.merged([*earlier, *(each.counts for each in snapshots)])

    async def read_keys_again(self) -> None:
        """Read the API keys again; faulty ones change nothing."""
        # Aside from the loop: the file may be on a slow or broken network.
        limited = partial(
            loading.within,
            self.settings.load_seconds,
            partial(read_keys, self.settings, starting=False),
        )
        try:
            self.context.keys = await asyncio.wrap_future(loading.in_thread(limited))
        except (StartError, BundleError) as error:
            log.error("the keys stay as they were: %s", error)

    async def exposition(self) -> bytes:
        """Return the metrics of all workers, for Prometheus."""
        found, snapshots, earlier = await self.count()
        return metrics.exposition(
            snapshots,
            earlier=earlier,
            deaths=found.deaths,
            silences=found.silences,
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
    state = start.state
    assert isinstance(state, Served)
    try:
        engines = load_engines(
            *(settings.models, settings.device, threads, state.versions),
            load_seconds=settings.load_seconds,
        )
        engines.refused = state.refused | engines.refused
        worker = Worker(settings, engines, start)
        # An unloaded model must not be kept alive.
        del engines
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        # With any other status the worker would be restarted, in vain.
        sys.exit(loading.leave(STARTUP_FAILURE))
    logging.getLogger().setLevel(logging.INFO)
    worker.serve(listener)
    loading.leave(0)


def start_seconds(settings: Settings, state: object) -> float:
    """Return the longest time that a worker may take to start: to load all versions, and more."""
    assert isinstance(state, Served)
    versions = sum(map(len, state.versions.values()))
    return PYTHON_SECONDS + settings.load_seconds * versions


def stop_seconds(settings: Settings) -> float:
    """Return the longest time that a process may take to end."""
    return settings.drain_delay_seconds + settings.drain_seconds + MARGIN_SECONDS


def end_at_once() -> None:
    """End the process, which does not end by itself; called in a thread of its own."""
    log.error("the service does not stop, and is ended")
    os._exit(0)


def kept(answer: object) -> bool:
    """Tell whether an answer holds counts that must outlive its worker."""
    return isinstance(answer, Snapshot)


def fold(gone: object, answer: object) -> object:
    """Add the counts of a worker that died to those of earlier ones."""
    assert isinstance(answer, Snapshot)
    return metrics.merged([gone if isinstance(gone, dict) else {}, answer.counts])
