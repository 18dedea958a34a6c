"""What is known of one request while it is answered: what it may take, and what it has taken."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from dropserve.app.errors import DeadlineExceeded

# What a client may ask an answer to be waited for.
MAX_TIMEOUT_MS = 3_600_000


class Trace(NamedTuple):
    """What a request belongs to, as W3C Trace Context has it."""

    trace: str
    parent: str  # the span that caused it
    flags: str


@dataclass(slots=True)
class Call:
    """A request, for those who count and log it.

    Parameters
    ----------
    method, route
        What was asked for, without what is different in each request.
    id
        Of the request.
    seconds
        How long its answer may take; work that would begin later is not begun.
    """

    method: str
    route: str
    id: str
    seconds: float
    start: float = field(default_factory=time.monotonic)
    model: str = ""
    version: int = 0
    rows: int = 0
    passes: int = 0
    # Seconds that its jobs waited for their runs, and that the runs took, shared ones in full.
    queued: float = 0.0
    ran: float = 0.0
    # Why it was refused.
    rejected: str = ""
    trace: Trace | None = None

    def check_time(self, now: float) -> None:
        """Raise DeadlineExceeded if ``now``, by the monotonic clock, is too late."""
        if now - self.start >= self.seconds:
            raise DeadlineExceeded(
                f"the answer was not ready within {self.seconds * 1000:.0f} ms, "
                "so what was left to do was not begun"
            )
