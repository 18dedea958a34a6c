"""Serve HTTP by uvicorn, with an end that loses no request.

What HTTP cannot promise: a request sent over an idle kept connection in the moment in which it is
closed is lost. While the server drains its answers say ``connection: close``, so that hardly a
client has such a connection left; one that does sees it close without a byte of an answer, and
may send the request again. Likewise a handshake of which only the client's half is over when
the port closes: such a connection is reset.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from app.connection import Connection, State, readable

# How long who has connected, or is about to ask again, is waited for once the port is closed.
GRACE_SECONDS = 0.1


class Server(uvicorn.Server):
    """uvicorn's server, drained before it ends.

    SIGTERM or SIGINT begins that, a second one ends at once; ``run`` returns after both.

    Parameters
    ----------
    config
        uvicorn's; its ``http`` is a `connection_class`.
    drain_delay
        Seconds for which requests are still taken once draining has begun, so that a load
        balancer can learn of it.
    drain_seconds
        Longest that answers are waited for after that; what is left then is cancelled.
    draining
        Called once, when draining begins.
    """

    server_state: State

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_delay: float,
        drain_seconds: float,
        draining: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.server_state = State()
        self.drain_delay = drain_delay
        self.draining = draining
        # Nothing is done with it but to wait that long.
        config.timeout_graceful_shutdown = drain_seconds  # type: ignore[assignment]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals stop the server; unlike uvicorn, without raising them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in HANDLED_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in HANDLED_SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin to drain, or if that has begun end at once; called in the server's loop."""
        if self.server_state.draining:
            self.should_exit = self.force_exit = True
            return
        self.server_state.draining = True
        self.draining()
        for connection in self.server_state.connections:
            if isinstance(connection, Connection):
                connection.end_after_answer()
        asyncio.get_running_loop().call_later(self.drain_delay, self._exit)

    def _exit(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, then what is idle, and wait for the answers."""
        # Descriptors of our own: uvicorn's are gone before their queues are seen to be empty.
        listeners = [
            socket.socket(fileno=os.dup(port.fileno()))
            for server in self.servers
            for port in server.sockets
        ]
        for server in self.servers:
            server.close()
        for listener in listeners:
            await self._close(listener)
        loop = asyncio.get_running_loop()
        end = loop.time() + GRACE_SECONDS
        while self.server_state.connections and not self.force_exit and loop.time() < end:
            await asyncio.sleep(GRACE_SECONDS / 20)
        await super().shutdown(sockets)

    async def _close(self, listener: socket.socket) -> None:
        """Close a port, and take who waited in its queue, maybe with a request sent."""
        listener.setblocking(False)
        clients: list[socket.socket] = []
        # With no turn of the loop, whose answers would have clients come again: only who comes
        # between the last look and the end is lost. Where others listen too one may be faster.
        with contextlib.suppress(OSError):
            while len(clients) < self.config.backlog and readable(listener.fileno()):
                clients.append(listener.accept()[0])
        listener.close()
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        protocol = partial(
            make, self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        for client in clients:
            client.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(protocol, client)
