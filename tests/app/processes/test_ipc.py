"""Two ends of a connection between processes, on asyncio's event loop and on uvloop's."""

import asyncio
import logging
import pickle
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from dropserve.app.errors import LoadError
from dropserve.app.processes.ipc import LENGTH, MOST_UNSENT, Channel, Request, Response, Unanswered

PATIENCE = 20  # seconds

# The parent's, and the workers' under uvicorn.
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [
    asyncio.new_event_loop,
    uvloop.new_event_loop,
]
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on either event loop."""

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(scenario, PATIENCE))

    return run


class Refusals(Exception):
    """An exception that pickles without one of its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


async def handle(content: object) -> object:
    """Answer a request of the other end."""
    match content:
        case ["sleep", float(seconds)]:
            await asyncio.sleep(seconds)
        case ["raise"]:
            raise LoadError("no model")
        case ["raise an unpicklable exception"]:
            raise Refusals("no", "model")
        case ["return an unpicklable answer"]:
            return lambda: None
    return ["answer", content]


class End:
    """A channel, and how often its connection has ended."""

    def __init__(self, end: socket.socket) -> None:
        self.endings = 0
        self.over = asyncio.Event()
        self.channel = Channel(end, handle, self.ended)
        self.channel.start()

    def ended(self) -> None:
        self.endings += 1
        self.over.set()


@asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[End, End]]:
    ends = [End(each) for each in socket.socketpair()]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.channel.close()


