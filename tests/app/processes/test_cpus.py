"""The CPUs that a process may use, by affinity and control groups, shared between workers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from dropserve.app.processes import cpus
from tests.conftest import ROOT

ALL = len(os.sched_getaffinity(0))


def groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write files like the kernel's; return the root of the groups and the process's own file."""
    root = folder / "cgroup"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    root.mkdir(exist_ok=True)
    (folder / "own").write_text(own)
    return root, folder / "own"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "300000 100000"}, 0.5),
        # Inside a container: the path is the host's, and does not exist.
        ("0::/docker/1\n", {"cpu.max": "200000 100000"}, 2.0),
        (
            "4:cpu,cpuacct:/x\n3:memory:/x\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "75000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "50000\n",
            },
            1.5,
        ),
        (
            "4:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            float("inf"),
        ),
        ("0::/\n", {"cpu.max": "nonsense"}, float("inf")),
        ("", {}, float("inf")),
    ],
)
def test_the_quota_is_the_lowest_on_the_way_to_the_root(
    tmp_path: Path, own: str, files: dict[str, str], expected: float
) -> None:
    assert cpus.quota(*groups(tmp_path, own, files)) == expected


def test_a_quota_below_one_cpu_counts_as_one(tmp_path: Path) -> None:
    assert cpus.available(*groups(tmp_path, "0::/\n", {"cpu.max": "10000 100000"})) == 1


def test_affinity_counts_rather_than_the_cpus_of_the_machine() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from dropserve.app.processes import cpus; print(cpus.available())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("workers", "threads", "expected"),
    [
        (1, 1, (1, 1)),
        (3, 5, (3, 5)),
        (1, "auto", (1, 8)),
        ("auto", 1, (8, 1)),
        ("auto", "auto", (8, 1)),
        ("auto", 3, (2, 3)),
        (3, "auto", (3, 2)),
        (100, "auto", (100, 1)),
        ("auto", 100, (1, 100)),
    ],
)
def test_auto_shares_the_cpus_between_workers(
    monkeypatch: pytest.MonkeyPatch,
    workers: int | Literal["auto"],
    threads: int | Literal["auto"],
    expected: tuple[int, int],
) -> None:
    monkeypatch.setattr(cpus, "available", lambda: 8)
    assert cpus.share(workers, threads) == expected
