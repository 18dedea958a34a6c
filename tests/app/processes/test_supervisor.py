"""Several workers and their parent as real processes; the workers only count.

Run as a module, this file is the parent. Tests and processes meet in the folder given as its
argument: each worker listens on a socket named by its pid, all share a socket named ``door``, and
files that a test creates tell workers what to do.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pytest

from dropserve.app.errors import LoadError
from dropserve.app.processes.group import Group
from dropserve.app.processes.ipc import MOST_UNSENT, Unanswered
from dropserve.app.processes.process import Start
from dropserve.app.processes.supervisor import Keep, Limits, supervise
from dropserve.app.server.server import STOP

ROOT = Path(__file__).parents[3]
PATIENCE = 20  # seconds


class TwoArguments(Exception):
    """An exception that is pickled without one of its arguments."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")


class Toy:
    """A worker that adds up numbers: what it has added itself, and in all, the served state."""

    def __init__(self, folder: Path, door: socket.socket, start: Start) -> None:
        self.folder = folder
        self.door = door
        self.given = start.state
        assert isinstance(start.state, int)
        self.added = 0
        self.sum = start.state
        if (folder / "start otherwise").exists():
            self.sum = -1
        self.hangups = 0
        self.stops = 0
        self.left = False
        self.group = Group(self, start.link)

    async def handle(self, request: object) -> object:
        """Answer a request, in each worker."""
        pid = os.getpid()
        match request:
            case ["add", int(number), *refusing]:
                if pid in refusing:
                    raise LoadError(f"{pid} refuses")
                self.add(number)
            case ["add and fail", int(number)]:
                self.add(number)
                raise LoadError("not all was added")
            case ["add after", int(number), str(name)]:
                await self.wait_for(name)
                self.add(number)
            case ["add or die", int(number), *dying]:
                if pid in dying:
                    os._exit(7)
                self.add(number)
            case ["hangup"]:
                self.hangups += 1
                if (self.folder / "hold hangups").exists():
                    await self.wait_for("go on")
                if (self.folder / "fail").exists():
                    raise LoadError("no luck")
            case ["replace", int(who)] if who == pid:
                self.group.replace("it was asked for")
            case ["raise what takes two arguments", int(who)] if who == pid:
                raise TwoArguments("inputs.0", "is too long")
            case ["exit", int(who), int(status)] if who == pid:
                os._exit(status)
            case ["wait for", str(name)]:
                await self.wait_for(name)
            case ["block until", int(who), str(name), *_] if who == pid:
                while not (self.folder / name).exists():
                    time.sleep(0.01)
            case ["pid"]:
                return pid
        return {
            "pid": pid,
            "added": self.added,
            "sum": self.sum,
            "hangups": self.hangups,
            "given": self.given,
        }

    async def follow(self, state: object, change: object) -> None:
        """Take over the sum of the worker that has made a change."""
        if change == ("hangup",):
            self.hangups += 1
        assert isinstance(state, int)
        if not (self.folder / f"{os.getpid()} does not follow").exists():
            self.add(state - self.sum)

    def add(self, number: int) -> None:
        self.added += number
        self.sum += number

    def state(self) -> int:
        return self.sum

    async def wait_for(self, name: str) -> None:
        (self.folder / f"{name} is waited for").touch()
        while not (self.folder / name).exists():
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.stops += 1

    def leave(self) -> None:
        self.left = True
        self.stop()

    async def run(self) -> None:
        """Serve until told to stop; with a file ``slow``, end only when told again."""
        loop = asyncio.get_running_loop()
        for number in (STOP, signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self.group.start()
        own = self.folder / str(os.getpid())
        servers = [
            await asyncio.start_unix_server(self.talk, own.with_suffix(".new"), limit=2**24),
            await asyncio.start_unix_server(self.talk, sock=self.door),
        ]
        # Tests can connect only from now on.
        own.with_suffix(".new").rename(own)
        while not self.stops:
            await asyncio.sleep(0.01)
        for server in servers:
            server.close()
        own.rename(self.folder / f"{own.name}.drains")
        while (self.folder / "slow").exists() and self.stops == 1:
            await asyncio.sleep(0.01)
        # More than any other process knows of.
        self.added += 1000 * self.left
        await self.group.close({"added": self.added} if self.left else None)
        (self.folder / f"{own.name}.drained").write_text(str(self.stops))

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass a test's request on to the group."""
        request, change = json.loads(await reader.readline())
        try:
            if change:
                await self.group.change(tuple(request))
                answer: object = None
            else:
                answer = (await self.group.ask(request))._asdict()
        except Exception as error:
            answer = repr(error)
        writer.write(json.dumps(answer).encode())
        writer.close()


def work(folder: Path, door: socket.socket, start: Start) -> None:
    with (folder / "starts").open("a") as file:
        file.write(f"{time.monotonic()}\n")
    while (folder / "hold").exists():
        time.sleep(0.01)
    if (folder / "refuse").exists():
        sys.exit(3)
    if (folder / "crash").exists():
        os._exit(5)
    asyncio.run(Toy(folder, door, start).run())


def counts(answer: object) -> bool:
    return isinstance(answer, dict)


def sum_up(gone: Any, answer: Any) -> Any:
    return (gone or 0) + answer["added"]


class Times(TypedDict, total=False):
    """Limits of a service, in seconds."""

    stop: float
    stuck: float
    start: float
    answer: float


def main(folder: Path, workers: int, times: Times) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(folder / "door"))
    door.listen()
    return supervise(
        partial(work, folder, door),
        workers,
        state=0,
        closing=door.close,
        on_hangup=("hangup",),
        keep=Keep(counts, sum_up),
        limits=Limits(
            start=lambda _: times.get("start", PATIENCE),
            stuck=times.get("stuck", PATIENCE),
            stop=times.get("stop", PATIENCE),
            answer=times.get("answer", PATIENCE),
        ),
    )


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Service:
    """A parent process and its workers."""

    def __init__(self, folder: Path, workers: int, **times: Unpack[Times]) -> None:
        self.folder = folder
        self.log = folder / "log"
        arguments = [str(folder), str(workers), json.dumps(times)]
        with self.log.open("w") as log:
            self.parent = subprocess.Popen(
                [sys.executable, "-m", __name__, *arguments],
                cwd=ROOT,
                stderr=log,
                # A process group of its own, like a command in a terminal.
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """Return the pids of the workers that tests can connect to."""
        names = (entry.name for entry in self.folder.iterdir())
        return sorted(int(name) for name in names if name.isdigit() and alive(int(name)))

    def wait_for_workers(self, count: int) -> list[int]:
        wait_for(lambda: len(self.pids()) == count)
        return self.pids()

    def replace(self, pid: int) -> int:
        """Kill a worker; return the pid of its replacement."""
        before = self.pids()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(set(self.pids()) - set(before)) == 1)
        (new,) = set(self.pids()) - set(before)
        return new

    def ask(self, pid: int, *request: object, change: bool = False) -> Any:
        """Have a worker ask or change all; return its replies, or its exception as text."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(self.folder / str(pid)))
            client.sendall(json.dumps([request, change]).encode() + b"\n")
            answer = b"".join(iter(lambda: client.recv(2**16), b""))
        return json.loads(answer) if answer else "the worker has died"

    def added(self, pid: int) -> dict[int, int]:
        """Return the sum of each worker by pid, as one of them gathers them."""
        return {answer["pid"]: answer["added"] for answer in self.ask(pid)["answers"]}

    def starts(self) -> list[float]:
        return [float(line) for line in (self.folder / "starts").read_text().split()]

    def make(self, name: str) -> Path:
        path = self.folder / name
        path.touch()
        return path

    def wait_for_drain(self, pids: list[int]) -> None:
        wait_for(lambda: all((self.folder / f"{pid}.drains").exists() for pid in pids))

    def drained(self) -> dict[int, int]:
        """Return, for each worker that ended gracefully, how often it was told to stop."""
        paths = self.folder.glob("*.drained")
        return {int(path.stem): int(path.read_text()) for path in paths}

    def end(self) -> None:
        """Kill all processes that are left."""
        pids = [*self.pids(), *(int(path.stem) for path in self.folder.glob("*.drains"))]
        if self.parent.poll() is None:
            self.parent.kill()
        self.parent.wait(PATIENCE)
        for pid in filter(alive, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        print(self.log.read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Three workers that no test may end."""
    service = Service(tmp_path_factory.mktemp("shared"), 3)
    try:
        service.wait_for_workers(3)
        yield service
    finally:
        service.end()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services that end with the test."""
    services = []

    def start(workers: int = 2, **times: Unpack[Times]) -> Service:
        services.append(Service(tmp_path, workers, **times))
        return services[-1]

    try:
        yield start
    finally:
        for service in services:
            service.end()


class Echo:
    """A process that repeats requests."""

    stops = 0

    async def handle(self, content: object) -> object:
        return ["answer", content]

    async def follow(self, state: object, change: object) -> None:
        pass

    def state(self) -> object:
        return None

    def stop(self) -> None:
        self.stops += 1

    def leave(self) -> None:
        pass


def test_one_worker_without_a_parent_answers_alone() -> None:
    async def scenario() -> None:
        group = Group(Echo(), None)
        assert await group.ask("request") == ([["answer", "request"]], [], None, 0, 0)
        await group.change("request")
        assert await group.pending() == []

    asyncio.run(scenario())


def test_no_request_waits_for_a_parent_that_is_gone() -> None:
    async def scenario() -> None:
        member = Echo()
        parent, link = socket.socketpair()
        group = Group(member, link)
        group.start()
        under_way = asyncio.create_task(group.ask("request"))
        await asyncio.sleep(0)
        parent.close()
        with pytest.raises(Unanswered, match="gone"):
            await under_way
        assert member.stops == 1
        with pytest.raises(Unanswered, match="gone"):
            await group.ask("request")

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_request_reaches_all_workers_and_the_own_answer_is_first(shared: Service) -> None:
    pids = shared.pids()
    for pid in pids:
        replies = shared.ask(pid, "pid")
        assert replies["answers"][0] == pid
        assert sorted(replies["answers"]) == pids
        assert (replies["gone"], replies["deaths"], replies["silences"]) == (None, 0, 0)


def test_an_exception_of_the_asking_worker_is_raised_and_no_other_is_asked(shared: Service) -> None:
    asker, *_ = shared.pids()
    before = shared.added(asker)
    assert shared.ask(asker, "add", 1, asker) == f"LoadError('{asker} refuses')"
    assert shared.added(asker) == before


def test_an_exception_of_another_worker_is_raised_once_all_were_asked(shared: Service) -> None:
    asker, other, third = shared.pids()
    before = shared.added(asker)
    assert shared.ask(asker, "add", 1, other) == f"LoadError('{other} refuses')"
    after = shared.added(asker)
    assert {pid: after[pid] - before[pid] for pid in after} == {asker: 1, other: 0, third: 1}


def test_an_exception_that_cannot_be_sent_is_raised_by_its_message(shared: Service) -> None:
    asker, other, _ = shared.pids()
    raised = shared.ask(asker, "raise what takes two arguments", other)
    assert raised == "RuntimeError('TwoArguments: inputs.0: is too long')"


def test_several_requests_are_under_way_at_once(shared: Service) -> None:
    pids = shared.pids()
    with ThreadPoolExecutor(len(pids)) as pool:
        waiting = [pool.submit(shared.ask, pid, "wait for", "go") for pid in pids]
        for pid in pids:
            assert sorted(shared.ask(pid, "pid")["answers"]) == pids
        assert not any(each.done() for each in waiting)
        shared.make("go")
        for each in waiting:
            assert sorted(answer["pid"] for answer in each.result()["answers"]) == pids


def test_large_requests_and_answers_arrive_whole(shared: Service) -> None:
    asker, *_ = shared.pids()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(shared.ask, asker, "x" * 2**19) for _ in range(4)]
        assert [len(each.result()["answers"]) for each in asked] == [3] * 4


def test_a_hangup_reaches_each_worker_once_even_from_a_terminal(shared: Service) -> None:
    asker, *_ = shared.pids()
    os.killpg(shared.parent.pid, signal.SIGHUP)
    wait_for(lambda: all(answer["hangups"] for answer in shared.ask(asker)["answers"]))
    assert [answer["hangups"] for answer in shared.ask(asker)["answers"]] == [1, 1, 1]


def test_a_failure_after_a_hangup_is_logged(shared: Service) -> None:
    fail = shared.make("fail")
    shared.parent.send_signal(signal.SIGHUP)
    wait_for(lambda: "the reload after SIGHUP failed: no luck" in shared.log.read_text())
    fail.unlink()


def test_a_worker_that_dies_is_replaced_and_its_counts_are_kept(
    serve: Callable[..., Service],
) -> None:
    service = serve(3)
    first, second, third = service.wait_for_workers(3)
    service.ask(first, "add", 5, change=True)
    service.ask(second, "hangup")
    # An answer that is not kept does not replace the one before.
    service.ask(second, "pid")
    new = service.replace(first)
    replies = service.ask(second)
    assert (replies["gone"], replies["deaths"]) == (5, 1)
    assert {answer["pid"]: (answer["added"], answer["given"]) for answer in replies["answers"]} == {
        second: (5, 0),
        third: (5, 0),
        new: (0, 5),
    }
    service.ask(new, "add", 1)
    service.replace(third)
    replies = service.ask(new)
    assert (replies["gone"], replies["deaths"]) == (11, 2)
    assert f"ERROR: worker {first} has ended with signal 9 (Killed)" in service.log.read_text()


def test_changes_are_made_one_after_the_other(shared: Service) -> None:
    pids = shared.pids()
    with ThreadPoolExecutor(len(pids)) as pool:
        first = pool.submit(shared.ask, pids[0], "wait for", "change", change=True)
        wait_for((shared.folder / "change is waited for").exists)
        before = {answer["hangups"] for answer in shared.ask(pids[0], "look")["answers"]}
        later = [pool.submit(shared.ask, pid, "hangup", change=True) for pid in pids[1:]]
        # Other requests do not wait for a change; by then the parent knows of the later changes.
        for pid in pids:
            answers = shared.ask(pid, "look")["answers"]
            assert {answer["hangups"] for answer in answers} == before
        shared.make("change")
        for each in (first, *later):
            each.result()
    after = {answer["hangups"] for answer in shared.ask(pids[0], "look")["answers"]}
    # The later ones are equal, and made at once.
    assert after == {hangups + 1 for hangups in before}


def test_the_replacement_of_a_worker_that_died_during_a_change_serves_the_new_state(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    service.ask(asker, "add", 5, change=True)
    with ThreadPoolExecutor(1) as pool:
        change = pool.submit(service.ask, asker, "add after", 7, "go", change=True)
        wait_for((service.folder / "go is waited for").exists)
        os.kill(other, signal.SIGKILL)
        wait_for(lambda: f"worker {other} has ended" in service.log.read_text())
        service.make("go")
        change.result()
    _, new = sorted(service.wait_for_workers(2), key=lambda pid: pid != asker)

    def sums() -> dict[int, int]:
        return {answer["pid"]: answer["sum"] for answer in service.ask(asker)["answers"]}

    # It may have begun with the state before, and followed since.
    wait_for(lambda: sums() == {asker: 12, new: 12})


def test_a_change_refused_by_the_asking_worker_reaches_no_other(shared: Service) -> None:
    asker, *_ = shared.pids()
    before = shared.added(asker)
    assert "refuses" in shared.ask(asker, "add", 7, asker, change=True)
    assert shared.added(asker) == before


def test_a_change_that_the_asking_worker_makes_in_part_is_made_so_by_all(shared: Service) -> None:
    asker, *others = shared.pids()
    before = shared.added(asker)
    said = shared.ask(asker, "add and fail", 7, change=True)
    assert said == "LoadError('not all was added')"
    assert shared.added(asker) == {pid: added + 7 for pid, added in before.items()}
    # A worker that refuses what another has made follows all the same.
    shared.ask(asker, "add", 1, others[0], change=True)
    assert shared.added(asker) == {pid: added + 8 for pid, added in before.items()}


def test_a_worker_that_does_not_follow_is_replaced_once_its_requests_are_answered(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    slow = service.make("slow")
    service.make(f"{other} does not follow")
    service.ask(asker, "add", 5, change=True)
    # Its replacement starts while it drains.
    wait_for(lambda: len(service.pids()) == 2 and other not in service.pids())
    assert alive(other)
    answers = {answer["pid"]: answer for answer in service.ask(asker)["answers"]}
    assert {answers[pid]["sum"] for pid in service.pids()} == {5}
    slow.unlink()
    wait_for(lambda: not alive(other))
    replies = service.ask(asker)
    # Its last answer came at its very end.
    assert (replies["gone"], replies["deaths"]) == (1000, 0)
    assert f"worker {other} is replaced: it serves 0 in place of 5" in service.log.read_text()


def test_a_worker_may_ask_to_be_replaced(serve: Callable[..., Service]) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    service.ask(asker, "replace", other)
    wait_for(lambda: not alive(other))
    service.wait_for_workers(2)
    assert service.drained() == {other: 1}
    assert service.ask(asker)["deaths"] == 0
    assert f"worker {other} is replaced: it was asked for" in service.log.read_text()


def test_a_stop_does_not_cut_off_a_worker_that_is_being_replaced(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    slow = service.make("slow")
    service.ask(asker, "replace", other)
    service.wait_for_drain([other])
    service.wait_for_workers(2)
    service.parent.terminate()
    service.wait_for_drain([asker])
    slow.unlink()
    assert service.parent.wait(PATIENCE) == 0
    assert set(service.drained().values()) == {1}


def test_a_change_is_made_by_another_worker_if_the_first_dies_within(
    serve: Callable[..., Service],
) -> None:
    service = serve(3)
    asker, second, third = service.wait_for_workers(3)
    # A worker that follows does not try it anew.
    assert service.ask(second, "add or die", 5, asker, change=True) is None
    assert service.added(second) == {asker: 5, second: 5, third: 5}
    assert service.ask(asker, "add or die", 1, asker, change=True) == "the worker has died"
    wait_for(lambda: not alive(asker))
    wait_for(lambda: service.added(second).get(third) == 6)
    new = set(service.wait_for_workers(3)) - {second, third}
    wait_for(lambda: {a["pid"] for a in service.ask(second)["answers"]} == {second, third, *new})
    assert {answer["sum"] for answer in service.ask(second)["answers"]} == {6}


def test_a_change_that_kills_workers_kills_two_at_most(serve: Callable[..., Service]) -> None:
    service = serve(3)
    pids = service.wait_for_workers(3)
    died = service.ask(pids[0], "add or die", 1, *pids, change=True)
    assert died == "the worker has died"
    wait_for(lambda: sum(map(alive, pids)) == 1)
    service.wait_for_workers(3)
    (left,) = filter(alive, pids)
    assert service.ask(left)["deaths"] == 2
    service.ask(left, "add", 2, change=True)
    assert {answer["sum"] for answer in service.ask(left)["answers"]} == {2}


def test_a_worker_that_starts_otherwise_than_decided_is_logged_and_decides_nothing(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    otherwise = service.make("start otherwise")
    new = service.replace(other)
    wait_for(lambda: f"worker {new} serves other models" in service.log.read_text())
    time.sleep(0.5)
    assert service.pids() == sorted([asker, new])
    otherwise.unlink()
    service.ask(new, "add", 5, change=True)
    assert {answer["sum"] for answer in service.ask(asker)["answers"]} == {5}


def test_thousands_of_hangups_during_a_reload_lead_to_one_more(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, _ = service.wait_for_workers(2)
    service.make("hold hangups")
    service.parent.send_signal(signal.SIGHUP)
    wait_for((service.folder / "go on is waited for").exists)
    for _ in range(2000):
        service.parent.send_signal(signal.SIGHUP)
        # Else the kernel would make one of several.
        time.sleep(0.0005)
    time.sleep(0.2)
    service.make("go on")
    # A change waits for those before it.
    service.ask(asker, "add", 1, change=True)
    assert [answer["hangups"] for answer in service.ask(asker)["answers"]] == [2, 2]


def test_equal_changes_that_wait_are_made_once(serve: Callable[..., Service]) -> None:
    service = serve(2)
    pids = service.wait_for_workers(2)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(service.ask, pids[0], "add after", 1, "go", change=True)
        wait_for((service.folder / "go is waited for").exists)
        later = [pool.submit(service.ask, pids[n % 2], "add", 10, change=True) for n in range(8)]
        time.sleep(0.5)
        service.make("go")
        assert [each.result() for each in (first, *later)] == [None] * 9
    assert service.added(pids[0]) == dict.fromkeys(pids, 11)


def test_a_worker_that_is_stuck_is_left_out_but_its_last_counts_are_not(
    serve: Callable[..., Service],
) -> None:
    service = serve(2, answer=0.2)
    asker, other = service.wait_for_workers(2)
    service.ask(asker, "add", 5)
    os.kill(other, signal.SIGSTOP)
    for silences in (1, 2):
        replies = service.ask(asker, "add", 1)
        assert [answer["pid"] for answer in replies["answers"]] == [asker]
        assert [(answer["pid"], answer["added"]) for answer in replies["last"]] == [(other, 5)]
        assert (replies["gone"], replies["deaths"], replies["silences"]) == (None, 0, silences)
    assert f"worker {other} is left out of an answer: no answer within" in service.log.read_text()
    os.kill(other, signal.SIGCONT)
    # It has yet to handle the two requests that it has left unanswered.
    wait_for(lambda: service.added(asker) == {asker: 7, other: 7})
    assert service.ask(asker)["last"] == []


def test_a_worker_that_dies_during_a_request_is_left_out_of_the_answer(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    # A status that would end the service if no worker had ever served.
    replies = service.ask(asker, "exit", other, 3)
    assert [answer["pid"] for answer in replies["answers"]] == [asker]
    assert replies["silences"] == 0


def test_a_worker_that_reads_nothing_holds_up_nobody(serve: Callable[..., Service]) -> None:
    service = serve(2, answer=0.2, stop=0.3)
    asker, stuck = service.wait_for_workers(2)
    service.ask(asker, "block until", stuck, "never")
    # Each is more than a socket takes, and together they exceed the limit of unsent bytes.
    for _ in range(4):
        service.ask(asker, "x" * (MOST_UNSENT // 2))
    log = service.log.read_text()
    assert f"worker {stuck} is left out of an answer: the process has stopped listening" in log
    service.replace(asker)
    service.parent.terminate()
    assert service.parent.wait(PATIENCE) == 0
    assert f"ERROR: worker {stuck} is killed: it does not stop" in service.log.read_text()
    assert not alive(stuck)


def test_a_worker_that_is_still_starting_is_not_waited_for_and_follows_later(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    hold = service.make("hold")
    os.kill(other, signal.SIGKILL)
    wait_for(lambda: len(service.starts()) == 3)
    assert [answer["pid"] for answer in service.ask(asker)["answers"]] == [asker]
    service.ask(asker, "add", 5, change=True)
    hold.unlink()
    service.wait_for_workers(2)
    wait_for(lambda: [answer["sum"] for answer in service.ask(asker)["answers"]] == [5, 5])
    assert "is replaced:" not in service.log.read_text()


@pytest.mark.parametrize("blocks", ["stopped", "busy", "deaf"])
def test_a_worker_that_does_not_answer_for_some_time_is_killed_and_replaced(
    serve: Callable[..., Service], blocks: str
) -> None:
    service = serve(2, answer=0.1, stuck=0.5)
    asker, stuck = service.wait_for_workers(2)
    if blocks == "stopped":
        os.kill(stuck, signal.SIGSTOP)
    else:
        service.ask(asker, "block until", stuck, "never")
    if blocks == "deaf":
        for _ in range(4):
            service.ask(asker, "x" * (MOST_UNSENT // 2))
    wait_for(lambda: not alive(stuck))
    (new,) = set(service.wait_for_workers(2)) - {asker}
    assert service.ask(asker)["deaths"] == 1
    log = service.log.read_text()
    assert f"worker {stuck} is killed: it has not answered for 0.5 s" in log
    assert f"worker {stuck} has ended with signal 9 (Killed), and is replaced" in log
    # The others are left alone.
    time.sleep(1.5)
    assert service.pids() == sorted([asker, new])


def test_workers_are_not_killed_because_all_processes_were_suspended(
    serve: Callable[..., Service],
) -> None:
    service = serve(2, stuck=2)
    pids = service.wait_for_workers(2)
    os.kill(pids[0], signal.SIGSTOP)
    # By now the parent, which asks every second, waits for an answer.
    time.sleep(1.1)
    service.parent.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    service.parent.send_signal(signal.SIGCONT)
    time.sleep(0.2)
    os.kill(pids[0], signal.SIGCONT)
    time.sleep(1.5)
    assert service.pids() == pids
    assert service.ask(pids[0])["deaths"] == 0


def test_a_worker_that_does_not_start_in_time_is_killed_and_replaced(
    serve: Callable[..., Service],
) -> None:
    service = serve(2, start=3)
    _, other = service.wait_for_workers(2)
    hold = service.make("hold")
    os.kill(other, signal.SIGKILL)
    wait_for(lambda: "is killed: it has not started within 3 s" in service.log.read_text())
    hold.unlink()
    service.wait_for_workers(2)


def test_a_stop_is_passed_on_and_all_workers_are_waited_for(serve: Callable[..., Service]) -> None:
    service = serve(2)
    pids = service.wait_for_workers(2)
    slow = service.make("slow")
    service.parent.terminate()
    service.wait_for_drain(pids)
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        # No process holds the listening socket any more.
        client.connect(str(service.folder / "door"))
    assert service.parent.poll() is None
    slow.unlink()
    assert service.parent.wait(PATIENCE) == 0
    assert service.drained() == dict.fromkeys(pids, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_stops_a_worker_once(
    serve: Callable[..., Service], number: signal.Signals
) -> None:
    service = serve(2)
    pids = service.wait_for_workers(2)
    slow = service.make("slow")
    os.killpg(service.parent.pid, number)
    service.wait_for_drain(pids)
    # As `timeout` does; an echo of the first.
    service.parent.send_signal(number)
    os.killpg(service.parent.pid, number)
    time.sleep(0.2)
    slow.unlink()
    assert service.parent.wait(PATIENCE) == 0
    assert service.drained() == dict.fromkeys(pids, 1)


def test_a_worker_leaves_sigterm_and_sigint_to_its_parent(serve: Callable[..., Service]) -> None:
    service = serve(2)
    pids = service.wait_for_workers(2)
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    time.sleep(0.3)
    assert service.pids() == pids
    assert service.drained() == {}


def test_workers_that_are_still_starting_end_with_their_parent(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    service.make("hold")
    os.kill(other, signal.SIGKILL)
    wait_for(lambda: len(service.starts()) == 3)
    os.killpg(service.parent.pid, signal.SIGTERM)
    assert service.parent.wait(PATIENCE) == 0
    assert service.drained() == {asker: 1}


def test_a_second_stop_a_second_later_is_passed_on_too(serve: Callable[..., Service]) -> None:
    service = serve(1)
    pids = service.wait_for_workers(1)
    service.make("slow")
    service.parent.terminate()
    service.wait_for_drain(pids)
    time.sleep(1.1)
    service.parent.terminate()
    assert service.parent.wait(PATIENCE) == 0
    assert service.drained() == dict.fromkeys(pids, 2)


def test_workers_that_do_not_stop_in_time_are_killed(serve: Callable[..., Service]) -> None:
    service = serve(2, stop=0.3)
    pids = service.wait_for_workers(2)
    service.make("slow")
    service.parent.terminate()
    assert service.parent.wait(PATIENCE) == 0
    assert service.drained() == {}
    assert not any(map(alive, pids))
    assert [f"ERROR: worker {pid} is killed" in service.log.read_text() for pid in pids] == [
        True
    ] * 2


def test_workers_end_when_their_parent_is_killed(serve: Callable[..., Service]) -> None:
    service = serve(2)
    pids = service.wait_for_workers(2)
    service.parent.kill()
    wait_for(lambda: not any(map(alive, pids)))
    assert service.drained() == dict.fromkeys(pids, 1)


def test_workers_that_cannot_start_end_all(serve: Callable[..., Service], tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    service = serve(2)
    assert service.parent.wait(PATIENCE) == 1


def test_a_worker_that_cannot_start_in_place_of_another_does_not_end_the_others(
    serve: Callable[..., Service],
) -> None:
    service = serve(2)
    first, second = service.wait_for_workers(2)
    refuse = service.make("refuse")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(service.starts()) >= 4)
    refuse.unlink()
    service.wait_for_workers(2)
    assert service.ask(second)["deaths"] == len(service.starts()) - 2


def test_workers_that_die_quickly_are_replaced_once_a_second(serve: Callable[..., Service]) -> None:
    service = serve(2)
    first, second = service.wait_for_workers(2)
    crash = service.make("crash")
    before = time.monotonic()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(service.starts()) >= 6)
    crash.unlink()
    # Two at once, then one a second.
    assert service.starts()[5] - before > 2
    service.wait_for_workers(2)
    assert service.ask(second)["deaths"] == len(service.starts()) - 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])))
