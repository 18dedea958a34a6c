"""Serve HTTP with uvicorn, with a graceful shutdown that loses no request.

HTTP itself leaves a gap: a request sent over an idle keep-alive connection at the moment it closes
is lost. While the server drains, its responses say ``connection: close``, so that hardly any client
still has such a connection; one that does sees it close without a byte of a response, and may
retry. Likewise, a connection is reset if its handshake is still under way when the port closes,
`HANDSHAKE_SECONDS` after new ones were last accepted.
"""

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import uvicorn

from dropserve.app.server.connection import Connection, State, readable

# Signals that stop the service, and the one by which a parent process stops a worker. Whoever stops
# a whole process group, as systemd does, sends the former to workers as well, who leave them to the
# parent.
STOPS, STOP = (signal.SIGTERM, signal.SIGINT), signal.SIGUSR1
# `timeout` sends its signal twice in a row, to the process and to its group.
ECHO_SECONDS = 1.0
# Grace period for open connections after the port closes.
GRACE_SECONDS = 0.1
# How long a handshake may still take once new ones are dropped.
HANDSHAKE_SECONDS = 0.05
# Linux's option for a socket's packet filter, which Python's socket module lacks, and a filter that
# drops each SYN except a SYN-ACK (socket(7); linux/filter.h has the layout: code, jump if true,
# jump if false, operand).
SO_ATTACH_FILTER = 26
DROP_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of the TCP header that holds the flags
        (0x54, 0, 0, 0x12),  # keep its SYN and ACK
        (0x15, 0, 1, 0x02),  # unless it is SYN alone, skip one
        (0x06, 0, 0, 0),  # drop the packet
        (0x06, 0, 0, 0xFFFFFFFF),  # take the whole packet
    )
)
# Connections accepted in one turn of the loop; more would leave none to the other workers.
ACCEPT_AT_ONCE = 32


class Stops:
    """Tells a second signal to stop from an echo of the first."""

    def __init__(self) -> None:
        self.first = -math.inf

    def is_echo(self) -> bool:
        """Note a signal; tell whether it comes within ``ECHO_SECONDS`` of one that counted."""
        now = time.monotonic()
        if now - self.first < ECHO_SECONDS:
            return True
        self.first = now
        return False


class Server(uvicorn.Server):
    """uvicorn's server with a graceful shutdown.

    SIGTERM or SIGINT begins it, and a second one, unless it comes within a second, ends the server
    at once; ``run`` returns after either. A worker of several takes ``STOP`` instead.

    Parameters
    ----------
    config
        uvicorn's configuration; its ``http`` is a `connection_class`.
    drain_delay
        Seconds for which requests are still accepted once draining has begun, so that a load
        balancer can notice.
    drain_seconds
        Longest wait in seconds for responses after that; requests still running are cancelled.
    draining
        Called once, when draining begins.
    alone
        Whether no other process accepts connections on the same port. With others, clients that
        connect at the moment the last process closes the port are reset.
    """

    server_state: State

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_delay: float,
        drain_seconds: float,
        draining: Callable[[], None],
        alone: bool,
    ) -> None:
        super().__init__(config)
        self.server_state = State()
        self.drain_delay = drain_delay
        self.draining = draining
        self.alone = alone
        self.stops = Stops()
        self.ports: list[socket.socket] = []
        # The loop itself keeps only weak references to tasks.
        self.connecting: set[asyncio.Task[object]] = set()
        # Declared as an int, but only ever passed on as a timeout.
        config.timeout_graceful_shutdown = drain_seconds  # type: ignore[assignment]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals stop the server; unlike in uvicorn, they are not raised again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handlers = dict.fromkeys(STOPS, self._stop_once) if self.alone else {STOP: self.stop}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _stop_once(self) -> None:
        if not self.stops.is_echo():
            self.stop()

    def stop(self) -> None:
        """Begin to drain, or end at once if already draining; called on the server's loop."""
        if self.server_state.draining:
            self.should_exit = self.force_exit = True
            return
        self.draining()
        self._drain(self.drain_delay)

    def leave(self) -> None:
        """Close the port and drain, unless that is under way; others accept connections on it.

        Hence the service stays ready. Called on the server's loop.
        """
        if not self.server_state.draining:
            self._drain(0)

    def _drain(self, delay: float) -> None:
        self.server_state.draining = True
        for connection in self.server_state.connections:
            if isinstance(connection, Connection):
                connection.end_after_answer()
        asyncio.get_running_loop().call_later(delay, self._exit)

    def _exit(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and accept connections as fast as they arrive.

        uvloop accepts one per turn of the loop, and under load a turn is long: a health probe would
        wait behind all earlier clients.
        """
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for port in server.sockets:
                # A second descriptor, as the loop already watches the first.
                own = socket.socket(fileno=os.dup(port.fileno()))
                own.setblocking(False)
                self.ports.append(own)
                loop.add_reader(own, self._accept, own)

    def _accept(self, port: socket.socket) -> None:
        # Other workers may have accepted the connections first.
        with contextlib.suppress(OSError):
            for _ in range(ACCEPT_AT_ONCE):
                self._connect(port.accept()[0])

    def _connect(self, client: socket.socket) -> None:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        protocol = partial(
            make, self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        task = loop.create_task(loop.connect_accepted_socket(protocol, client))
        self.connecting.add(task)
        task.add_done_callback(self.connecting.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, then idle connections, and wait for responses."""
        for server in self.servers:
            server.close()
        if self.alone and not self.force_exit:
            for port in self.ports:
                drop_handshakes(port)
            await asyncio.sleep(HANDSHAKE_SECONDS)
        for port in self.ports:
            asyncio.get_running_loop().remove_reader(port)
            self._close(port)
        if self.connecting:
            await asyncio.wait(self.connecting)
        loop = asyncio.get_running_loop()
        end = loop.time() + GRACE_SECONDS
        while self.server_state.connections and not self.force_exit and loop.time() < end:
            await asyncio.sleep(GRACE_SECONDS / 20)
        await super().shutdown(sockets)

    def _close(self, port: socket.socket) -> None:
        """Close a port; accept the connections in its queue, which may have sent requests."""
        clients: list[socket.socket] = []
        # Within one turn of the loop, as responses would bring clients back. Another worker may
        # accept a connection first.
        with contextlib.suppress(OSError):
            while len(clients) < self.config.backlog and readable(port.fileno()):
                clients.append(port.accept()[0])
        port.close()
        for client in clients:
            self._connect(client)


def drop_handshakes(port: socket.socket) -> None:
    """Have the kernel drop attempts to connect to a port; handshakes under way go on.

    A client whose attempt is dropped repeats it by itself a second later, and is refused once the
    port is closed. Dropping every packet instead would leave clients half connected: their
    first request would be reset.
    """
    program = ctypes.create_string_buffer(DROP_SYN)
    value = struct.pack("HP", len(DROP_SYN) // 8, ctypes.addressof(program))
    # The system may not support filters.
    with contextlib.suppress(OSError):
        port.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, value)
