"""Work on a model that may never end: it runs in threads that nothing waits for, up to a limit.

A graph can hold an endless loop, and a file can lie on a disk that does not answer. No thread can
be ended from outside; so one that is given up is asked to end, and otherwise left alone.
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TypeVar

import onnxruntime

from dropserve.export.bundle import BundleError

# Names of the threads, and of those that were given up.
UNDER_WAY, GIVEN_UP = "load", "load given up"
# How long onnxruntime may take to notice that a run is to end.
END_SECONDS = 1.0

Result = TypeVar("Result")


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Run work in a thread of its own; unlike an executor's, it does not keep the process alive."""
    return start(work)[0]


def start(work: Callable[[], Result]) -> tuple[Future[Result], threading.Thread]:
    """Run work in a daemon thread."""
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        # Raised again wherever the result is taken.
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name=UNDER_WAY, daemon=True)
    thread.start()
    return result, thread


def within(
    seconds: float | None,
    work: Callable[[], Result],
    options: onnxruntime.RunOptions | None = None,
) -> Result:
    """Return the result of work on a model, which must be there in time.

    Parameters
    ----------
    seconds
        Time limit; None: none.
    work
        What to do.
    options
        Of its runs of graphs, which are ended by them once the work is given up.

    Raises
    ------
    BundleError
        If the time is up.
    """
    if seconds is None:
        return work()
    result, thread = start(work)
    wait_for([result], seconds)
    if not result.done():
        thread.name = GIVEN_UP
        if options:
            options.terminate = True
        wait_for([result], END_SECONDS)
        raise BundleError(f"loading took longer than {seconds:g} s")
    return result.result()


def is_stuck() -> bool:
    """Tell whether a thread that was given up still runs."""
    return any(thread.name == GIVEN_UP for thread in threading.enumerate())


def leave(status: int) -> int:
    """Return an exit status; end the process with it at once if threads here still run.

    An ordinary exit would take onnxruntime away from under them, which aborts the process.
    """
    if any(thread.name in (UNDER_WAY, GIVEN_UP) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
