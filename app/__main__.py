"""``python -m app``: serve a folder of bundles."""

import logging
import sys

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from app.api import application
from app.errors import StartError
from app.service import Service, load_engines
from app.settings import Settings

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
    uvicorn.run(app, host=settings.host, port=settings.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
