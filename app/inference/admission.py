"""Admission control: requests beyond a limit are refused at once, and told when to try again."""

import math
from types import TracebackType

from dropserve.app.errors import Overloaded

# Longest wait that a refused client is asked to make.
MAX_RETRY_SECONDS = 60


class Admission:
    """Bounds the total size of the requests that are being answered.

    Parameters
    ----------
    limit
        Largest total size.
    unit
        Unit named in the refusal message.
    """

    def __init__(self, limit: int, unit: str = "rows x passes") -> None:
        self.limit = limit
        self.unit = unit
        self.held = 0
        # Time that the admitted work should take.
        self.seconds = 0.0

    def check(self, size: int = 1) -> None:
        """Raise Overloaded if a request of this size would exceed the limit.

        A request larger than the limit is admitted while there is no other. If it were refused,
        clients would retry it forever.
        """
        if self.held and self.held + size > self.limit:
            raise Overloaded(
                f"the queue is full: {self.unit} of all requests may be at most {self.limit}",
                min(MAX_RETRY_SECONDS, max(1, math.ceil(self.seconds))),
            )

    def acquire(self, size: int, seconds: float = 0.0) -> None:
        """Admit a request that should take ``seconds``; raise as ``check`` does."""
        self.check(size)
        self.held += size
        self.seconds += seconds

    def release(self, size: int, seconds: float = 0.0) -> None:
        """Release the size of an admitted request."""
        self.held -= size
        self.seconds -= seconds


class Admitted:
    """Context of an admitted request; entering it raises Overloaded if the limit is exceeded."""

    def __init__(self, admission: Admission, size: int, seconds: float) -> None:
        self.admission = admission
        self.size = size
        self.seconds = seconds

    def __enter__(self) -> None:
        self.admission.acquire(self.size, self.seconds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.admission.release(self.size, self.seconds)
