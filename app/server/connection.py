"""The request side of a connection, and its limits: number, length of heads, time to arrive."""

import os
import select
import socket
from asyncio import AbstractEventLoop, TimerHandle, Transport
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.server import ServerState

from dropserve.app.server.protocol import ResponseProtocol, ServedApplication

# Connections beyond the limit that may still probe the health of the service.
CROWD = 64
# How long a refused client may go on sending. After an immediate close the kernel would answer it
# with a reset, which can overtake the refusal.
LINGER_SECONDS = 1.0
# Pauses between probes of a client that sends no more: the first, doubled each time, up to a limit.
PROBE_SECONDS, LONGEST_PROBE_SECONDS = 0.05, 5.0


class State(ServerState):
    """State that the server and its connections share."""

    draining = False


def readable(descriptor: int) -> bool:
    """Tell whether the kernel holds unread bytes, or unaccepted connections, for a socket."""
    # select.select takes no descriptor above 1023.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


@dataclass(frozen=True)
class Limits:
    """Limits on what a server's clients may hold.

    Parameters
    ----------
    connections
        Most open connections. `CROWD` more are accepted for one request each, which the
        application's ``crowded`` answers; any further one is aborted.
    head_bytes
        Longest request line and headers together.
    receive_seconds
        Longest time for the head of a request to arrive, from its first byte (or from connecting),
        and again for its body.
    send_seconds
        Longest time in which a client may read less than `LEAST_READ_BYTES` of its responses while
        more is left.
    """

    connections: int
    head_bytes: int
    receive_seconds: float
    send_seconds: float


