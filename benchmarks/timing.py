"""Time alternatives side by side, and write what was found as a table and as JSON."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str | float | int | None]

SECONDS_EACH = 1.0
WARM_UP_SECONDS = 0.002
FEWEST, MOST = 5, 400


def interleaved(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each work, all timed in turns.

    What disturbs the machine for a while so disturbs all of them. Each is made a few times before
    it is timed, so that it does not pay for what the one before it has put into the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for name, work in works.items():
        times[name].append(timed(work))
    rounds = {name: rounds_of(first[0]) for name, first in times.items()}
    for turn in range(max(rounds.values())):
        for name, work in works.items():
            # Slow ones sit out most turns.
            if turn % max(1, max(rounds.values()) // rounds[name]) == 0:
                times[name].append(timed(work))
    return {name: statistics.median(found) for name, found in times.items()}


def rounds_of(seconds: float) -> int:
    """Return how often to time a work that takes so long."""
    return int(min(MOST, max(FEWEST, SECONDS_EACH / seconds)))


def timed(work: Callable[[], object]) -> float:
    """Return how long a work takes, in seconds, once it is warm."""
    warm = time.perf_counter() + WARM_UP_SECONDS
    work()
    while time.perf_counter() < warm:
        work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> str:
    """Name what this runs on."""
    info = Path("/proc/cpuinfo").read_text()
    name = next(line for line in info.splitlines() if line.startswith("model name"))
    return f"{name.partition(': ')[2].strip()}, {len(os.sched_getaffinity(0))} CPUs"


def report(script: str, title: str, rows: Sequence[Row]) -> None:
    """Print rows as a Markdown table, and write them as JSON beside the script."""
    Path(script).with_suffix(".json").write_text(json.dumps(list(rows), indent=2) + "\n")
    print(f"\n{title}\n")
    print("\n".join(markdown(rows)))


def markdown(rows: Sequence[Row]) -> list[str]:
    """Write rows as a Markdown table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(column)) for column in columns) + " |")
    return lines


def cell(value: str | float | int | None) -> str:
    """Write a value: three digits of a fraction, what is missing as a dash."""
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )
