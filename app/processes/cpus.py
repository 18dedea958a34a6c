"""CPUs that this process may use, by affinity and control groups; how workers share them."""

import math
import os
from pathlib import Path
from typing import Literal

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def share(workers: int | Literal["auto"], threads: int | Literal["auto"]) -> tuple[int, int]:
    """Return the numbers of workers and of threads in each, at least 1.

    ``auto`` divides the available CPUs by the other number: among the workers, or into workers of
    that many threads. Where both are ``auto`` there is one worker of one thread for each CPU.
    """
    if workers == "auto":
        threads = 1 if threads == "auto" else threads
        return max(1, available() // threads), threads
    return workers, max(1, available() // workers) if threads == "auto" else threads


def available(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> int:
    """Return the number of CPUs that this process may use, at least 1.

    A fractional quota is rounded down: with one thread too many, all threads would wait for the
    quota's next period.
    """
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), quota(groups, own))))


def quota(groups: Path, own: Path) -> float:
    """Return the lowest CPU quota of the process's control group and its ancestors; inf if none."""
    lowest = math.inf
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return lowest
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = groups
        elif "cpu" in controllers.split(","):
            root = groups / controllers
        else:
            continue
        # In a container the path may be the host's, which does not exist here.
        for group in (root / path.strip("/"), *(root / path.strip("/")).parents):
            lowest = min(lowest, group_quota(group))
            if group == root:
                break
    return lowest


def group_quota(group: Path) -> float:
    """Return the CPU quota of one control group, of version 2 or 1; inf if it has none."""
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        # Without a quota, version 2 says "max" and version 1 a negative number.
        return float(limit) / float(period) if float(limit) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
