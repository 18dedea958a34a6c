"""Build what a process serves; a module of its own so that worker processes can import it."""

import logging
import sys

from uvicorn.config import STARTUP_FAILURE

from app.api import application
from app.api.application import Application
from app.errors import StartError
from app.service import Engines, Service, load_engines
from app.settings import Settings


def configure_log(level: int) -> None:
    """Write the log to stderr."""
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)


def build(settings: Settings, engines: Engines) -> Application:
    """Return the application that serves some engines."""
    service = Service(
        engines,
        max_rows=settings.max_rows,
        max_passes=settings.max_passes,
        max_row_passes=settings.max_row_passes,
    )
    return application.create(service, debug=settings.debug, max_body_bytes=settings.max_body_bytes)


def build_worker(settings: Settings, threads: int) -> Application:
    """Return the application of one of several workers, in its own process."""
    # What the first process has said already need not be said by each.
    configure_log(logging.ERROR)
    try:
        return build(settings, load_engines(settings.models, settings.device, threads))
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        # Any other status would have the worker started again, in vain.
        sys.exit(STARTUP_FAILURE)
