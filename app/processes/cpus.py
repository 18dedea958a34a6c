"""How many CPUs this process may use: by its affinity, and by the quota of its control groups."""

import math
import os
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def available(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> int:
    """Return the number of CPUs, whole ones, and at least 1.

    A quota that is no whole number is rounded down: a thread too many would have all of them
    wait for the quota's next period.
    """
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), quota(groups, own))))


def quota(groups: Path, own: Path) -> float:
    """Return the CPUs that the process's control group and those above it leave; inf if all."""
    least = math.inf
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = groups
        elif "cpu" in controllers.split(","):
            root = groups / controllers
        else:
            continue
        # Within a container the path may be that of the host, and not be there.
        for group in (root / path.strip("/"), *(root / path.strip("/")).parents):
            least = min(least, of_group(group))
            if group == root:
                break
    return least


def of_group(group: Path) -> float:
    """Return the CPUs that one control group leaves, of version 2 or 1."""
    try:
        if (group / "cpu.max").exists():
            share, period = (group / "cpu.max").read_text().split()
        else:
            share = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        # Version 2 writes "max" and version 1 a negative number where there is no quota.
        return float(share) / float(period) if float(share) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
