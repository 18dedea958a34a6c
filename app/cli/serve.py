"""``dropserve serve``: serve a folder of bundles."""

import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial

from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from dropserve.app.errors import StartError
from dropserve.app.inference import loading
from dropserve.app.inference.registry import load_engines
from dropserve.app.observability import logs
from dropserve.app.processes import cpus
from dropserve.app.processes.supervisor import Keep, Limits, supervise
from dropserve.app.processes.worker import (
    Reload,
    Worker,
    fold,
    kept,
    read_keys,
    serve_as_worker,
    start_seconds,
    stop_seconds,
)
from dropserve.app.settings import Settings

# Queue of connections not yet accepted; longer than a burst of new clients.
BACKLOG = 2048

log = logging.getLogger(__name__)


def command(arguments: Sequence[str], prog: str) -> int:
    """Run the command line after ``serve``; return the exit status."""
    try:
        settings = CliApp.run(
            Settings,
            list(arguments),
            cli_settings_source=CliSettingsSource(Settings, cli_prog_name=prog),
        )
    except SettingsError as error:
        print(f"{prog}: error: {str(error).partition(': ')[2]}", file=sys.stderr)
        return 2
    except ValidationError as error:
        found = error.errors()
        # An option that allows several types gets an error for each type.
        option = found[0]["loc"][0]
        said = " or ".join(each["msg"] for each in found if each["loc"][0] == option)
        print(f"{prog}: error: --{str(option).replace('_', '-')}: {said}", file=sys.stderr)
        return 2
    logs.configure(logging.INFO)
    return loading.leave(serve(settings))


def serve(settings: Settings) -> int:
    """Serve until the process is told to stop; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Until the server's own handlers take over. It takes nothing down that a model being loaded
        # still needs.
        signal.signal(number, lambda *_: os._exit(0))
    # Ignore SIGHUP until start-up has loaded everything.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Each connection is an open file, and the soft limit of a shell is low.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    workers, threads = cpus.share(settings.workers, settings.threads)
    try:
        # With several workers, this only reports faults once, before the workers start.
        read_keys(settings, starting=True)
        engines = load_engines(
            settings.models, settings.device, threads, load_seconds=settings.load_seconds
        )
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        print(f"error: cannot listen: {error.strerror or error}", file=sys.stderr)
        return 1
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    many = "1 worker" if workers == 1 else f"{workers} workers"
    log.info("listening on http://%s:%d with %s", host, listener.getsockname()[1], many)
    worker = Worker(settings, engines) if workers == 1 else None
    state = engines.state()
    # This reference would keep unloaded models in memory.
    del engines
    if worker:
        worker.serve(listener)
        return 0
    return supervise(
        partial(serve_as_worker, settings, threads, listener),
        workers,
        state=state,
        closing=listener.close,
        on_hangup=Reload(),
        keep=Keep(kept, fold),
        limits=Limits(
            start=partial(start_seconds, settings),
            stuck=settings.stuck_seconds,
            stop=stop_seconds(settings),
        ),
    )


def listen(host: str, port: int) -> socket.socket:
    """Open the port of an IPv4 or IPv6 address; ``host`` may also be a name.

    All addresses of IPv6, ``::``, include those of IPv4.

    Raises
    ------
    OSError
        If the address cannot be resolved or is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = (
        family == socket.AF_INET6
        and socket.getaddrinfo(host, None)[0][4][0] == "::"
        and socket.has_dualstack_ipv6()
    )
    return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
