"""Runs: the pieces they are made in change no answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.inference import batch
from dropserve.app.inference.batch import PassesJob
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.registry import load_engines
from dropserve.app.uncertainty.masks import MaskStream


@pytest.fixture(scope="module")
def engine(built: Path) -> Engine:
    return load_engines(built / "models", "cpu")["digits"][1]


@pytest.mark.parametrize("row_passes", [1, 3, 10, 1000])
def test_a_run_of_many_draws_in_pieces_is_what_each_draw_is_alone(
    engine: Engine, examples: Any, monkeypatch: pytest.MonkeyPatch, row_passes: int
) -> None:
    rows = examples("digits")
    draws = [
        PassesJob(rows[:count], MaskStream(seed, engine.manifest.sites), places, passes, None)
        for seed, (count, places, passes) in enumerate(
            [
                (1, range(4, 5), range(7)),
                (3, range(3), range(2, 4)),
                (2, range(1, 3), range(5)),
                (1, range(1), range(100, 112)),
            ]
        )
    ]
    alone = [batch.run_passes(engine, [draw])[0] for draw in draws]
    monkeypatch.setattr(batch, "VALUES_IN_CACHE", row_passes * engine.values_per_pass)
    for draw, one, other in zip(draws, alone, batch.run_passes(engine, draws), strict=True):
        shape = (len(draw.passes), len(draw.rows), 10)
        samples = np.asarray(other)
        assert samples.shape == shape
        np.testing.assert_allclose(samples, np.asarray(one), atol=1e-5)


def numbers(found: Any) -> NDArray[np.float32]:
    """Put all that a draw's outcome says into one array."""
    if isinstance(found, np.ndarray):
        return found
    return np.concatenate(
        [np.ravel(values) for summary in found if summary for values in vars(summary).values()]
    )


@pytest.mark.parametrize("model", ["digits", "diabetes"])
def test_draws_that_ask_alike_or_not_get_what_they_get_alone_beside_one_that_is_refused(
    built: Path, examples: Any, model: str
) -> None:
    engine = load_engines(built / "models", "cpu")[model][1]
    rows = examples(model)
    # So large that the first layer's outputs are beyond float32.
    beyond = (np.full(np.shape(rows[:1]), 3e38)).tolist()
    draws = [
        PassesJob(
            inputs, MaskStream(seed, engine.manifest.sites), range(len(inputs)), passes, level
        )
        for seed, (inputs, passes, level) in enumerate(
            [
                (rows[:1], range(20), 0.9),
                (rows[1:3], range(20), 0.5),
                (beyond, range(20), 0.9),
                (rows[3:4], range(7), None),
                (rows[4:7], range(20), 0.9),
                (rows[4:6], range(7), None),
            ]
        )
    ]
    for place, (draw, found) in enumerate(zip(draws, batch.run_passes(engine, draws), strict=True)):
        (alone,) = batch.run_passes(engine, [draw])
        if place == 2:
            assert isinstance(found, InputError)
            assert isinstance(alone, InputError)
            assert "beyond float32" in str(found)
        else:
            np.testing.assert_allclose(numbers(found), numbers(alone), rtol=1e-4, atol=1e-5)
