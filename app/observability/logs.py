"""The log: one JSON object a line on stderr, for what happens and for each request.

It never holds what a client has sent but its request's id, which is checked, and the names of
models that are served: no feature values, no keys, no paths of its own choosing.
"""

import asyncio
import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime

import orjson

from dropserve.app.observability.record import Call

OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE


class JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Write time, level, message and, where there is one, the trace of an exception."""
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
    """Writes a line for each request, together what one turn of the event loop brings.

    The logging module takes as long for a line as a small request takes in all.
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self.lines: list[bytes] = []

    def write(self, call: Call, status: int, seconds: float) -> None:
        """Write a line for a request that was answered after so many ``seconds``.

        It is written once what else is to be done at the moment is done.
        """
        if not self.lines:
            asyncio.get_running_loop().call_soon(self.flush)
        entry: dict[str, object] = {
            "time": datetime.now(UTC),
            "level": "info",
            "message": "request",
            "request_id": call.id,
            "route": call.route,
            "model": call.model or None,
            "version": call.version or None,
            "rows": call.rows,
            "passes": call.passes,
            "status": status,
            "queue_ms": milliseconds(call.queued),
            "run_ms": milliseconds(call.ran),
            "total_ms": milliseconds(seconds),
        }
        if call.trace:
            entry["trace_id"], entry["parent_span_id"] = call.trace.trace, call.trace.parent
        self.lines.append(orjson.dumps(entry, option=OPTIONS))

    def flush(self) -> None:
        """Write what there is; what a full disk does not take is lost."""
        content = b"".join(self.lines)
        self.lines.clear()
        with suppress(OSError):
            while content:
                content = content[os.write(self.file, content) :]


def milliseconds(seconds: float) -> float:
    """Say how long something took, to the microsecond."""
    return int(1e6 * seconds) / 1000