@asynccontextmanager
async def one_end() -> AsyncIterator[tuple[End, socket.socket]]:
    """Yield an end, and the socket of the other process, which reads nothing by itself."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    end = End(ours)
    with theirs:
        try:
            yield end, theirs
        finally:
            end.channel.close()


async def received(end: socket.socket) -> object:
    """Read a message as the other process does."""
    loop = asyncio.get_running_loop()
    content = b""
    while len(content) < LENGTH.size:
        content += await loop.sock_recv(end, LENGTH.size - len(content))
    (length,) = LENGTH.unpack(content)
    content = b""
    while len(content) < length:
        content += await loop.sock_recv(end, length - len(content))
    message: object = pickle.loads(content)
    return message


def framed(message: object) -> bytes:
    content = pickle.dumps(message)
    return LENGTH.pack(len(content)) + content


async def unanswered(response: Awaitable[object], why: str) -> None:
    with pytest.raises(Unanswered, match=why):
        await response


def test_both_ends_ask_and_answer_at_once(run: Run) -> None:
    async def scenario() -> None:
        async with two_ends() as ends:
            requests = [end.channel.request([number]) for number in range(20) for end in ends]
            answers = await asyncio.gather(*requests)
            assert answers == [["answer", [number]] for number in range(20) for _ in ends]
            assert [end.endings for end in ends] == [0, 0]

    run(scenario())


def test_a_quick_answer_does_not_wait_for_a_slow_one(run: Run) -> None:
    async def scenario() -> None:
        async with two_ends() as (one, _):
            slow = asyncio.create_task(one.channel.request(["sleep", 10.0]))
            assert await one.channel.request("quick") == ["answer", "quick"]
            assert not slow.done()
            slow.cancel()

    run(scenario())


def test_messages_larger_than_any_buffer_pass_each_other(run: Run) -> None:
    async def scenario() -> None:
        large = bytes(3 * MOST_UNSENT)
        async with two_ends() as ends:
            answers = await asyncio.gather(*(end.channel.request(large) for end in ends))
            assert answers == [["answer", large]] * 2

    run(scenario())


def test_a_message_may_arrive_byte_by_byte(run: Run) -> None:
    async def scenario() -> None:
        async with one_end() as (_, theirs):
            for byte in framed(Request(7, "x")):
                theirs.send(bytes([byte]))
                await asyncio.sleep(0)
            assert await received(theirs) == Response(7, ["answer", "x"])

    run(scenario())


def test_an_exception_is_raised_at_the_other_end(run: Run) -> None:
    async def scenario() -> None:
        async with two_ends() as (one, _):
            with pytest.raises(LoadError, match=r"^no model$"):
                await one.channel.request(["raise"])
            with pytest.raises(RuntimeError, match=r"^Refusals: no model$"):
                await one.channel.request(["raise an unpicklable exception"])
            with pytest.raises((AttributeError, pickle.PicklingError)):
                await one.channel.request(["return an unpicklable answer"])
            with pytest.raises((AttributeError, pickle.PicklingError)):
                await one.channel.request(lambda: None)
            assert await one.channel.request("more") == ["answer", "more"]
            assert one.channel.waiting == {}

    run(scenario())


def test_a_notification_is_handled_and_its_exception_logged_there(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with one_end() as (end, theirs):
            end.channel.notify("hello")
            assert await received(theirs) == Request(None, "hello")
            theirs.send(framed(Request(None, ["raise"])) + framed(Request(1, "x")))
            # No response to the first.
            assert await received(theirs) == Response(1, ["answer", "x"])

    with caplog.at_level(logging.ERROR):
        run(scenario())
    (record,) = caplog.records
    assert record.getMessage() == "cannot handle ['raise']"
    assert record.exc_text is not None
    assert "LoadError: no model" in record.exc_text


def test_an_answer_that_comes_too_late_is_dropped(run: Run) -> None:
    async def scenario() -> None:
        async with one_end() as (end, theirs):
            await unanswered(end.channel.request("first", 0.01), r"no answer within 0\.01 s")
            assert await received(theirs) == Request(0, "first")
            later = asyncio.create_task(end.channel.request("second"))
            assert await received(theirs) == Request(1, "second")
            for number in (0, 1, 1):
                theirs.send(framed(Response(number, ["to", number])))
            assert await later == ["to", 1]
            assert end.channel.waiting == {}
            assert end.endings == 0

    run(scenario())


def test_a_process_that_does_not_read_gets_no_more_requests_until_it_does(run: Run) -> None:
    async def scenario() -> None:
        async with one_end() as (end, theirs):
            content = bytes(MOST_UNSENT // 2)
            # The socket takes less than a message, so the third exceeds the limit.
            for _ in range(3):
                await unanswered(end.channel.request(content, 0.01), "no answer within")
            buffered = end.channel.writer.transport.get_write_buffer_size()
            assert MOST_UNSENT < buffered < 2 * MOST_UNSENT
            for _ in range(3):
                await unanswered(end.channel.request(content), "has stopped listening")
            assert end.channel.writer.transport.get_write_buffer_size() == buffered
            for number in range(3):
                assert await received(theirs) == Request(number, content)
            answer = asyncio.create_task(end.channel.request("more"))
            assert await received(theirs) == Request(3, "more")
            theirs.send(framed(Response(3, "yes")))
            assert await answer == "yes"

    run(scenario())


def test_closing_wakes_every_request_at_both_ends(run: Run) -> None:
    async def scenario() -> None:
        async with two_ends() as (one, other):
            requests = [
                asyncio.create_task(end.channel.request(["sleep", 10.0]))
                for end in (one, other)
                for _ in range(3)
            ]
            await one.channel.request("all have been sent")
            one.channel.close()
            for request in requests:
                await unanswered(request, "the process is gone")
            await other.over.wait()
            await unanswered(one.channel.request("more"), "the process is gone")
            await unanswered(other.channel.request("more"), "the process is gone")
            for _ in range(2):
                one.channel.close()
                other.channel.close()
            # It is no news to the end that closed the connection.
            assert (one.endings, other.endings) == (0, 1)

    run(scenario())


def test_closing_drops_unsent_messages(run: Run) -> None:
    async def scenario() -> None:
        async with one_end() as (end, theirs):
            await unanswered(end.channel.request(bytes(MOST_UNSENT), 0.01), "no answer within")
            end.channel.close()
            loop = asyncio.get_running_loop()
            rest = 0
            while content := await loop.sock_recv(theirs, 2**16):
                rest += len(content)
            assert 0 < rest < MOST_UNSENT

    run(scenario())


def test_a_channel_may_be_closed_while_it_opens(run: Run) -> None:
    async def scenario() -> None:
        for turns in range(4):
            async with one_end() as (end, theirs):
                request = asyncio.create_task(end.channel.request("x"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                end.channel.close()
                await unanswered(request, "the process is gone")
                # The other process sees it, too.
                while await asyncio.get_running_loop().sock_recv(theirs, 2**16):
                    pass
                assert end.endings == 0

    run(scenario())


@pytest.mark.parametrize("begun", [b"", b"\0", framed("x")[:-1]])
def test_the_end_of_a_process_is_noticed_even_within_a_message(run: Run, begun: bytes) -> None:
    async def scenario() -> None:
        async with one_end() as (end, theirs):
            request = asyncio.create_task(end.channel.request("x"))
            assert await received(theirs) == Request(0, "x")
            theirs.send(begun)
            theirs.close()
            await unanswered(request, "the process is gone")
            assert end.endings == 1

    run(scenario())


def test_the_last_messages_of_a_process_are_still_read(run: Run) -> None:
    async def scenario() -> None:
        async with one_end() as (end, theirs):
            requests = [asyncio.create_task(end.channel.request(each)) for each in "ab"]
            for number, content in enumerate("ab"):
                assert await received(theirs) == Request(number, content)
            theirs.send(framed(Response(0, 0)) + framed(Response(1, 1)))
            theirs.close()
            assert await asyncio.gather(*requests) == [0, 1]
            await end.over.wait()

    run(scenario())


def test_requests_at_the_moment_of_an_end_are_unanswered(run: Run) -> None:
    async def scenario() -> None:
        for turns in range(6):
            async with one_end() as (end, theirs):
                # Left unread, it makes the end of the other process a reset.
                first = asyncio.create_task(end.channel.request("x"))
                while not end.channel.waiting:
                    await asyncio.sleep(0)
                await asyncio.sleep(0.01)
                theirs.close()
                requests = [first]
                for _ in range(turns):
                    requests.append(asyncio.create_task(end.channel.request(bytes(2**20))))
                    await asyncio.sleep(0)
                for request in requests:
                    await unanswered(request, "the process is gone")
                assert end.endings == 1

    run(scenario())


def test_a_message_that_cannot_be_read_ends_the_connection(run: Run) -> None:
    async def scenario() -> None:
        faults = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context["exception"]))
        async with one_end() as (end, theirs):
            request = asyncio.create_task(end.channel.request("x"))
            assert await received(theirs) == Request(0, "x")
            theirs.send(LENGTH.pack(3) + b"abc")
            await unanswered(request, "the process is gone")
            assert end.endings == 1
            while await loop.sock_recv(theirs, 2**16):
                pass
        assert [type(fault) for fault in faults] == [pickle.UnpicklingError]

    run(scenario())
