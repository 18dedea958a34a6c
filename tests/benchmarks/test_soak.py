"""Twenty seconds of the mixed load, and the detection of each fault."""

import json
from pathlib import Path

import pytest

from benchmarks import soak

SECONDS, RELOAD_SECONDS, HARM_SECONDS = 20.0, 1.5, 10.0
ASKED = {"predict", "infer, binary", "uncertainty", "long", "dribbled", "read slowly"}


@pytest.mark.quiet
def test_20_seconds_of_the_mixed_load_lose_nothing_and_get_nothing_wrong(built: Path) -> None:
    kinds = [built / "models" / name / "1" for name in ("digits", "double")]
    examples = json.loads((kinds[0] / "examples.json").read_text())
    rows = [each["input"] for each in examples]
    found, errors = soak.soak(kinds, rows, SECONDS, RELOAD_SECONDS, HARM_SECONDS)
    says = soak.faults(found, errors, SECONDS)
    # Within seconds a few more of the long responses, and copies of them, are no leak.
    assert [each for each in says if not each.startswith("memory grew")] == []
    assert found.growth(SECONDS)[1] < 20
    assert found.statuses.keys() == ASKED | {"broken", "hung up", "unread"}
    assert all(found.statuses[kind][200] > 0 for kind in ASKED)
    assert found.statuses["broken"].keys() == {400, 404, 413, 422}
    assert found.statuses["unread"].total() >= 1
    # Two before the load, the others during it.
    assert found.reloads >= 8
    assert found.killed >= 2


def quiet() -> soak.Findings:
    """Return the outcome of a load without any fault."""
    found = soak.Findings()
    found.live.append(0.1)
    found.metrics.append(0.1)
    found.memory += [(second, 100.0) for second in range(20)]
    return found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"version": 3, "mean": [[0.25, 0.75]]}, []),
        ({"version": 3, "mean": [[0.2501, 0.7499]]}, ["wrong: not the numbers of version 3"]),
        ({"version": 9, "mean": [[0.25, 0.75]]}, ["wrong: unknown version 9"]),
    ],
    ids=["right", "wrong", "unknown"],
)
def test_a_response_is_compared_with_the_reference_of_the_version_it_names(
    given: soak.Json, says: list[str]
) -> None:
    found = quiet()
    expected = {"version": 1, "mean": [[0.25, 0.75]]} if given["version"] == 3 else None
    soak.check(found, "uncertainty", given, expected, "mean")
    assert [each.replace("uncertainty: ", "") for each in soak.faults(found, [], SECONDS)] == says


def test_lost_requests_logged_errors_late_probes_and_growth_are_faults() -> None:
    found = quiet()
    assert soak.faults(found, ['{"level":"warning"}'], SECONDS) == []
    found.lost.append("ask: ReadError()")
    found.live.append(0.6)
    found.metrics.append(1.6)
    found.memory[18:] = [(18, 105.5), (19, 105.5)]
    says = soak.faults(found, ['{"level":"error"}'], SECONDS)
    assert says == [
        "lost: ask: ReadError()",
        'logged: {"level":"error"}',
        "memory grew by 5.5 %",
        "the live probe took 0.60 s",
        "the metrics took 1.60 s",
    ]
