"""One run of a graph for several requests, and each request's part of its outcome.

The rows, or row-passes, of all jobs are concatenated. Rows are read from JSON here, once for the
run instead of once a request. A job whose rows are not allowed, or whose outcome is beyond float32,
gets an ``InputError`` and affects no other.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.rows import Inputs, Rows, read_rows, rows_at_once
from dropserve.app.uncertainty import statistics, summary
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.app.uncertainty.statistics import Samples
from dropserve.app.uncertainty.summary import Summary, is_finite, overflow
from dropserve.export.bundle import Manifest

Scalar = TypeVar("Scalar", bound=np.generic)
Outcome = TypeVar("Outcome")

# Bounds on the memory of a run: rows or row-passes, and numbers computed for them.
ROWS_AT_ONCE = 4096
VALUES_AT_ONCE = 2**24
# On the CPU the passes of a run are computed in pieces of this many numbers, which then mostly stay
# in a core's cache from one node of the graph to the next.
VALUES_IN_CACHE = 2**20


class Prediction(NamedTuple):
    """Class probabilities or values ``[B, C]`` in eval mode, and each row's largest output."""

    outputs: NDArray[np.float32]
    largest: list[int]


@dataclass(frozen=True)
class PassesJob:
    """Train-mode passes of some rows of a request.

    Parameters
    ----------
    inputs
        The rows.
    stream
        The masks of the request.
    rows
        Indices of the rows in their request.
    passes
        Indices of the passes.
    level
        Level of the interval in the summary; None: the outcome is the samples themselves.
    """

    inputs: Inputs
    stream: MaskStream
    rows: range
    passes: range
    level: float | None

    @property
    def size(self) -> int:
        """Number of row-passes."""
        return len(self.rows) * len(self.passes)


def predict(engine: Engine, jobs: Sequence[Inputs]) -> list[Prediction | InputError]:
    """Run eval mode for the rows of each job."""
    x, errors = read_jobs(jobs, engine.manifest.input.shape)
    sizes = [len(job) for number, job in enumerate(jobs) if number not in errors]
    outcomes: list[Prediction | InputError] = []
    if sizes:
        outputs = engine.predict(x)
        all_finite = is_finite(outputs)
        if not all_finite:
            beyond = np.array([not is_finite(row) for row in outputs])
            outputs[beyond] = 0
        outputs = activate(engine.manifest, outputs)
        largest = outputs.argmax(axis=1).tolist()
        for rows in slices(sizes):
            if all_finite or not beyond[rows].any():
                values = summary.values(engine.manifest, outputs[rows])
                outcomes.append(Prediction(np.ascontiguousarray(values), largest[rows]))
            else:
                outcomes.append(overflow(engine.manifest))
    return with_errors(outcomes, errors)


