"""Time alternatives side by side, and name the machine they ran on."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

SECONDS_EACH = 1.0
WARM_UP_SECONDS = 0.002
FEWEST, MOST = 5, 400


def interleaved(alternatives: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each alternative, timed in turns.

    A passing disturbance of the machine then slows all of them alike. Each one runs untimed first,
    so that it does not pay for the caches as its predecessor left them.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for name, call in alternatives.items():
        times[name].append(timed(call))
    rounds = {name: rounds_of(first[0]) for name, first in times.items()}
    for turn in range(max(rounds.values())):
        for name, call in alternatives.items():
            # Slow ones sit out most turns.
            if turn % max(1, max(rounds.values()) // rounds[name]) == 0:
                times[name].append(timed(call))
    return {name: statistics.median(found) for name, found in times.items()}


def rounds_of(seconds: float) -> int:
    """Return how often to time a call of this duration."""
    return int(min(MOST, max(FEWEST, SECONDS_EACH / seconds)))


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes once it is warm."""
    warm = time.perf_counter() + WARM_UP_SECONDS
    call()
    while time.perf_counter() < warm:
        call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine() -> str:
    """Name the processor and the number of CPUs that this process may use."""
    info = Path("/proc/cpuinfo").read_text()
    name = next(line for line in info.splitlines() if line.startswith("model name"))
    return f"{name.partition(': ')[2].strip()}, {len(os.sched_getaffinity(0))} CPUs"
