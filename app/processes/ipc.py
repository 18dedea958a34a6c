"""Messages between two processes: requests and responses, both ways.

A worker and the parent process (``supervisor``) hold the two ends of a socket pair; ``group`` has
the messages. No process ever waits for another to read: bytes that a socket does not take at once
are sent later.
"""

import asyncio
import itertools
import logging
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import NamedTuple

Handle = Callable[[object], Awaitable[object]]

# In front of each message: its length in bytes.
LENGTH = struct.Struct("!I")
# Messages are small: a process that leaves this many bytes unread is stuck, and gets no further
# request until it reads them.
MOST_UNSENT = 4 * 2**20

log = logging.getLogger(__name__)


class Unanswered(Exception):
    """A request gets no answer: the other process is gone, stuck or too slow."""


class Request(NamedTuple):
    """A message to handle; without a number no response is wanted."""

    number: int | None
    content: object


class Response(NamedTuple):
    """The answer to the request of the same number, or the exception raised instead."""

    number: int
    content: object
    error: Exception | None = None


class Channel:
    """One end of a connection between two processes; both send requests and responses.

    Parameters
    ----------
    end
        A Unix stream socket that is connected to the other process; the channel closes it.
    handle
        Answers a request of the other process; an exception raised here is raised there.
    ended
        Called when the connection ends other than by ``close``: the other process is gone, or has
        closed its end.
    """

    # Set by the time that ``opened`` is, unless the channel is closed by then.
    writer: asyncio.StreamWriter

    def __init__(self, end: socket.socket, handle: Handle, ended: Callable[[], None]) -> None:
        self.end = end
        self.handle = handle
        self.ended = ended
        self.opened = asyncio.Event()
        self.closed = False
        self.numbers = itertools.count()
        self.waiting: dict[int, asyncio.Future[object]] = {}
        # The event loop keeps only weak references to tasks.
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to listen, on the running event loop."""
        self.run(self.listen())

    def close(self) -> None:
        """Close this end, dropping unsent messages; requests under way raise Unanswered."""
        if self.closed:
            return
        self.closed = True
        if self.opened.is_set():
            # Unlike close(), it does not wait for the other process to read.
            self.writer.transport.abort()
        self.opened.set()
        for answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(Unanswered("the process is gone"))

    def notify(self, content: object) -> None:
        """Send a request without a response: the other process logs any exception."""
        self.run(self.send(Request(None, content)))

    async def request(self, content: object, seconds: float | None = None) -> object:
        """Send a request; return the other process's answer.

        Raises
        ------
        Unanswered
            If the other process is gone or stuck, or does not answer within ``seconds``.
        Exception
            Whatever ``handle`` raises in the other process.
        """
        await self.opened.wait()
        if self.closed:
            raise Unanswered("the process is gone")
        if self.writer.transport.get_write_buffer_size() > MOST_UNSENT:
            raise Unanswered("the process has stopped listening")
        number = next(self.numbers)
        answer = self.waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self.send(Request(number, content))
            await asyncio.wait([answer], timeout=seconds)
            if not answer.done():
                raise Unanswered(f"no answer within {seconds} s")
            return answer.result()
        finally:
            del self.waiting[number]

    async def send(self, message: Request | Response) -> None:
        """Send a message, or keep it until the other process has read the earlier ones."""
        content = pickle.dumps(message)
        await self.opened.wait()
        # It may be closing already if ``listen`` has yet to notice that the other process is gone.
        if not self.closed and not self.writer.is_closing():
            self.writer.write(LENGTH.pack(len(content)) + content)

    async def listen(self) -> None:
        """Take messages until one of the processes closes its end."""
        try:
            reader, self.writer = await asyncio.open_unix_connection(sock=self.end)
            if self.closed:
                self.writer.transport.abort()
            self.opened.set()
            # It is reset if the other process ends without having read all of its messages.
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                    # Only our own processes hold the ends, so unpickling runs no foreign code.
                    self.receive(pickle.loads(await reader.readexactly(length)))
        finally:
            if not self.closed:
                self.close()
                self.ended()

    def receive(self, message: Request | Response) -> None:
        """Begin to answer a request, or hand a response to the request that waits for it."""
        if isinstance(message, Request):
            self.run(self.respond(message))
            return
        answer = self.waiting.get(message.number)
        if answer is None or answer.done():
            # No request waits for it any more.
            return
        if message.error:
            answer.set_exception(message.error)
        else:
            answer.set_result(message.content)

    async def respond(self, request: Request) -> None:
        """Handle a request, and send the response if one is wanted."""
        number, content = request
        try:
            answer = await self.handle(content)
            if number is not None:
                await self.send(Response(number, answer))
        # Any exception concerns the other process, not this one.
        except Exception as error:
            if number is None:
                log.exception("cannot handle %r", content)
            else:
                await self.send(Response(number, None, portable(error)))

    def run(self, step: Coroutine[object, object, None]) -> None:
        """Run a coroutine as a task."""
        task = asyncio.get_running_loop().create_task(step)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def portable(error: Exception) -> Exception:
    """Return an exception that another process can unpickle: the same, or one with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    # Pickling may raise anything: most often because the exception's class does not take just one
    # argument.
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