def run_passes(engine: Engine, jobs: Sequence[PassesJob]) -> list[Samples | Summary | InputError]:
    """Run the passes of each job; return its samples ``[T, B, C]`` or their summary."""
    x, errors = read_jobs([job.inputs for job in jobs], engine.manifest.input.shape)
    good = [job for number, job in enumerate(jobs) if number not in errors]
    outcomes: list[Samples | Summary | InputError] = []
    if good:
        values = VALUES_IN_CACHE if engine.device == "cpu" else VALUES_AT_ONCE
        most = max(1, values // engine.values_per_pass)
        outputs = concatenate([run_piece(engine, x, piece) for piece in cut(good, most)])
        outcomes = outcomes_of(engine.manifest, good, outputs)
    return with_errors(outcomes, errors)


def as_summary(outcome: Samples | Summary) -> Summary:
    """Return the outcome of a job with a level."""
    assert isinstance(outcome, Summary)
    return outcome


def as_samples(outcome: Samples | Summary) -> Samples:
    """Return the outcome of a job without a level."""
    assert isinstance(outcome, np.ndarray)
    return outcome


def outcomes_of(
    manifest: Manifest, jobs: Sequence[PassesJob], outputs: NDArray[np.float32]
) -> list[Samples | Summary | InputError]:
    """Turn the outputs ``[N, C]`` into each job's outcome, at once for jobs that are alike."""
    alike: dict[tuple[int, float | None, int], list[int]] = {}
    for number, job in enumerate(jobs):
        key = len(job.passes), job.level, job.stream.replicate
        alike.setdefault(key, []).append(number)
    if len(alike) == 1:
        return outcomes_of_alike(manifest, jobs, outputs)
    parts = list(slices(job.size for job in jobs))
    outcomes: dict[int, Samples | Summary | InputError] = {}
    for numbers in alike.values():
        some = concatenate([outputs[parts[number]] for number in numbers])
        made = outcomes_of_alike(manifest, [jobs[number] for number in numbers], some)
        outcomes |= zip(numbers, made, strict=True)
    return [outcomes[number] for number in range(len(jobs))]


def outcomes_of_alike(
    manifest: Manifest, jobs: Sequence[PassesJob], outputs: NDArray[np.float32]
) -> list[Samples | Summary | InputError]:
    """Turn the outputs into the outcomes of jobs with the same passes, level and kind of masks."""
    count, level, replicate = len(jobs[0].passes), jobs[0].level, jobs[0].stream.replicate
    found: Summary | None = None
    try:
        samples = samples_of(manifest, outputs, count)
        if level is not None:
            found = summary.summarize(manifest, samples, level, replicate)
    except InputError as error:
        if len(jobs) == 1:
            return [error]
        # One of the jobs caused the error; each is tried alone to find it.
        parts = slices(job.size for job in jobs)
        return [
            outcomes_of_alike(manifest, [job], outputs[part])[0]
            for job, part in zip(jobs, parts, strict=True)
        ]
    if len(jobs) == 1:
        return [samples if found is None else found]
    rows_of_jobs = slices(len(job.rows) for job in jobs)
    if found is None:
        return [samples[:, rows] for rows in rows_of_jobs]
    return [summary.take_rows(found, rows) for rows in rows_of_jobs]


def samples_of(manifest: Manifest, outputs: NDArray[np.float32], passes: int) -> Samples:
    """Turn outputs ``[N, C or 2C]`` of ``passes`` passes a row into samples ``[T, B, C or 2C]``."""
    samples = statistics.by_pass(outputs, passes)
    if not is_finite(samples):
        raise overflow(manifest)
    return activate(manifest, samples)


def activate(manifest: Manifest, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn a graph's outputs into class probabilities or values."""
    return softmax(outputs) if manifest.task == "classification" else outputs


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn logits ``[..., C]`` into probabilities."""
    # Ufuncs: for a single row an array's methods take longer than the arithmetic.
    # Differences beyond float32 are as good as infinite: their exp is 0.
    with np.errstate(over="ignore"):
        probabilities: NDArray[np.float32] = logits - np.maximum.reduce(logits, -1, keepdims=True)
    np.exp(probabilities, out=probabilities)
    probabilities /= np.add.reduce(probabilities, -1, keepdims=True)
    return probabilities


class Segment(NamedTuple):
    """Some passes of some rows of a job; the rows are ``x[first:]`` in the run."""

    first: int
    stream: MaskStream
    rows: range
    passes: range


def cut(jobs: Sequence[PassesJob], most: int) -> Iterator[list[Segment]]:
    """Cut jobs into pieces of about ``most`` row-passes, in order."""
    piece: list[Segment] = []
    first = size = 0
    for job in jobs:
        for rows in pieces(len(job.rows), max(1, most // len(job.passes))):
            for some in pieces(len(job.passes), most):
                if size + len(rows) * len(some) > most and piece:
                    yield piece
                    piece, size = [], 0
                size += len(rows) * len(some)
                indices = job.rows[rows.start : rows.stop], job.passes[some.start : some.stop]
                piece.append(Segment(first + rows.start, job.stream, *indices))
        first += len(job.rows)
    yield piece


def run_piece(engine: Engine, x: Rows, piece: Sequence[Segment]) -> NDArray[np.float32]:
    """Run the passes of a piece; return logits or values ``[N, C]``."""
    drawn = [s.stream.draw(s.rows, s.passes) for s in piece]
    masks = {name: concatenate([masks[name] for masks in drawn]) for name in drawn[0]}
    rows = [np.repeat(np.arange(s.first, s.first + len(s.rows)), len(s.passes)) for s in piece]
    return engine.passes(x, concatenate(rows), masks)


def read_jobs(jobs: Sequence[Inputs], shape: tuple[int, ...]) -> tuple[Rows, dict[int, InputError]]:
    """Read the rows of all jobs; return them, and the errors of faulty jobs by job number."""
    if all(isinstance(job, list) for job in jobs):
        x = rows_at_once(list(chain.from_iterable(jobs)), shape)
        if x is not None:
            return x, {}
    good: list[Rows] = []
    errors: dict[int, InputError] = {}
    for number, job in enumerate(jobs):
        try:
            good.append(read_rows(job, shape) if isinstance(job, list) else job)
        except InputError as error:
            errors[number] = error
    return concatenate(good) if good else np.empty((0, *shape), np.float32), errors


def with_errors(
    outcomes: list[Outcome], errors: dict[int, InputError]
) -> list[Outcome | InputError]:
    """Insert the errors of faulty jobs among the outcomes of the others, in the jobs' order."""
    all_outcomes: list[Outcome | InputError] = [*outcomes]
    for number, error in sorted(errors.items()):
        all_outcomes.insert(number, error)
    return all_outcomes


def kept_share(stream: MaskStream, rows: range, passes: range) -> NDArray[np.float64]:
    """Return the share of units that the masks keep, for each site."""
    return np.array([masks.mean() for masks in stream.draw(rows, passes).values()])


def slices(sizes: Iterable[int]) -> Iterator[slice]:
    """Return the slices of consecutive parts of these sizes."""
    end = 0
    for size in sizes:
        start, end = end, end + size
        yield slice(start, end)


def concatenate(parts: Sequence[NDArray[Scalar]], axis: int = 0) -> NDArray[Scalar]:
    """Concatenate arrays; return a single one without a copy."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def most_at_once(values: int) -> int:
    """Return the most rows or row-passes of a run that computes ``values`` numbers for each."""
    return min(ROWS_AT_ONCE, max(1, VALUES_AT_ONCE // values))


def pieces(length: int, size: int) -> Iterator[range]:
    """Cut ``range(length)`` into ranges of at most ``size``."""
    for start in range(0, length, size):
        yield range(start, min(start + size, length))
