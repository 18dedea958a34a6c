"""``python -m app``: serve a folder of bundles."""

import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from functools import partial

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError
from uvicorn.supervisors import Multiprocess

from app.errors import StartError
from app.service import load_engines
from app.settings import Settings
from app.worker import build, build_worker, configure_log

# Connections that wait to be taken; more than a burst of clients opens at once.
BACKLOG = 2048

log = logging.getLogger("app")


def main() -> int:
    """Run the command line; return the exit status."""
    try:
        settings = CliApp.run(Settings)
    except SettingsError as error:
        print(f"python -m app: error: {str(error).partition(': ')[2]}", file=sys.stderr)
        return 2
    except ValidationError as error:
        found = error.errors()
        # An option that may be one thing or another has an error for each.
        option = found[0]["loc"][0]
        said = " or ".join(each["msg"] for each in found if each["loc"][0] == option)
        print(f"python -m app: error: --{str(option).replace('_', '-')}: {said}", file=sys.stderr)
        return 2
    configure_log(logging.INFO)
    workers, threads = settings.sized()
    try:
        # With several workers this is only to find what is wrong once, before they start.
        engines = load_engines(settings.models, settings.device, threads)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        print(f"error: cannot listen: {error.strerror or error}", file=sys.stderr)
        return 1
    if workers == 1:
        app: Callable[..., object] = build(settings, engines)
    else:
        del engines
        app = partial(build_worker, settings, threads)
    config = uvicorn.Config(
        app,
        factory=workers > 1,
        workers=workers,
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
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("listening on http://%s:%d", host, listener.getsockname()[1])
    if workers > 1:
        Multiprocess(config, [listener]).run()
        return 0
    # Once it has answered what was under way, uvicorn raises Ctrl-C again.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Open the port, before anything is said to be there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


if __name__ == "__main__":
    sys.exit(main())
