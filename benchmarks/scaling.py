"""How do time and memory of uncertainty queries grow with passes, rows and width? ``make scaling``.

In process, on one thread, from rows to statistics, for the default network on digits. A line is
fitted to the times by passes and to those by rows, relative errors weighted alike. Memory is the
peak of a process of its own that answers one query, the least and the most of three such; 0 passes:
one that only loads the model.
"""

import argparse
import os

# Before numpy is loaded, which reads it then.
os.environ["OMP_NUM_THREADS"] = "1"

import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from benchmarks import network, timing
from benchmarks.blocking import BlockingService
from dropserve.app.inference.query import Query
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.service import Service

PASSES = (1, 10, 100, 1000, 10_000)
ROWS = (1, 4, 16, 64, 256)
WIDTHS = (64, 256, 1024)
DEFAULT_PASSES, DEFAULT_WIDTH = 100, 256
MEMORY_ROWS = 64
# How the C library lays out memory differs from process to process.
MEMORY_PROCESSES = 3
# 4000 is close to the most passes that one run takes.
MEMORY_PASSES = (0, 10, 100, 1000, 4000, 10_000)
MOST_ROW_PASSES = 10**6

Work = Callable[[], object]


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--peak", type=int, metavar="PASSES", help=argparse.SUPPRESS)
    passes = command.parse_args().peak
    if passes is None:
        compare()
    else:
        print(peak(passes))


def compare() -> None:
    """Measure everything, and report it."""
    for width in WIDTHS:
        network.models(width)
    # First, while this process is small: Linux counts the memory of the process that starts
    # another into the other's ru_maxrss.
    memory = [memory_row(passes) for passes in MEMORY_PASSES]
    service = load(DEFAULT_WIDTH)
    by_passes = timing.interleaved({str(t): work(service, 1, t) for t in PASSES})
    by_rows = timing.interleaved({str(b): work(service, b, DEFAULT_PASSES) for b in ROWS})
    by_width = timing.interleaved({str(w): work(load(w), 1, DEFAULT_PASSES) for w in WIDTHS})
    found = [
        *axis(f"passes of 1 row, width {DEFAULT_WIDTH}", by_passes),
        line("passes: line", by_passes),
        *axis(f"rows x {DEFAULT_PASSES} passes, width {DEFAULT_WIDTH}", by_rows),
        line("rows: line", by_rows),
        *axis(f"width, 1 row x {DEFAULT_PASSES} passes", by_width),
        *memory,
    ]
    timing.report(__file__, f"Uncertainty queries, one thread ({timing.machine()})", found)


def load(width: int) -> BlockingService:
    """Load the network of some width."""
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
    """Return a query of held-out rows."""
    with np.load(network.run(DEFAULT_WIDTH) / "holdout.npz") as holdout:
        inputs = holdout["x"][:rows].tolist()
    query = Query(inputs, "digits", 1, passes, seed=7, interval=0.9)
    return partial(service.uncertainty, query)


def axis(name: str, seconds: Mapping[str, float]) -> list[timing.Row]:
    """Return a row for each value of what was varied."""
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


def line(name: str, seconds: Mapping[str, float]) -> timing.Row:
    """Return the line through the times, and how far the furthest of them is from it."""
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


def memory_row(passes: int) -> timing.Row:
    """Measure the peak memory of a query in processes of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--peak", str(passes)]
    peaks = [
        float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(MEMORY_PROCESSES)
    ]
    name = f"memory: passes of {MEMORY_ROWS} rows"
    return {"axis": name, "value": passes, "least peak MB": min(peaks), "most peak MB": max(peaks)}


def peak(passes: int) -> float:
    """Answer one query, none if of 0 passes; return the most memory this process had, in MB."""
    service = load(DEFAULT_WIDTH)
    if passes:
        work(service, MEMORY_ROWS, passes)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
