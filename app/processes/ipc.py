"""The worker processes that serve together: what is asked of one can be asked of all.

A worker and the parent process (``supervisor``) hold the two ends of a pair of sockets. A worker
that asks all others asks the parent, which passes the question on and gathers the answers. No
process ever waits to be read: what a socket does not take at once is kept and sent later.
"""

import asyncio
import itertools
import logging
import pickle
import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple

Handle = Callable[[object], Awaitable[object]]

LENGTH_BYTES = 4
# Messages are small: a process that leaves so much unread is stuck, and is not asked meanwhile.
MOST_UNSENT = 4 * 2**20

log = logging.getLogger(__name__)


class Unanswered(Exception):
    """A question that gets no answer: the process is gone or stuck, or takes too long."""


class Replies(NamedTuple):
    """What became of a question to all workers."""

    answers: list[object]  # one for each living worker that answers, own first
    gone: object  # what is kept of workers that died; None: nothing
    deaths: int  # workers that died since the service was started


class Serving(NamedTuple):
    """A worker tells the parent that its event loop runs, and what it then serves."""

    state: object


class Asked(NamedTuple):
    """A worker asks the parent to ask all others, and brings its own answer."""

    question: object
    answer: object


class Change(NamedTuple):
    """A worker is asked to change what it serves; it answers with what it serves then."""

    question: object


class Group:
    """The worker processes that serve together, seen from one of them.

    Parameters
    ----------
    handle
        Answers a question in this process, on the event loop. Two workers may ask each other at
        the same moment, so it must not wait for anything that is held while this one asks.
    link
        To the parent; None: this is the only process.
    orphaned
        Called when the parent is gone.
    state
        Says what is served, so that a worker started later can be told to serve the same.
    """

    def __init__(
        self,
        handle: Handle,
        link: socket.socket | None,
        orphaned: Callable[[], None],
        state: Callable[[], object],
    ) -> None:
        self.handle = handle
        self.state = state
        self.line = None if link is None else Line(link, self.answer, orphaned)

    def start(self) -> None:
        """Begin to listen, on the running event loop."""
        if self.line:
            self.line.start()
            self.line.tell(Serving(self.state()))

    def close(self) -> None:
        """Ask and answer no more."""
        if self.line:
            self.line.close()

    async def answer(self, content: object) -> object:
        """Answer what the parent asks."""
        if isinstance(content, Change):
            await self.handle(content.question)
            return self.state()
        return await self.handle(content)

    async def ask(self, question: object) -> Replies:
        """Ask this worker, then all others.

        What ``handle`` raises here is raised, and nobody else is asked; then what it raises in
        another worker is, once all have answered.

        Raises
        ------
        Unanswered
            If the parent is gone.
        """
        answer = await self.handle(question)
        if self.line is None:
            return Replies([answer], None, 0)
        replies = await self.line.ask(Asked(question, answer))
        assert isinstance(replies, Replies)
        return replies

    async def change(self, question: object) -> None:
        """Have all workers change what they serve, this one first; one change after the other.

        Raises as ``ask`` does. Workers that are started from now on are given what is served then.
        """
        if self.line is None:
            await self.handle(question)
        else:
            await self.line.ask(Change(question))


class Question(NamedTuple):
    """What is sent to ask; nobody waits for the answer where there is no number."""

    number: int | None
    content: object


class Reply(NamedTuple):
    """What is sent to answer, or to say what went wrong instead."""

    number: int
    content: object
    error: Exception | None = None


class Line:
    """One end of a pair of sockets between two processes: each asks and answers the other.

    Parameters
    ----------
    end
        A stream socket that is connected to the other process.
    handle
        Answers what the other process asks; what it raises is raised over there.
    ended
        Called when the other process is gone or has closed its end.
    """

    def __init__(self, end: socket.socket, handle: Handle, ended: Callable[[], None]) -> None:
        self.end = end
        self.handle = handle
        self.ended = ended
        self.closed = False
        self.received = bytearray()
        self.unsent = bytearray()
        self.numbers = itertools.count()
        self.asked: dict[int, asyncio.Future[object]] = {}
        # The event loop itself does not keep its tasks alive.
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to listen, on the running event loop."""
        self.end.setblocking(False)
        asyncio.get_running_loop().add_reader(self.end, self.read)

    def close(self) -> None:
        """Close this end; what was asked and is not answered yet never will be."""
        if self.closed:
            return
        self.closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.end)
        loop.remove_writer(self.end)
        self.end.close()
        for answer in self.asked.values():
            if not answer.done():
                answer.set_exception(Unanswered("the process is gone"))

    def tell(self, content: object) -> None:
        """Ask without an answer: what goes wrong over there is logged over there."""
        self.send(Question(None, content))

    async def ask(self, content: object, seconds: float | None = None) -> object:
        """Ask the other process.

        Raises
        ------
        Unanswered
            If it is gone or stuck, or does not answer within ``seconds``.
        Exception
            Whatever is raised over there.
        """
        if self.closed:
            raise Unanswered("the process is gone")
        if len(self.unsent) > MOST_UNSENT:
            raise Unanswered("the process has stopped listening")
        number = next(self.numbers)
        self.send(Question(number, content))
        answer = self.asked[number] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([answer], timeout=seconds)
            if not answer.done():
                raise Unanswered(f"no answer within {seconds} s")
            return answer.result()
        finally:
            del self.asked[number]

    def send(self, message: Question | Reply) -> None:
        """Send a message, now or when the other process has read what was sent before."""
        content = pickle.dumps(message)
        if not self.closed:
            self.unsent += len(content).to_bytes(LENGTH_BYTES) + content
            self.write()

    def write(self) -> None:
        """Send as much as the socket takes."""
        try:
            sent = self.end.send(self.unsent)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            # There is nobody to send to, which reading notices too.
            sent = len(self.unsent)
        del self.unsent[:sent]
        if self.unsent:
            asyncio.get_running_loop().add_writer(self.end, self.write)
        else:
            asyncio.get_running_loop().remove_writer(self.end)

    def read(self) -> None:
        """Take what has come."""
        try:
            content = self.end.recv(2**16)
        except BlockingIOError:
            return
        except ConnectionError:
            # It has ended without reading all that it was sent.
            content = b""
        if not content:
            self.close()
            self.ended()
            return
        self.received += content
        while len(self.received) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self.received[:LENGTH_BYTES])
            if len(self.received) < end:
                break
            # Only the two processes of ours hold an end, so unpickling runs nobody else's code.
            message = pickle.loads(self.received[LENGTH_BYTES:end])
            del self.received[:end]
            self.take(message)

    def take(self, message: Question | Reply) -> None:
        """Begin to answer a question, or hand out an answer."""
        if isinstance(message, Question):
            task = asyncio.get_running_loop().create_task(self.answer(message))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            return
        answer = self.asked.get(message.number)
        if answer is None or answer.done():
            # It comes too late.
            return
        if message.error:
            answer.set_exception(message.error)
        else:
            answer.set_result(message.content)

    async def answer(self, question: Question) -> None:
        """Answer a question."""
        number, content = question
        try:
            reply = await self.handle(content)
            if number is not None:
                self.send(Reply(number, reply))
        # Whatever it is, it concerns whoever asked.
        except Exception as error:
            if number is None:
                log.exception("cannot do as told: %r", content)
            else:
                self.send(Reply(number, None, portable(error)))


def portable(error: Exception) -> Exception:
    """Return an exception that another process can unpickle: the same, or one with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    # Any exception may fail here in any way: most often its class takes other arguments than one.
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
