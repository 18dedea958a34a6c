"""Start and end of every request: id, API key and deadline; then metrics, log and spans."""

import os
import re
import time
from http import HTTPStatus
from itertools import count
from types import TracebackType

from starlette.exceptions import HTTPException

from dropserve.app.errors import Forbidden
from dropserve.app.http.bodies import Headers
from dropserve.app.observability import tracing
from dropserve.app.observability.logs import RequestLog
from dropserve.app.observability.metrics import Metrics
from dropserve.app.observability.record import MAX_TIMEOUT_MS, RequestRecord
from dropserve.app.observability.tracing import Spans
from dropserve.app.security.api_keys import Keys, Scope
from dropserve.app.security.hosts import Hosts

# A client's request id is repeated only if it can do no harm in a header or the log.
SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
DIGITS = re.compile(rb"[0-9]{1,7}")


class Context:
    """Opens and closes the record of each request.

    Parameters
    ----------
    keys
        The API keys; None: no key is needed.
    hosts
        The names that clients without a key may call the service by.
    allow_local_admin
        Whether models may be changed without a key, since only this machine can connect.
    timeout_ms
        Time limit of a response, unless the client sets one.
    metrics, log, spans
        Where requests are counted, logged and traced.
    """

    def __init__(
        self,
        *,
        keys: Keys | None,
        hosts: Hosts,
        allow_local_admin: bool,
        timeout_ms: int,
        metrics: Metrics,
        log: RequestLog,
        spans: Spans | None,
    ) -> None:
        self.keys = keys
        self.hosts = hosts
        self.allow_local_admin = allow_local_admin
        self.time_limit = timeout_ms / 1000
        self.metrics = metrics
        self.log = log
        self.spans = spans
        # Together they make an id that is unique over all processes and requests.
        self.process, self.numbers = os.urandom(8).hex(), count()

    def request(self, method: str, route: str, headers: Headers) -> "OpenRequest":
        """Open a request: a context manager, which gives its record and counts it at the end."""
        given = headers.get(b"x-request-id")
        if given is not None and SAFE_ID.fullmatch(given):
            request_id = given.decode()
        else:
            request_id = f"{self.process}{next(self.numbers):016x}"
        record = RequestRecord(method, route, request_id, self.time_limit)
        if (traceparent := headers.get(b"traceparent")) is not None:
            record.trace = tracing.parse_traceparent(traceparent)
        return OpenRequest(self, record)

    def check(self, record: RequestRecord, headers: Headers, scope: Scope | None) -> None:
        """Check the host and the API key of a request, and set its deadline.

        Raises
        ------
        Misdirected
            As ``check_host`` does.
        Unauthorized, Forbidden
            If the request has no key, or one that is not valid for ``scope``.
        HTTPException
            400 if its deadline is not an allowed number.
        """
        self.check_host(headers)
        if self.keys is not None:
            self.keys.check(headers, scope)
        elif scope == "admin" and (not self.allow_local_admin or b"origin" in headers):
            # A browser names the origin of a page, and any page may post to a loopback address.
            raise Forbidden(
                "changing models requires an admin key, or a client that is no browser on a "
                "loopback address"
            )
        if (timeout := headers.get(b"x-request-timeout-ms")) is not None:
            if not DIGITS.fullmatch(timeout) or not 1 <= int(timeout) <= MAX_TIMEOUT_MS:
                raise HTTPException(
                    HTTPStatus.BAD_REQUEST,
                    f"X-Request-Timeout-Ms must be a whole number from 1 to {MAX_TIMEOUT_MS}",
                )
            record.time_limit = int(timeout) / 1000

    def check_host(self, headers: Headers) -> None:
        """Raise Misdirected if no key is needed and the request is to a foreign host."""
        if self.keys is None:
            self.hosts.check(headers.get(b"host", b""))

    def close(self, record: RequestRecord) -> None:
        """Count, log and trace a request whose response is out."""
        seconds = time.monotonic() - record.start
        self.metrics.count(record, seconds)
        self.log.write(record, seconds)
        if self.spans:
            self.spans.write(record, seconds)


class OpenRequest:
    """Context manager around the answer to a request."""

    __slots__ = ("context", "record")

    def __init__(self, context: Context, record: RequestRecord) -> None:
        self.context = context
        self.record = record

    def __enter__(self) -> RequestRecord:
        return self.record

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.context.close(self.record)
