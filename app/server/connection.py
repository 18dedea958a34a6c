"""A client's connection, and its limits: length of heads, time for a request to come, number."""

import os
import select
import socket
import uuid
from asyncio import AbstractEventLoop, TimerHandle, Transport
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.server import ServerState

from dropserve.app.http import problems, responses
from dropserve.app.server.protocol import Answering

# So many connections more than allowed may still ask for health.
CROWD = 64
# How long a refused client may go on sending: closed at once, the kernel would answer what it
# sends with a reset, which can overtake the reason of the refusal.
LINGER_SECONDS = 1.0


class State(ServerState):
    """What the server and its connections share."""

    draining = False


def readable(descriptor: int) -> bool:
    """Tell whether the kernel holds unread bytes, or connections not yet taken, of a socket."""
    # Not select.select, which takes no descriptor above 1023.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


@dataclass(frozen=True)
class Limits:
    """What clients may hold of a server.

    Parameters
    ----------
    connections
        Most open connections. `CROWD` more are taken for one request each, which the
        application's ``crowded`` answers if there is such; any further one is aborted.
    head_bytes
        Longest request line and headers together.
    receive_seconds
        Longest that a request's head may take, from its first byte (or from connecting), and
        then again its body.
    """

    connections: int
    head_bytes: int
    receive_seconds: float


class Connection(Answering):
    """A client's connection to a `Server`, kept to some limits.

    Requests mostly come whole, in one call of `data_received`: these cost no timer.
    """

    server_state: State

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: State,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = limits
        self.last = server_state.draining
        # The scope of the last request whose head is complete, and whether so is its body.
        self.headed: object = None
        self.whole = True
        # Whether the request being parsed asks for another protocol.
        self.upgrades = False
        # Whether what comes is no longer looked at.
        self.deaf = False
        # Bytes since the last whole request, or since the last that were part of a body.
        self.unused = 0
        # Runs while a client owes a part of a request, and while a refused one may go on sending.
        self.timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override] # as above it
        """Take a connection, if there are not too many."""
        super().connection_made(transport)
        above = len(self.connections) - self.limits.connections
        if above > CROWD:
            transport.abort()
            return
        if above > 0:
            self.last = True
            self.app = getattr(self.app, "crowded", self.app)
        self.timer = self.loop.call_later(self.limits.receive_seconds, self.late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.stop_timer()
        # uvicorn does that only for one that closed without an error.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def stop_timer(self) -> None:
        """Stop to wait for a client."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def data_received(self, data: bytes) -> None:
        """Take bytes as they come; in place of uvicorn's, which logs what clients do wrong."""
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
                    data = self.without_upgrade() + data[upgrade.args[0] :]
        except httptools.HttpParserError:
            self.refuse(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP")
            return
        if self.last:
            self.end_after_answer()
        if self.whole and self.scope is self.headed:
            if self.answering():
                self._unset_keepalive_if_required()
            elif self.last:
                self.transport.close()
            elif self.timer is None and self.timeout_keep_alive_task is None:
                # The rest of a body that was answered before it had come: only now it is idle.
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            return
        self._unset_keepalive_if_required()
        if self.unused > self.limits.head_bytes:
            self.refuse_head()
        elif self.timer is None:
            self.timer = self.loop.call_later(self.limits.receive_seconds, self.late)

    def on_headers_complete(self) -> None:
        """Begin to answer a request, if its head is not too long."""
        # Counted only where it could be: part of it may have come with the request before.
        if self.timer is not None or self.unused > self.limits.head_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.limits.head_bytes:
                self.refuse_head()
                # Ends the parsing.
                raise ValueError
            self.stop_timer()
        super().on_headers_complete()
        if self.upgrades:
            return
        self.headed = self.scope
        self.whole = False

    def _should_upgrade(self) -> bool:
        # Has uvicorn leave the request alone; a CONNECT has no address that it understands.
        self.upgrades = self.parser.get_method() != b"CONNECT"
        return self.upgrades

    def without_upgrade(self) -> bytes:
        """Write a head again that asked for another protocol, as some do with any request.

        The parser would take the body for the other protocol's.
        """
        self.upgrades = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    # The next two are uvicorn's but for what is counted, and less its questions about websockets.

    def on_body(self, body: bytes) -> None:
        """Take a part of a body; what is none, such as trailers, counts like a head."""
        self.unused = 0
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Note that a request is there as a whole."""
        if self.upgrades:
            return
        self.unused = 0
        self.whole = True
        if self.timer is not None:
            self.stop_timer()
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def answering(self) -> bool:
        """Tell whether the last request whose head is complete is still to be answered."""
        return self.headed is not None and not self.cycle.response_complete

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection for being idle, if no part of a request has come meanwhile."""
        self.timeout_keep_alive_task = None
        if self.timer is None:
            self.leave()

    def leave(self) -> None:
        """Close the connection for being idle, unless the kernel holds what is yet to be read.

        Where the loop was busy that may be a request that came in time, which would be lost.
        """
        descriptor = self.transport.get_extra_info("socket").fileno()
        if self.transport.is_closing() or readable(descriptor):
            return
        # The loop closes it a turn later, which may be long: its client is to know at once.
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as own:
            own.shutdown(socket.SHUT_WR)
        self.transport.close()

    def late(self) -> None:
        """End the wait for a part of a request, unless it is this side that keeps it waiting."""
        self.timer = None
        if self.scope is None:
            self.leave()
        elif self.flow.read_paused or (
            not self.whole
            and self.answering()
            and (self.cycle.response_started or self.cycle.waiting_for_100_continue)
        ):
            self.timer = self.loop.call_later(self.limits.receive_seconds, self.late)
        else:
            part = "head" if self.whole else "body"
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's {part} did not come in time")

    def refuse_head(self) -> None:
        """Refuse a request for the length of its head."""
        self.refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"the request's head is longer than {self.limits.head_bytes} bytes",
        )

    def refuse(self, status: HTTPStatus, detail: str) -> None:
        """Answer what is wrong with the request being received, and end the connection."""
        if self.deaf:
            return
        self.deaf = True
        self.stop_timer()
        self._unset_keepalive_if_required()
        if not self.whole:
            # What is wrong is the body of a request that the application has.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.pipeline:
                # Those before it are answered, and then the connection is idle.
                self.pipeline.popleft()
                return
            if self.cycle.response_started:
                self.transport.close()
                return
        elif self.answering():
            # It came while the one before it is answered.
            self.cycle.keep_alive = False
            return
        # The application takes note of what it never gets to see.
        refused = getattr(self.config.loaded_app, "refused", None)
        name = refused(status) if refused and self.whole else uuid.uuid4().hex
        answer = problems.problem(problems.Fault(status, detail), name)
        self.write(responses.named(answer, name), keep_alive=False)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def end_after_answer(self) -> None:
        """Have the answer that is due, or else the next, say that it is the last."""
        self.last = True
        if self.answering() and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close the connection, once what has come of a request is answered."""
        unread = readable(self.transport.get_extra_info("socket").fileno())
        if self.scope is self.headed and not unread:
            super().shutdown()


def connection_class(limits: Limits) -> type[Connection]:
    """Return what uvicorn makes a connection with."""
    # uvicorn does nothing with the class but call it.
    return cast("type[Connection]", partial(Connection, limits=limits))
