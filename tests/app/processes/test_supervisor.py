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
from typing import Any

import pytest

from dropserve.app.errors import LoadError
from dropserve.app.processes.ipc import MOST_UNSENT, Group, Unanswered
from dropserve.app.processes.supervisor import Keep, Start, supervise

ROOT = Path(__file__).parents[3]
PATIENCE = 20  # seconds


class TwoArguments(Exception):
    """An exception that is pickled without one of its arguments."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")


class Toy:
    """A worker that adds up numbers."""

    def __init__(self, folder: Path, door: socket.socket, start: Start) -> None:
        self.folder = folder
        self.door = door
        self.given = start.state
        self.added = 0
        self.hangups = 0
        self.stops = 0
        self.group = Group(self.handle, start.link, self.stop, lambda: self.added)

    async def handle(self, request: object) -> object:
        """Answer a request, in each worker."""
        pid = os.getpid()
        match request:
            case ["add", int(number), *refusing]:
                if pid in refusing:
                    raise LoadError(f"{pid} refuses")
                self.added += number
            case ["add after", int(number), str(name)]:
                await self.wait_for(name)
                self.added += number
            case ["hangup"]:
                self.hangups += 1
                if (self.folder / "fail").exists():
                    raise LoadError("no luck")
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
            "hangups": self.hangups,
            "given": self.given,
        }

    async def wait_for(self, name: str) -> None:
        (self.folder / f"{name} is waited for").touch()
        while not (self.folder / name).exists():
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.stops += 1

    async def run(self) -> None:
        """Serve until told to stop; with a file ``slow``, end only when told again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
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
        self.group.close()
        (self.folder / f"{own.name}.drained").write_text(str(self.stops))

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass a test's request on to the group."""
        request, change = json.loads(await reader.readline())
        try:
            if change:
                await self.group.change(request)
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


def main(folder: Path, workers: int, stop_seconds: float, answer_seconds: float) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(folder / "door"))
    door.listen()
    return supervise(
        partial(work, folder, door),
        workers,
        closing=door.close,
        on_hangup=["hangup"],
        keep=Keep(counts, sum_up),
        stop_seconds=stop_seconds,
        answer_seconds=answer_seconds,
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

    def __init__(
        self, folder: Path, workers: int, stop_seconds: float = 20, answer_seconds: float = 20
    ) -> None:
        self.folder = folder
        self.log = folder / "log"
        arguments = [str(folder), str(workers), str(stop_seconds), str(answer_seconds)]
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
            return json.loads(b"".join(iter(lambda: client.recv(2**16), b"")))

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

    def start(workers: int = 2, **options: float) -> Service:
        services.append(Service(tmp_path, workers, **options))
        return services[-1]

    try:
        yield start
    finally:
        for service in services:
            service.end()


def test_one_worker_without_a_parent_answers_alone() -> None:
    async def handle(request: object) -> object:
        return ["answer", request]

    group = Group(handle, None, lambda: None, lambda: None)
    assert asyncio.run(group.ask("request")) == ([["answer", "request"]], None, 0)
    asyncio.run(group.change("request"))


def test_no_request_waits_for_a_parent_that_is_gone() -> None:
    async def handle(request: object) -> object:
        return request

    async def scenario() -> None:
        orphaned = asyncio.Event()
        parent, link = socket.socketpair()
        group = Group(handle, link, orphaned.set, lambda: None)
        group.start()
        under_way = asyncio.create_task(group.ask("request"))
        await asyncio.sleep(0)
        parent.close()
        with pytest.raises(Unanswered, match="gone"):
            await under_way
        assert orphaned.is_set()
        with pytest.raises(Unanswered, match="gone"):
            await group.ask("request")

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_request_reaches_all_workers_and_the_own_answer_is_first(shared: Service) -> None:
    pids = shared.pids()
    for pid in pids:
        replies = shared.ask(pid, "pid")
        assert replies["answers"][0] == pid
        assert sorted(replies["answers"]) == pids
        assert (replies["gone"], replies["deaths"]) == (None, 0)


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
        second: (5, None),
        third: (5, None),
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
    assert after == {hangups + 2 for hangups in before}


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
    given = {answer["pid"]: answer["given"] for answer in service.ask(asker)["answers"]}
    assert given == {asker: None, new: 12}


def test_a_change_refused_by_the_asking_worker_reaches_no_other(shared: Service) -> None:
    asker, *_ = shared.pids()
    before = shared.added(asker)
    assert "refuses" in shared.ask(asker, "add", 7, asker, change=True)
    assert shared.added(asker) == before


def test_a_worker_that_dies_or_is_stuck_is_left_out_of_an_answer(
    serve: Callable[..., Service],
) -> None:
    service = serve(2, answer_seconds=0.5)
    asker, other = service.wait_for_workers(2)
    # A status that would end the service if no worker had ever served.
    assert [answer["pid"] for answer in service.ask(asker, "exit", other, 3)["answers"]] == [asker]
    assert (
        f"worker {other} is left out of an answer: the process is gone" in service.log.read_text()
    )
    # The parent has lost its connection, but the process may still be about to end.
    wait_for(lambda: not alive(other))
    asker, other = service.wait_for_workers(2)
    replies = service.ask(asker, "block until", other, "go")
    assert [answer["pid"] for answer in replies["answers"]] == [asker]
    assert f"worker {other} is left out of an answer: no answer within" in service.log.read_text()
    service.make("go")
    wait_for(lambda: len(service.ask(asker, "pid")["answers"]) == 2)


def test_a_worker_that_reads_nothing_holds_up_nobody(serve: Callable[..., Service]) -> None:
    service = serve(2, answer_seconds=0.2, stop_seconds=0.3)
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
    assert f"ERROR: worker {stuck} is killed" in service.log.read_text()
    assert not alive(stuck)


def test_a_worker_that_is_still_starting_answers_later(serve: Callable[..., Service]) -> None:
    service = serve(2)
    asker, other = service.wait_for_workers(2)
    hold = service.make("hold")
    os.kill(other, signal.SIGKILL)
    wait_for(lambda: len(service.starts()) == 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.ask, asker, "add", 1)
        assert not waiting.done()
        hold.unlink()
        assert [answer["added"] for answer in waiting.result()["answers"]] == [1, 1]


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


def test_control_c_in_a_terminal_stops_a_worker_once(serve: Callable[..., Service]) -> None:
    service = serve(1)
    pids = service.wait_for_workers(1)
    slow = service.make("slow")
    os.killpg(service.parent.pid, signal.SIGINT)
    service.wait_for_drain(pids)
    slow.unlink()
    assert service.parent.wait(PATIENCE) == 0
    assert service.drained() == dict.fromkeys(pids, 1)


def test_a_second_stop_is_passed_on_too(serve: Callable[..., Service]) -> None:
    service = serve(1)
    pids = service.wait_for_workers(1)
    service.make("slow")
    service.parent.terminate()
    service.wait_for_drain(pids)
    service.parent.terminate()
    assert service.parent.wait(PATIENCE) == 0
    assert service.drained() == dict.fromkeys(pids, 2)


def test_workers_that_do_not_stop_in_time_are_killed(serve: Callable[..., Service]) -> None:
    service = serve(2, stop_seconds=0.3)
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
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
