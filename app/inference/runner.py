"""A served model: its engine, and the batches that its requests share.

A request larger than one piece of long work is cut into pieces, whose runs alternate with the runs
of other requests.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from dropserve.app.inference import answers, batch, batcher
from dropserve.app.inference.batch import PassesJob, Prediction
from dropserve.app.inference.batcher import Batcher, Pace
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.executor import Executor
from dropserve.app.inference.rows import Inputs, Rows, read_rows
from dropserve.app.observability.record import RequestRecord
from dropserve.app.uncertainty import statistics, summary
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.app.uncertainty.statistics import Samples
from dropserve.app.uncertainty.summary import Summary

# Length of a piece of long work: the delay that it may cause to short work.
PIECE_SECONDS = 0.02
# Most numbers that samples may hold to be summarized on the event loop. That takes a fraction of a
# millisecond; handing the work to the thread and back would cost more.
VALUES_ON_LOOP = 2**14
# Passes after which a tolerance is first checked; later checks come each time that they have
# doubled. After fewer passes, a request could stop only because its passes happen to agree, and
# more frequent checks would make that likelier. tests/app/uncertainty/test_coverage.py measures the
# remaining effect.
FIRST_CHECK = 50

Result = TypeVar("Result")

Predictions = Batcher[Inputs, Prediction]
Passes = Batcher[PassesJob, Samples | Summary]


class ModelRunner:
    """Runs requests on one version of a model, for one event loop.

    Parameters
    ----------
    engine
        The model.
    executor
        Where long runs are made.
    """

    def __init__(self, engine: Engine, executor: Executor) -> None:
        self.engine = engine
        self.executor = executor
        self.manifest = engine.manifest
        shape = self.manifest.input.shape
        self.row_length = math.prod(shape)
        # Lists in a row that is nested to the shape.
        self.lists_a_row = sum(math.prod(shape[:depth]) for depth in range(len(shape)))
        self.is_classifier = self.manifest.task == "classification"
        self.labels = self.manifest.outputs.labels
        self.identity = answers.identity(self.manifest)
        predict, run_passes = partial(batch.predict, engine), partial(batch.run_passes, engine)
        pace, most = engine.paces.predict, batch.most_at_once(engine.values_per_row)
        self.rows_a_piece = piece_size(pace, most)
        self.predictions = Predictions(predict, pace, most, executor)
        self.long_predictions = Predictions(predict, pace, self.rows_a_piece, executor, pieces=True)
        pace, most = engine.paces.passes, batch.most_at_once(engine.values_per_pass)
        self.passes_a_piece = piece_size(pace, most)
        self.passes = Passes(run_passes, pace, most, executor)
        self.long_passes = Passes(run_passes, pace, self.passes_a_piece, executor, pieces=True)

    async def predict(self, inputs: Inputs, record: RequestRecord) -> Prediction:
        """Run eval mode for all rows."""
        if len(inputs) <= self.rows_a_piece:
            return await self.predictions.submit(inputs, len(inputs), record)
        outputs, largest = [], []
        x = await self._read(inputs, record)
        for rows in batch.pieces(len(x), self.rows_a_piece):
            some = x[rows.start : rows.stop]
            part = await self.long_predictions.submit(some, len(rows), record)
            outputs.append(part.outputs)
            largest += part.largest
        return Prediction(batch.concatenate(outputs), largest)

    async def summarize_passes(
        self, inputs: Inputs, stream: MaskStream, passes: int, level: float, record: RequestRecord
    ) -> Summary:
        """Run train-mode passes of all rows; return their summary.

        Rows are run in groups, as many at a time as fit one piece with all their passes. A row with
        more passes than that is a group of its own.
        """
        rows, numbers = range(len(inputs)), range(passes)
        if len(rows) * passes <= self.passes_a_piece:
            job = PassesJob(inputs, stream, rows, numbers, level)
            return batch.as_summary(await self.passes.submit(job, job.size, record))
        groups = []
        x = await self._read(inputs, record)
        for rows in batch.pieces(len(x), max(1, self.passes_a_piece // passes)):
            some_x = x[rows.start : rows.stop]
            if len(rows) * passes <= self.passes_a_piece:
                job = PassesJob(some_x, stream, rows, numbers, level)
                groups.append(
                    batch.as_summary(await self.long_passes.submit(job, job.size, record))
                )
            else:
                samples = await self._sample_in_pieces(some_x, stream, rows, numbers, record)
                groups.append(await self.summarize(samples, level, stream, record))
        return summary.join_rows(groups)

    async def sample(
        self,
        inputs: Inputs,
        stream: MaskStream,
        passes: int,
        tolerance: float | None,
        record: RequestRecord,
    ) -> Samples:
        """Run train-mode passes of all rows; return their samples.

        With a tolerance, stop as soon as the standard error of every mean is within it.
        """
        if tolerance is None:
            groups = await self._sample_groups(inputs, stream, range(passes), record)
            return await self._join([groups], record)
        parts: list[list[Samples]] = []
        for numbers in between_checks(passes, stream.replicate):
            parts.append(await self._sample_groups(inputs, stream, numbers, record))
            samples = await self._join(parts, record)
            error = partial(
                summary.largest_standard_error, self.manifest, samples, stream.replicate
            )
            if await self._compute(error, samples.size, record) <= tolerance:
                break
        return samples

    async def summarize(
        self, samples: Samples, level: float, stream: MaskStream, record: RequestRecord
    ) -> Summary:
        """Summarize samples."""
        work = partial(summary.summarize, self.manifest, samples, level, stream.replicate)
        return await self._compute(work, samples.size, record)

    async def _sample_groups(
        self, inputs: Inputs, stream: MaskStream, passes: range, record: RequestRecord
    ) -> list[Samples]:
        """Run some passes of all rows; return the samples of each group of rows."""
        rows, count = range(len(inputs)), len(passes)
        if len(rows) * count <= self.passes_a_piece:
            job = PassesJob(inputs, stream, rows, passes, None)
            return [batch.as_samples(await self.passes.submit(job, job.size, record))]
        x = await self._read(inputs, record)
        return [
            await self._sample_in_pieces(x[rows.start : rows.stop], stream, rows, passes, record)
            for rows in batch.pieces(len(x), max(1, self.passes_a_piece // count))
        ]

    async def _sample_in_pieces(
        self, x: Rows, stream: MaskStream, rows: range, passes: range, record: RequestRecord
    ) -> Samples:
        """Run some passes of a group of rows, piece by piece."""
        parts = []
        for some in batch.pieces(len(passes), max(1, self.passes_a_piece // len(rows))):
            job = PassesJob(x, stream, rows, passes[some.start : some.stop], None)
            parts.append(batch.as_samples(await self.long_passes.submit(job, job.size, record)))
        if len(parts) == 1:
            return parts[0]
        return statistics.side_by_side(np.concatenate(parts))

    async def _join(self, parts: list[list[Samples]], record: RequestRecord) -> Samples:
        """Join samples: consecutive passes, each of them in consecutive groups of rows."""

        def join() -> Samples:
            by_passes = [batch.concatenate(groups, axis=1) for groups in parts]
            return statistics.side_by_side(batch.concatenate(by_passes))

        return await self._compute(join, sum(g.size for groups in parts for g in groups), record)

    async def _read(self, inputs: Inputs, record: RequestRecord) -> Rows:
        """Read the rows of several runs at once, so that a fault is found before any run."""
        if not isinstance(inputs, list):
            return inputs
        read = partial(read_rows, inputs, self.manifest.input.shape)
        return await self.run_aside(read, record)

    async def _compute(
        self, work: Callable[[], Result], values: int, record: RequestRecord
    ) -> Result:
        """Do work on ``values`` numbers where it delays no other request."""
        return work() if values <= VALUES_ON_LOOP else await self.run_aside(work, record)

    async def run_aside(self, work: Callable[[], Result], record: RequestRecord) -> Result:
        """Do long work in the executor.

        Raises
        ------
        DeadlineExceeded
            If the request's time is up before the work begins.
        """
        record.check_deadline(time.monotonic())
        return await self.executor.submit(work, long=True)


def predict_pace(engine: Engine) -> Pace:
    """Measure how long runs in eval mode take."""
    # Lists, as in requests, since reading them takes part of the time.
    rows = np.zeros((1, *engine.manifest.input.shape)).tolist()
    return batcher.measure(
        lambda sizes: batch.predict(engine, [rows * size for size in sizes]),
        batch.most_at_once(engine.values_per_row),
        clock(engine),
    )


def passes_pace(engine: Engine) -> Pace:
    """Measure how long runs of train-mode passes take."""
    rows = np.zeros((1, *engine.manifest.input.shape)).tolist()
    stream = MaskStream(0, engine.manifest.sites)
    return batcher.measure(
        lambda sizes: batch.run_passes(
            engine,
            # Each with a level of its own, so that no work is shared between them.
            [
                PassesJob(rows, stream, range(1), range(size), 1 / (2 + number))
                for number, size in enumerate(sizes)
            ],
        ),
        batch.most_at_once(engine.values_per_pass),
        clock(engine),
    )


def clock(engine: Engine) -> Callable[[], float]:
    """Return the clock that runs are timed by."""
    return time.thread_time if engine.device == "cpu" else time.perf_counter


def between_checks(passes: int, replicate: int) -> Iterator[range]:
    """Return the passes from one check of a tolerance to the next, in whole replicates."""
    start, stop = 0, -(-FIRST_CHECK // replicate) * replicate
    while start < passes:
        yield range(start, min(stop, passes))
        start, stop = stop, 2 * stop


def piece_size(pace: Pace, most: int) -> int:
    """Return the size of a piece of long work."""
    if pace.unit <= 0:
        return most
    return max(1, min(most, int((PIECE_SECONDS - pace.run) / pace.unit)))
