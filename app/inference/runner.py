"""A model that is served: an engine, and the runs that requests share.

What a request needs of it are steps (see ``service``): generators that yield the runs they need.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dropserve.app.inference import batch, batcher
from dropserve.app.inference.batch import Draw, Inputs, Prediction
from dropserve.app.inference.batcher import Batcher
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.executor import Turns
from dropserve.app.inference.rows import rows_from_lists
from dropserve.app.uncertainty import statistics
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.app.uncertainty.statistics import Samples

# How long a piece of long work should take: what short work may have to wait for.
PIECE_SECONDS = 0.02
# Numbers of samples that are summarised at once: a fraction of a millisecond, in which to hand the
# work over and back is dear.
VALUES_ON_LOOP = 2**14
# Passes after which a tolerance is first looked at; then each time that they have doubled. Looks
# at fewer would stop by chance, where passes that happened to agree tell of too small an error;
# looks more often would be more such chances. tests/app/test_coverage.py measures what is left.
FIRST_LOOK = 50


class Shared(NamedTuple):
    """A step: a job for a run that other requests may share."""

    batcher: Batcher[Any, Any]
    job: object
    size: int


class Aside(NamedTuple):
    """A step: work that is long, and not a run."""

    work: Callable[[], object]


# What a step is sent depends on the step, so no one type says it.
Part = Generator[Shared | Aside, Any, Any]


class Model:
    """An engine, and the runs that requests share.

    A request that takes more than a piece of long work is made in pieces, whose runs take turns
    with those of others.
    """

    def __init__(self, engine: Engine, turns: Turns) -> None:
        self.engine = engine
        self.manifest = engine.manifest
        self.names = self.manifest.outputs.labels
        self.row_length = math.prod(self.manifest.input.shape)
        self.classification = self.manifest.task == "classification"
        # Who answers.
        self.identity: dict[str, object] = {
            "model": self.manifest.name,
            "version": self.manifest.version,
        }
        predict, draw = partial(batch.predict, engine), partial(batch.draw, engine)
        # As requests bring them, since the time it takes to read rows counts.
        rows = np.zeros((1, *self.manifest.input.shape)).tolist()
        stream = MaskStream(0, self.manifest.sites)
        clock = time.thread_time if engine.device == "cpu" else time.perf_counter
        most = batch.most_at_once(self.manifest.values_per_row)
        pace = batcher.measure(lambda sizes: predict([rows * size for size in sizes]), most, clock)
        self.piece_of_rows = piece(pace, most)
        self.predictions = Batcher(predict, pace, most, turns)
        self.many_predictions = Batcher(predict, pace, self.piece_of_rows, turns, pieces=True)
        most = batch.most_at_once(self.manifest.values_per_pass)
        pace = batcher.measure(
            lambda sizes: draw(
                # Each at a level of its own, so that nothing they cost is shared.
                [
                    Draw(rows, stream, range(1), range(size), 1 / (2 + number))
                    for number, size in enumerate(sizes)
                ]
            ),
            most,
            clock,
        )
        self.piece_of_passes = piece(pace, most)
        self.draws = Batcher(draw, pace, most, turns)
        self.many_draws = Batcher(draw, pace, self.piece_of_passes, turns, pieces=True)

    def labels(self, largest: list[int]) -> list[str]:
        """Name the likeliest class of each row."""
        return [self.names[place] for place in largest]

    def deterministic(self, inputs: Inputs) -> Part:
        """Run eval mode; give a ``Prediction`` of all rows."""
        if len(inputs) <= self.piece_of_rows:
            return (yield Shared(self.predictions, inputs, len(inputs)))
        outputs, largest = [], []
        x = yield from self.read(inputs)
        for rows in batch.pieces(len(x), self.piece_of_rows):
            some = x[rows.start : rows.stop]
            part = yield Shared(self.many_predictions, some, len(rows))
            outputs.append(part.outputs)
            largest += part.largest
        return Prediction(batch.joined(outputs), largest)

    def read(self, inputs: Inputs) -> Part:
        """Give rows of more than one run as an array, so that faults are found before any run."""
        if isinstance(inputs, list):
            shape = self.manifest.input.shape
            return (yield Aside(partial(rows_from_lists, inputs, shape, len(inputs))))
        return inputs

    def sample(
        self, inputs: Inputs, stream: MaskStream, passes: range, level: float | None
    ) -> Part:
        """Run train-mode passes; give each group of rows' samples, or their summary.

        A group holds as many rows as fit one run with all their passes. A row with more passes
        than that is a group of its own, run in pieces.
        """
        count = len(passes)
        if len(inputs) * count <= self.piece_of_passes:
            draw = Draw(inputs, stream, range(len(inputs)), passes, level)
            return [(yield Shared(self.draws, draw, draw.size))]
        found = []
        x = yield from self.read(inputs)
        for rows in batch.pieces(len(x), max(1, self.piece_of_passes // count)):
            some_x = x[rows.start : rows.stop]
            if len(rows) * count <= self.piece_of_passes:
                draw = Draw(some_x, stream, rows, passes, level)
                found.append((yield Shared(self.many_draws, draw, draw.size)))
                continue
            parts = []
            for some in batch.pieces(count, self.piece_of_passes):
                draw = Draw(some_x, stream, rows, passes[some.start : some.stop], None)
                parts.append((yield Shared(self.many_draws, draw, draw.size)))
            samples = statistics.side_by_side(np.concatenate(parts))
            if level is None:
                found.append(samples)
            else:
                found.append((yield from self.finish(samples, level, stream)))
        return found

    def sample_until(
        self, inputs: Inputs, stream: MaskStream, passes: int, tolerance: float | None
    ) -> Part:
        """Run train-mode passes of all rows; give their samples.

        With a tolerance, as few as make all standard errors of the mean as small, but no more than
        asked for.
        """
        if tolerance is None:
            groups = yield from self.sample(inputs, stream, range(passes), None)
            return (yield from self.together([groups]))
        parts: list[list[Samples]] = []
        for some in looks(passes, stream.replicate):
            parts.append((yield from self.sample(inputs, stream, some, None)))
            samples = yield from self.together(parts)
            error = partial(batch.largest_error, self.manifest, samples, stream.replicate)
            if (yield from self.work(error, samples.size)) <= tolerance:
                break
        return samples

    def together(self, parts: list[list[Samples]]) -> Part:
        """Put samples together: some passes after others, of each some rows after others."""

        def joined() -> Samples:
            by_pass = [batch.joined(groups, axis=1) for groups in parts]
            return statistics.side_by_side(batch.joined(by_pass))

        return (yield from self.work(joined, sum(g.size for groups in parts for g in groups)))

    def finish(self, samples: Samples, level: float, stream: MaskStream) -> Part:
        """Summarise samples."""
        summarize = partial(batch.summarize, self.manifest, level, samples, stream.replicate)
        return (yield from self.work(summarize, samples.size))

    def work(self, work: Callable[[], object], values: int) -> Part:
        """Do work on so many numbers where it holds nobody up."""
        return work() if values <= VALUES_ON_LOOP else (yield Aside(work))


def looks(passes: int, replicate: int) -> Iterator[range]:
    """Cut passes at those after which a tolerance is looked at, with no replicate cut in two."""
    start, stop = 0, -(-FIRST_LOOK // replicate) * replicate
    while start < passes:
        yield range(start, min(stop, passes))
        start, stop = stop, 2 * stop


def piece(pace: batcher.Pace, most: int) -> int:
    """Return how large a piece of long work is."""
    if pace.unit <= 0:
        return most
    return max(1, min(most, int((PIECE_SECONDS - pace.run) / pace.unit)))
