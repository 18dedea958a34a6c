"""Each run writes its own figures; only ``--record`` replaces the committed ones."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import figures, reading, timing
from tests.conftest import ROOT

BENCHMARKS = sorted(
    path.stem
    for path in Path(figures.__file__).parent.glob("*.py")
    if "\ndef main() -> None:" in path.read_text()
)


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that stands in for the committed figures; the working folder is an empty one."""
    monkeypatch.setattr(timing, "SECONDS_EACH", 0.01)
    copy = tmp_path / "committed"
    shutil.copytree(figures.COMMITTED, copy)
    monkeypatch.setattr(figures, "COMMITTED", copy)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_leaves_the_committed_figures_alone(
    committed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(committed)
    monkeypatch.setattr("sys.argv", ["reading"])
    reading.main()
    assert contents(committed) == before
    measured = json.loads(Path("build/benchmarks/results/reading.json").read_text())
    assert measured != json.loads(before["reading.json"])
    assert "\n".join(figures.markdown(measured)) in capsys.readouterr().out


def test_record_replaces_the_committed_figures_of_that_benchmark(
    committed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(committed)
    monkeypatch.setattr("sys.argv", ["reading", "--record"])
    reading.main()
    after = contents(committed)
    assert {name for name in after if after[name] != before[name]} == {"reading.json"}
    assert after.keys() == before.keys()
    assert "\n".join(figures.markdown(figures.read("reading"))) in capsys.readouterr().out
    assert not Path("build").exists()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_asks_before_it_replaces_committed_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(f"benchmarks.{name}").main()
    assert f"replace the committed benchmarks/results/{name}.json" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("record", ["", "--record"])
def test_make_passes_record_to_each_benchmark_and_never_by_itself(record: str) -> None:
    goals = ["bench", "bench-peers", "soak", "overload", "uci", "first-paint"]
    plan = subprocess.run(
        ["make", "--dry-run", *goals, f"RECORD={record}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    commands = [line for line in plan.stdout.splitlines() if " -m benchmarks." in line]
    assert {line.split(" -m benchmarks.")[1].split()[0] for line in commands} == set(BENCHMARKS)
    assert {"--record" in line.split() for line in commands} == {bool(record)}
