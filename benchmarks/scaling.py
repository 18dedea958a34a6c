"""How do time and memory of uncertainty queries grow with passes, rows and width? ``make scaling``.

The table gives the time from rows to statistics, in process and on one thread, for the default
network on digits. A line is fitted to the times by passes, and one to the times by rows, by least
squares of the relative errors. Memory is the peak of a separate process that runs one query, as the
least and the most of three such processes; with 0 passes the process only loads the model.
"""

import argparse
import os

# numpy reads it when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from benchmarks import figures, network, timing
from benchmarks.blocking import BlockingService
from dropserve.app.inference.query import Query
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.service import Service

PASSES = (1, 10, 100, 1000, 10_000)
ROWS = (1, 4, 16, 64, 256)
WIDTHS = (64, 256, 1024)
DEFAULT_PASSES, DEFAULT_WIDTH = 100, 256
MEMORY_ROWS = 64
# The C library's layout of memory differs from process to process.
MEMORY_PROCESSES = 3
# 4000 is close to the limit of a single run.
MEMORY_PASSES = (0, 10, 100, 1000, 4000, 10_000)
MOST_ROW_PASSES = 10**6

Work = Callable[[], object]


def main() -> None:
    command = figures.parser(__file__, __doc__)
    command.add_argument("--peak", type=int, metavar="PASSES", help=argparse.SUPPRESS)
    args = command.parse_args()
    if args.peak is None:
        title = f"Uncertainty queries, one thread ({timing.machine()})"
        figures.report(args.result, title, compare())
    else:
        print(peak(args.peak))


def compare() -> list[figures.Row]:
    """Return the rows of the table."""
    for width in WIDTHS:
        network.models(width)
    # First, while this process is small: on Linux a child's ru_maxrss includes the memory of the
    # parent at the time of the fork.
    memory = [memory_row(passes) for passes in MEMORY_PASSES]
    service = load(DEFAULT_WIDTH)
    by_passes = timing.interleaved({str(t): work(service, 1, t) for t in PASSES})
    by_rows = timing.interleaved({str(b): work(service, b, DEFAULT_PASSES) for b in ROWS})
    by_width = timing.interleaved({str(w): work(load(w), 1, DEFAULT_PASSES) for w in WIDTHS})
    return [
        *axis(f"passes of 1 row, width {DEFAULT_WIDTH}", by_passes),
        line("passes: line", by_passes),
        *axis(f"rows x {DEFAULT_PASSES} passes, width {DEFAULT_WIDTH}", by_rows),
        line("rows: line", by_rows),
        *axis(f"width, 1 row x {DEFAULT_PASSES} passes", by_width),
        *memory,
    ]


def load(width: int) -> BlockingService:
    """Load the network of this width."""
    return BlockingService(
        Service(
            load_engines(network.models(width), "cpu"),
            max_rows=max(ROWS),
            max_passes=max(PASSES),
            max_row_passes=MOST_ROW_PASSES,
            queue_rows=MOST_ROW_PASSES,
        )
    )


def work(service: BlockingService, rows: int, passes: int) -> Work:
    """Return an uncertainty query of held-out rows."""
    with np.load(network.run(DEFAULT_WIDTH) / "holdout.npz") as holdout:
        inputs = holdout["x"][:rows].tolist()
    query = Query(inputs, "digits", 1, passes, seed=7, interval=0.9)
    return partial(service.uncertainty, query)


def axis(name: str, seconds: Mapping[str, float]) -> list[figures.Row]:
    """Return a row for each value of the parameter that was varied."""
    first = next(iter(seconds.values()))
    return [
        {
            "axis": name,
            "value": int(value),
            "ms": 1000 * found,
            "ms per unit": 1000 * found / int(value),
            "x the first": found / first,
        }
        for value, found in seconds.items()
    ]


def line(name: str, seconds: Mapping[str, float]) -> figures.Row:
    """Return the line fitted to the times, and the largest relative error of it."""
    values = np.array([int(value) for value in seconds])
    times = np.array(list(seconds.values()))
    slope, intercept = np.polyfit(values, times, 1, w=1 / times)
    off = np.abs(intercept + slope * values - times) / times
    return {
        "axis": name,
        "intercept ms": 1000 * float(intercept),
        "slope ms": 1000 * float(slope),
        "off by at most %": 100 * float(off.max()),
    }


def memory_row(passes: int) -> figures.Row:
    """Measure the peak memory of a query, in separate processes."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--peak", str(passes)]
    peaks = [
        float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(MEMORY_PROCESSES)
    ]
    name = f"memory: passes of {MEMORY_ROWS} rows"
    return {"axis": name, "value": passes, "least peak MB": min(peaks), "most peak MB": max(peaks)}


def peak(passes: int) -> float:
    """Run one query, or none for 0 passes; return this process's peak memory in MB."""
    service = load(DEFAULT_WIDTH)
    if passes:
        work(service, MEMORY_ROWS, passes)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
