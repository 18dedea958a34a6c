"""The record of one request: its deadline, and the fields of log, metrics and traces."""

import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from dropserve.app.errors import DeadlineExceeded

# Longest time limit that a client may set for a response.
MAX_TIMEOUT_MS = 3_600_000
# Status of a request whose client disconnected before the response, as nginx logs it.
CLIENT_DISCONNECTED = 499


class Trace(NamedTuple):
    """Where a request belongs in its client's trace (W3C Trace Context)."""

    trace_id: str
    parent_span_id: str
    flags: str


@dataclass(slots=True)
class RequestRecord:
    """One request, from its arrival to its response.

    Parameters
    ----------
    method, route
        HTTP method, and path template without the parts that differ between requests.
    id
        Returned to the client, and written to the log.
    time_limit
        Seconds the response may take. Work that would start later is dropped.
    start
        Time of arrival, by the monotonic clock.
    model, version
        The model that answers, once it is found.
    rows, passes
        Size of the request; 0 passes in eval mode.
    queue_seconds, run_seconds
        How long its jobs waited for their batches, and how long these batches took in full.
    rejected
        Reason for a refusal, as counted in the metrics.
    status
        HTTP status of the response.
    trace
        From the client's ``traceparent`` header.
    """

    method: str = ""
    route: str = ""
    id: str = ""
    time_limit: float = math.inf
    start: float = field(default_factory=time.monotonic)
    model: str = ""
    version: int = 0
    rows: int = 0
    passes: int = 0
    queue_seconds: float = 0.0
    run_seconds: float = 0.0
    rejected: str = ""
    status: int = CLIENT_DISCONNECTED
    trace: Trace | None = None

    def check_deadline(self, now: float) -> None:
        """Raise DeadlineExceeded if ``now``, by the monotonic clock, is past the time limit."""
        if now - self.start >= self.time_limit:
            raise DeadlineExceeded(
                f"the answer was not ready within {self.time_limit * 1000:.10g} ms, "
                "so what was left to do was not begun"
            )
