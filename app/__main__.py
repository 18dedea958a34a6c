"""``python -m app``: serve a folder of bundles."""

import contextlib
import logging
import socket
import sys

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from app.api import application
from app.errors import StartError
from app.service import Service, load_engines
from app.settings import Settings

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
        first = error.errors()[0]
        option = "-".join(map(str, first["loc"])).replace("_", "-")
        print(f"python -m app: error: --{option}: {first['msg']}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        engines = load_engines(settings.models, settings.device)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    service = Service(
        engines,
        max_rows=settings.max_rows,
        max_passes=settings.max_passes,
        max_row_passes=settings.max_row_passes,
    )
    app = application.create(service, debug=settings.debug, max_body_bytes=settings.max_body_bytes)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        print(f"error: cannot listen: {error.strerror or error}", file=sys.stderr)
        return 1
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("listening on http://%s:%d", host, listener.getsockname()[1])
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            # It is one, though its __call__ is no coroutine function.
            interface="asgi3",
            # Nothing here asks who the client is.
            proxy_headers=False,
            log_config=None,
            log_level="warning",
        )
    )
    # Once it has answered what was under way, uvicorn raises Ctrl-C again.
    with contextlib.suppress(KeyboardInterrupt):
        server.run([listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Open the port, before anything is said to be there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


if __name__ == "__main__":
    sys.exit(main())
