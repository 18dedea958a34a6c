"""What every request passes: id, key and deadline on its way in, log and metrics on its way out."""

import os
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from itertools import count

from dropserve.app.errors import Forbidden
from dropserve.app.http.problems import BodyError
from dropserve.app.observability import tracing
from dropserve.app.observability.logs import RequestLog
from dropserve.app.observability.metrics import Metrics
from dropserve.app.observability.record import MAX_TIMEOUT_MS, Call
from dropserve.app.observability.tracing import Spans
from dropserve.app.security.api_keys import Keys, Scope

Headers = Mapping[bytes, bytes]

# A request's own id is repeated only where it can do no harm in a header or a log.
SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
DIGITS = re.compile(rb"[0-9]{1,7}")


class Gate:
    """Lets requests in, and takes note of them when they are out.

    Parameters
    ----------
    keys
        Who may ask; None: everybody may.
    admin
        Whether everybody may also change which models are served; without keys only.
    timeout_ms
        How long an answer may take where the client does not say.
    metrics, log, spans
        Where requests are counted and written down.
    """

    def __init__(
        self,
        *,
        keys: Keys | None,
        admin: bool,
        timeout_ms: int,
        metrics: Metrics,
        log: RequestLog,
        spans: Spans | None,
    ) -> None:
        self.keys = keys
        self.admin = admin
        self.seconds = timeout_ms / 1000
        self.metrics = metrics
        self.log = log
        self.spans = spans
        # Together an id that no other process gives, and no other request of this one.
        self.process, self.numbers = os.urandom(8).hex(), count()

    def enter(self, method: str, route: str, headers: Headers) -> Call:
        """Begin to take note of a request."""
        given = headers.get(b"x-request-id")
        if given is not None and SAFE_ID.fullmatch(given):
            name = given.decode()
        else:
            name = f"{self.process}{next(self.numbers):016x}"
        call = Call(method, route, name, self.seconds)
        if (traceparent := headers.get(b"traceparent")) is not None:
            call.trace = tracing.read(traceparent)
        return call

    def check(self, call: Call, headers: Headers, scope: Scope | None) -> None:
        """Check a request's key, and read its deadline.

        Raises
        ------
        Unauthorized, Forbidden
            If it has no key that will do.
        BodyError
            400 if its deadline is no number that is allowed.
        """
        if self.keys is not None:
            self.keys.check(headers, scope)
        elif scope == "admin" and (not self.admin or b"origin" in headers):
            # A browser says the origin of a page, and any page may send to a loopback address.
            raise Forbidden(
                "which models are served may be changed with a key only, or without one by who is "
                "no web page where the service listens on a loopback address"
            )
        if (timeout := headers.get(b"x-request-timeout-ms")) is not None:
            if not DIGITS.fullmatch(timeout) or not 1 <= int(timeout) <= MAX_TIMEOUT_MS:
                raise BodyError(
                    HTTPStatus.BAD_REQUEST,
                    f"X-Request-Timeout-Ms must be a whole number from 1 to {MAX_TIMEOUT_MS}",
                )
            call.seconds = int(timeout) / 1000

    def leave(self, call: Call, status: int) -> None:
        """Count a request that was answered, and write it down."""
        seconds = time.monotonic() - call.start
        self.metrics.count(call, status, seconds)
        self.log.write(call, status, seconds)
        if self.spans:
            self.spans.write(call, status, seconds)
