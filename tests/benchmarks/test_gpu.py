"""The GPU's benchmark, on the CPU provider: what it compares agrees; it says what is missing."""

import pytest

from app import device
from benchmarks import gpu, timing


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS_EACH", 0.01)


def test_every_way_runs_and_what_must_agree_does() -> None:
    # It compares the masks that were unpacked by the graph with those of the host itself.
    found = gpu.measure("cpu", widths=(32,), rows=(1, 3))
    assert [row["rows"] for row in found] == [1] * 8 + [3] * 8
    assert {row["off from the CPU"] for row in found} == {0.0}
    shares = [row["share of the product rate"] for row in found]
    assert all(isinstance(share, float) and share > 0 for share in shares[2:5])


def test_answers_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARITY", 0.0)
    with pytest.raises(SystemExit, match=r"^error: width 32, 1 rows: off from the CPU by 0$"):
        gpu.measure("cpu", widths=(32,), rows=(1,))


@pytest.mark.skipif(device.load_fault(device.DRIVER) is None, reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("there is nothing to measure here: device cuda: ")