class Connection(ResponseProtocol):
    """A client's connection to a `Server`, held to limits.

    Most requests arrive whole, in one call of `data_received`; they need no timer.
    """

    server_state: State

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: State,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
        *,
        application: ServedApplication,
        limits: Limits,
    ) -> None:
        super().__init__(
            config,
            server_state,
            app_state,
            _loop,
            application=application,
            send_seconds=limits.send_seconds,
        )
        self.limits = limits
        self.last = server_state.draining
        # Scope of the last request whose head is complete, and whether its body is complete, too.
        self.headed: object = None
        self.whole = True
        # Whether the request being parsed asks for another protocol.
        self.upgrades = False
        # Whether further bytes are ignored.
        self.deaf = False
        # Bytes since the last complete request, or the last part of a body.
        self.unused = 0
        # Runs while a part of a request is missing, while a refused client may go on sending, and
        # while a client that sends no more waits for its response.
        self.timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Accept a connection, unless there are too many."""
        super().connection_made(transport)
        above = len(self.connections) - self.limits.connections
        if above > CROWD:
            transport.abort()
            return
        if above > 0:
            self.last = True
            self.crowding = True
            self.app = self.application.crowded
        self.timer = self.loop.call_later(self.limits.receive_seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        # uvicorn does this only for a connection that closed without an error.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        """Stop waiting for the client."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; unlike uvicorn, without logging the errors of clients."""
        if self.deaf:
            return
        self.unused += len(data)
        self.first = True
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._without_upgrade() + data[upgrade.args[0] :]
        except httptools.HttpParserError:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP")
            return
        if self.last:
            self.end_after_answer()
        if self.whole and self.scope is self.headed:
            if self._is_answering():
                self._unset_keepalive_if_required()
            elif self.last:
                self.transport.close()
            elif self.timer is None and self.timeout_keep_alive_task is None:
                # The rest of a body that was answered before it arrived: now idle.
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            return
        self._unset_keepalive_if_required()
        if self.unused > self.limits.head_bytes:
            self._refuse_head()
        elif self.timer is None:
            self.timer = self.loop.call_later(self.limits.receive_seconds, self._late)

    def eof_received(self) -> bool:  # type: ignore[override] # as asyncio has it
        """Keep the connection open if its client waits for a response, and will send no more.

        Such a client looks like one that is gone until something is written to it: `_probe`.
        """
        if not self.whole or not self._is_answering():
            return False
        self.end_after_answer()
        # Of a further request, of which only a part will have come.
        self._stop_timer()
        self.timer = self.loop.call_later(PROBE_SECONDS, self._probe, 2 * PROBE_SECONDS)
        return True

    def _probe(self, next_seconds: float) -> None:
        """Find out whether a client that sends no more is still there.

        The system of one that is gone answers any bytes with a reset, and the connection is then
        lost at the next write. The bytes are an interim response, which a client may get at any
        time before the final one (RFC 9110, section 15.2); clients of HTTP/1.0 know none.
        """
        self.timer = None
        cycle = self.cycle
        if not self._is_answering() or cycle.response_started or self.transport.is_closing():
            return
        if not self.pipeline and cycle.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        longer = min(LONGEST_PROBE_SECONDS, 2 * next_seconds)
        self.timer = self.loop.call_later(next_seconds, self._probe, longer)

    def on_headers_complete(self) -> None:
        """Start on a request, if its head is valid and not too long."""
        # Measured only where it can be too long: parts may have arrived with the previous request.
        if self.timer is not None or self.unused > self.limits.head_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.limits.head_bytes:
                self._refuse_head()
                # Ends parsing.
                raise ValueError
            self._stop_timer()
        self._check_head()
        super().on_headers_complete()
        if self.upgrades:
            return
        self.headed = self.scope
        self.whole = False

    def _check_head(self) -> None:
        """Refuse a head that the parser takes, but whose meaning another server may see otherwise.

        Raises ValueError, which ends parsing.
        """
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            # RFC 9112, section 3.2.
            self._refuse(HTTPStatus.BAD_REQUEST, f"one Host header is needed, not {hosts}")
            raise ValueError
        if b"transfer-encoding" in names:
            codings = [value for name, value in self.headers if name == b"transfer-encoding"]
            if [coding.lower() for coding in codings] != [b"chunked"]:
                # RFC 9112, section 6.1.
                self._refuse(
                    HTTPStatus.NOT_IMPLEMENTED, "the only transfer coding taken is 'chunked'"
                )
                raise ValueError

    def _should_upgrade(self) -> bool:
        # Makes uvicorn leave the request alone. A CONNECT has no address that it understands.
        self.upgrades = self.parser.get_method() != b"CONNECT"
        return self.upgrades

    def _without_upgrade(self) -> bytes:
        """Return the head of a request without its demand for another protocol.

        Some clients send one with every request, and the parser would then not parse the body.
        """
        self.upgrades = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    # The next two are as in uvicorn, plus byte counting, minus WebSocket checks.

    def on_body(self, body: bytes) -> None:
        """Take a part of a body; anything else, such as trailers, counts as head."""
        self.unused = 0
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Note that a request is complete."""
        if self.upgrades:
            return
        self.unused = 0
        self.whole = True
        if self.timer is not None:
            self._stop_timer()
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def _is_answering(self) -> bool:
        """Tell whether the last request with a complete head still lacks its response."""
        return self.headed is not None and not self.cycle.response_complete

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, unless part of a request has arrived.

        A connection is not idle while its client still reads a response.
        """
        self.timeout_keep_alive_task = None
        if self.unread():
            self.limit_reading()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        elif self.timer is None:
            self._close_idle()

    def _close_idle(self) -> None:
        """Close an idle connection, unless the kernel holds unread bytes of it.

        If the loop was busy, they may be a request that arrived in time, and would be lost.
        """
        descriptor = self.transport.get_extra_info("socket").fileno()
        if self.transport.is_closing() or readable(descriptor):
            return
        # The loop closes it one turn later, which may be long; its client should know at once.
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as own:
            own.shutdown(socket.SHUT_WR)
        self.transport.close()

    def _late(self) -> None:
        """Stop waiting for a part of a request, unless this side keeps the client waiting."""
        self.timer = None
        if self.scope is None:
            self._close_idle()
        elif self.flow.read_paused or (
            not self.whole
            and self._is_answering()
            and (self.cycle.response_started or self.cycle.waiting_for_100_continue)
        ):
            self.timer = self.loop.call_later(self.limits.receive_seconds, self._late)
        else:
            part = "head" if self.whole else "body"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's {part} did not come in time")

    def _refuse_head(self) -> None:
        """Refuse a request whose head is too long."""
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the request's head is longer than {self.limits.head_bytes} bytes",
        )

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Refuse the request being received, and end the connection."""
        if self.deaf:
            return
        self.deaf = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        if not self.whole:
            # The fault is in the body of a request that the application already has.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.pipeline:
                # Earlier requests get their responses, and then the connection is idle.
                self.pipeline.popleft()
                return
            if self.cycle.response_started:
                self.transport.close()
                return
        elif self._is_answering():
            # The faulty request arrived before the response to the previous one.
            self.cycle.keep_alive = False
            return
        scope = None if self.whole else cast("Scope", self.cycle.scope)
        response = self.application.malformed(status, detail, scope)
        self.write(response, keep_alive=False)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def end_after_answer(self) -> None:
        """Announce in the present response, or else in the next, that it is the last."""
        self.last = True
        if self._is_answering() and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close the connection, once the response to a request that has arrived is out."""
        unread = readable(self.transport.get_extra_info("socket").fileno())
        if self.scope is self.headed and not unread:
            super().shutdown()


def connection_class(application: ServedApplication, limits: Limits) -> type[Connection]:
    """Return the class that uvicorn makes connections with."""
    # uvicorn only calls it.
    return cast("type[Connection]", partial(Connection, application=application, limits=limits))
