"""The GPU benchmark on the CPU provider, and without a GPU."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import gpu, timing
from dropserve.app.inference import providers
from dropserve.app.inference.engine import Engine


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS_EACH", 0.01)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0)


def test_every_alternative_runs_and_agrees_with_the_cpu() -> None:
    # The benchmark itself compares the masks unpacked by the graph with the host's.
    found = gpu.measure("cpu", widths=(32,), rows=(1, 3))
    assert [row["rows"] for row in found] == [1] * 9 + [3] * 9
    assert {row["off from the CPU"] for row in found} == {0.0}
    shares = [row["share of the product rate"] for row in found]
    assert all(isinstance(share, float) and share > 0 for share in shares[2:5])


def test_outputs_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = []

    class Off(Engine):
        """The first of the two engines is off by one part in ten thousand."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            engines.append(self)

        def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
            right = super().predict(x)
            return right * np.float32(1.0001) if self is engines[0] else right

    monkeypatch.setattr(gpu, "Engine", Off)
    with pytest.raises(SystemExit, match=r"^error: width 32, 1 rows: off from the CPU by 0.0001$"):
        gpu.measure("cpu", widths=(32,), rows=(1,))


def test_without_a_gpu_it_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As on a machine without a driver, wherever this runs.
    monkeypatch.setattr(providers, "DRIVER", "libcuda-that-is-not-there.so.1")
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("there is nothing to measure here: device cuda: ")
