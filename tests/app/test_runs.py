"""Runs: the pieces they are made in change no answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import runs
from app.engine import Engine
from app.masks import MaskStream
from app.runs import Draw
from app.service import as_they_are, load_engines


@pytest.fixture(scope="module")
def engine(built: Path) -> Engine:
    return load_engines(built / "models", "cpu")["digits"][1]


@pytest.mark.parametrize("row_passes", [1, 3, 10, 1000])
def test_a_run_of_many_draws_in_pieces_is_what_each_draw_is_alone(
    engine: Engine, examples: Any, monkeypatch: pytest.MonkeyPatch, row_passes: int
) -> None:
    rows = examples("digits")
    draws = [
        Draw(rows[:count], MaskStream(seed, engine.manifest.sites), places, passes, as_they_are)
        for seed, (count, places, passes) in enumerate(
            [
                (1, range(4, 5), range(7)),
                (3, range(3), range(2, 4)),
                (2, range(1, 3), range(5)),
                (1, range(1), range(100, 112)),
            ]
        )
    ]
    alone = [runs.draw(engine, [draw])[0] for draw in draws]
    monkeypatch.setattr(runs, "VALUES_IN_CACHE", row_passes * engine.manifest.values_per_pass)
    for draw, one, other in zip(draws, alone, runs.draw(engine, draws), strict=True):
        shape = (len(draw.passes), len(draw.rows), 10)
        samples = np.asarray(other)
        assert samples.shape == shape
        np.testing.assert_allclose(samples, np.asarray(one), atol=1e-5)
