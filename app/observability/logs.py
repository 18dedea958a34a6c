"""The log: one JSON object per line on stderr, for events and for each request.

Of a client's data it holds only the request id, which is checked, and names of served models: no
feature values, no keys, no paths chosen by the client.
"""

import asyncio
import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime

import orjson

from dropserve.app.observability.record import RequestRecord

OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE


class JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, message and, for an exception, its traceback as JSON."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, option=OPTIONS).decode().rstrip()


def configure(level: int) -> None:
    """Write the log of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)


class RequestLog:
    """Writes a line for each request, all lines of one turn of the event loop together.

    The logging module takes as long for a line as a small request takes in total.
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self.lines: list[bytes] = []

    def write(self, record: RequestRecord, seconds: float) -> None:
        """Queue the line of a request whose response came ``seconds`` after it."""
        if not self.lines:
            asyncio.get_running_loop().call_soon(self.flush)
        entry: dict[str, object] = {
            "time": datetime.now(UTC),
            "level": "info",
            "message": "request",
            "request_id": record.id,
            "route": record.route,
            "model": record.model or None,
            "version": record.version or None,
            "rows": record.rows,
            "passes": record.passes,
            "status": record.status,
            "queue_ms": milliseconds(record.queue_seconds),
            "run_ms": milliseconds(record.run_seconds),
            "total_ms": milliseconds(seconds),
        }
        if record.trace:
            entry["trace_id"] = record.trace.trace_id
            entry["parent_span_id"] = record.trace.parent_span_id
        self.lines.append(orjson.dumps(entry, option=OPTIONS))

    def flush(self) -> None:
        """Write the queued lines; lines for which a full disk has no room are lost."""
        content = b"".join(self.lines)
        self.lines.clear()
        with suppress(OSError):
            while content:
                content = content[os.write(self.file, content) :]


def milliseconds(seconds: float) -> float:
    """Convert seconds to milliseconds, to the microsecond."""
    return int(1e6 * seconds) / 1000
