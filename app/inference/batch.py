"""Make one run of what several requests ask of a model, and give each its part of the outcome.

Rows, or passes of rows, of all requests stand one after the other in the arrays of a run. What is
done once for a run is not done for each request, so the rows are read here, too. A request whose
rows are not allowed, or whose outcome is beyond float32, is answered with an ``InputError`` and
touches no other.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dropserve.app.errors import InputError
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.rows import read_rows, rows_at_once
from dropserve.app.uncertainty import statistics
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.app.uncertainty.statistics import (
    Entropies,
    Floats,
    Interval,
    Moments,
    Samples,
    Spreads,
    Statistic,
)
from dropserve.export.bundle import Manifest

Rows = NDArray[np.float32]
Inputs = list[object] | Rows  # rows as they came, or read
Scalar = TypeVar("Scalar", bound=np.generic)
Found = TypeVar("Found")
# What bounds the memory of a run: rows or row-passes, and numbers it computes.
ROWS_AT_ONCE = 4096
VALUES_AT_ONCE = 2**24
# On the CPU, the passes of a run are made in pieces that compute so many numbers, most of which
# then stay in a core's cache from one node to the next.
VALUES_IN_CACHE = 2**20


class Statistics(NamedTuple):
    """What the passes of some rows say."""

    moments: Moments
    interval: Interval
    parts: Entropies | Spreads  # of classes, of values


@dataclass(frozen=True)
class Draw:
    """Some train-mode passes of some rows of a request.

    Parameters
    ----------
    inputs
        The rows.
    stream
        The masks of the request.
    rows
        Places of the rows in their request.
    passes
        Numbers of the passes.
    level
        Of the interval in the summary that the samples become; None: they stay as they are.
    """

    inputs: Inputs
    stream: MaskStream
    rows: range
    passes: range
    level: float | None

    @property
    def size(self) -> int:
        """Count the row-passes."""
        return len(self.rows) * len(self.passes)


class Prediction(NamedTuple):
    """Eval mode's class probabilities or values ``[b, C]``, and the place of each row's largest."""

    outputs: NDArray[np.float32]
    largest: list[int]


def predict(engine: Engine, parts: Sequence[Inputs]) -> list[Prediction | InputError]:
    """Run eval mode for the rows of each part."""
    x, faults = read(parts, engine.manifest.input.shape)
    sizes = [len(part) for number, part in enumerate(parts) if number not in faults]
    found: list[Prediction | InputError] = []
    if sizes:
        outputs = engine.predict(x)
        fine = finite(outputs)
        if not fine:
            beyond = np.array([not finite(row) for row in outputs])
            outputs[beyond] = 0
        answers = as_answers(engine.manifest, outputs)
        largest = answers.argmax(axis=1).tolist()
        for place in places(sizes):
            if fine or not beyond[place].any():
                own = np.ascontiguousarray(values(engine.manifest, answers[place]))
                found.append(Prediction(own, largest[place]))
            else:
                found.append(out_of_reach(engine.manifest))
    return in_place(found, faults)


def draw(engine: Engine, draws: Sequence[Draw]) -> list[Samples | Statistics | InputError]:
    """Run the passes of each draw; return its samples, or their summary."""
    x, faults = read([d.inputs for d in draws], engine.manifest.input.shape)
    good = [d for number, d in enumerate(draws) if number not in faults]
    found: list[Samples | Statistics | InputError] = []
    if good:
        values = VALUES_IN_CACHE if engine.device == "cpu" else VALUES_AT_ONCE
        most = max(1, values // engine.manifest.values_per_pass)
        outputs = joined([passes(engine, x, piece) for piece in cut(good, most)])
        found = finish(engine.manifest, good, outputs)
    return in_place(found, faults)


def finish(
    manifest: Manifest, draws: Sequence[Draw], outputs: NDArray[np.float32]
) -> list[Samples | Statistics | InputError]:
    """Make of the outputs ``[N, C]`` what each draw asks for, at once for those that ask alike."""
    alike: dict[tuple[int, float | None, int], list[int]] = {}
    for number, d in enumerate(draws):
        key = len(d.passes), d.level, d.stream.replicate
        alike.setdefault(key, []).append(number)
    if len(alike) == 1:
        return finish_alike(manifest, draws, outputs)
    place_of = list(places(d.size for d in draws))
    found: dict[int, Samples | Statistics | InputError] = {}
    for numbers in alike.values():
        some = joined([outputs[place_of[number]] for number in numbers])
        made = finish_alike(manifest, [draws[number] for number in numbers], some)
        found |= zip(numbers, made, strict=True)
    return [found[number] for number in range(len(draws))]


def finish_alike(
    manifest: Manifest, draws: Sequence[Draw], outputs: NDArray[np.float32]
) -> list[Samples | Statistics | InputError]:
    """Make of the outputs what draws ask for that are of as many passes, a level and a kind."""
    count, level, replicate = len(draws[0].passes), draws[0].level, draws[0].stream.replicate
    try:
        samples = answers_by_pass(manifest, outputs, count)
        summary = None if level is None else summarize(manifest, level, samples, replicate)
    except InputError as error:
        if len(draws) == 1:
            return [error]
        # Somebody's; each alone shows whose.
        own = places(d.size for d in draws)
        return [
            finish_alike(manifest, [d], outputs[place])[0]
            for d, place in zip(draws, own, strict=True)
        ]
    if len(draws) == 1:
        return [summary or samples]
    own = places(len(d.rows) for d in draws)
    if summary is None:
        return [samples[:, rows] for rows in own]
    return [
        Statistics(
            statistics.take(summary.moments, rows),
            statistics.take(summary.interval, rows),
            statistics.take(summary.parts, rows),
        )
        for rows in own
    ]


def answers_by_pass(manifest: Manifest, outputs: NDArray[np.float32], count: int) -> Samples:
    """Turn outputs of ``count`` passes a row into samples ``[T, B, C]``.

    Where the network answers the noise of its values, too, it stands behind them: ``[T, B, 2C]``.
    """
    samples = statistics.by_pass(outputs, count)
    if not finite(samples):
        raise out_of_reach(manifest)
    return as_answers(manifest, samples)


def summarize(manifest: Manifest, level: float, samples: Samples, replicate: int) -> Statistics:
    """Say what the samples of some rows say, each ``replicate`` of which were drawn together.

    Raises
    ------
    InputError
        If what they say is beyond float32.
    """
    if manifest.task == "classification":
        return Statistics(
            statistics.join([statistics.moments(samples, replicate)]),
            statistics.join([statistics.passes_interval(samples, level)]),
            statistics.join([statistics.entropies(samples)]),
        )
    some = values(manifest, samples)
    moments = statistics.moments(some, replicate)
    noise_std = noise(manifest, samples)
    spreads = statistics.spreads(moments, noise_std)
    interval = statistics.mixture_interval(some, noise_std, spreads.total_std, level)
    in_reach(manifest, spreads.total_std, interval.lower, interval.upper)
    return Statistics(
        statistics.join([moments]), statistics.join([interval]), statistics.join([spreads])
    )


def largest_error(manifest: Manifest, samples: Samples, replicate: int) -> float:
    """Return the largest standard error of a mean of samples."""
    moments = statistics.moments(values(manifest, samples), replicate)
    return float(moments.standard_error.max())


def join_groups(groups: Sequence[Statistics]) -> Statistics:
    """Put the summaries of groups of rows together."""
    return Statistics(
        statistics.join([group.moments for group in groups]),
        statistics.join([group.interval for group in groups]),
        statistics.join([group.parts for group in groups]),
    )


def values(manifest: Manifest, answers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Leave out of answers ``[..., C or 2C]`` the noise."""
    return answers[..., : len(manifest.outputs.labels)]


def noise(manifest: Manifest, samples: Samples) -> Floats:
    """Return the noise's standard deviation around the passes: ``[C]``, or ``[T, B, C]``."""
    if manifest.noise_std is not None:
        return np.array(manifest.noise_std)
    return np.exp(samples[..., len(manifest.outputs.labels) :], dtype=np.float64)


class Segment(NamedTuple):
    """Some passes of some rows of a draw; the rows are ``x[first:]`` in the run."""

    first: int
    stream: MaskStream
    rows: range
    passes: range


def cut(draws: Sequence[Draw], most: int) -> Iterator[list[Segment]]:
    """Cut draws into pieces of about ``most`` row-passes, in order."""
    piece: list[Segment] = []
    first = size = 0
    for d in draws:
        for rows in pieces(len(d.rows), max(1, most // len(d.passes))):
            for some in pieces(len(d.passes), most):
                if size + len(rows) * len(some) > most and piece:
                    yield piece
                    piece, size = [], 0
                size += len(rows) * len(some)
                numbers = d.rows[rows.start : rows.stop], d.passes[some.start : some.stop]
                piece.append(Segment(first + rows.start, d.stream, *numbers))
        first += len(d.rows)
    yield piece


def passes(engine: Engine, x: Rows, piece: Sequence[Segment]) -> NDArray[np.float32]:
    """Run the passes of a piece; return logits or values ``[N, C]``."""
    streams = [s.stream.draw(s.rows, s.passes) for s in piece]
    masks = {name: joined([masks[name] for masks in streams]) for name in streams[0]}
    rows = [np.repeat(np.arange(s.first, s.first + len(s.rows)), len(s.passes)) for s in piece]
    return engine.passes(x, joined(rows), masks)


def read(parts: Sequence[Inputs], shape: tuple[int, ...]) -> tuple[Rows, dict[int, InputError]]:
    """Read the rows of all parts; of those that are not allowed, by number, say why."""
    if all(isinstance(part, list) for part in parts):
        x = rows_at_once(list(chain.from_iterable(parts)), shape)
        if x is not None:
            return x, {}
    good: list[Rows] = []
    faults: dict[int, InputError] = {}
    for number, part in enumerate(parts):
        try:
            good.append(read_rows(part, shape) if isinstance(part, list) else part)
        except InputError as error:
            faults[number] = error
    return joined(good) if good else np.empty((0, *shape), np.float32), faults


def in_place(found: list[Found], faults: dict[int, InputError]) -> list[Found | InputError]:
    """Put the faults of some jobs between the outcomes of the others, in the jobs' order."""
    outcomes: list[Found | InputError] = [*found]
    for number, fault in sorted(faults.items()):
        outcomes.insert(number, fault)
    return outcomes


def kept(stream: MaskStream, rows: range, passes: range) -> NDArray[np.float64]:
    """Return the share of units that some masks keep, for each site."""
    return np.array([masks.mean() for masks in stream.draw(rows, passes).values()])


def as_answers(manifest: Manifest, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn a graph's outputs ``[..., C]`` into class probabilities or values."""
    return statistics.softmax(outputs) if manifest.task == "classification" else outputs


def finite(numbers: NDArray[np.floating]) -> bool:
    """Tell whether all numbers are."""
    return bool(np.logical_and.reduce(np.isfinite(numbers), axis=None))


def in_reach(manifest: Manifest, *numbers: Statistic) -> list[NDArray[np.float32]]:
    """Return numbers as float32; raise InputError if one is beyond it."""
    if not all(np.abs(some).max() <= np.finfo(np.float32).max for some in numbers):
        raise out_of_reach(manifest)
    return [some.astype(np.float32, copy=False) for some in numbers]


def out_of_reach(manifest: Manifest) -> InputError:
    """Return the error of a request whose answer would hold infinity or NaN."""
    return InputError(
        "inputs", f"values so large that what they lead to is beyond {manifest.precision}"
    )


def places(sizes: Iterable[int]) -> Iterator[slice]:
    """Say where parts of these sizes lie, one after the other."""
    end = 0
    for size in sizes:
        start, end = end, end + size
        yield slice(start, end)


def joined(parts: Sequence[NDArray[Scalar]], axis: int = 0) -> NDArray[Scalar]:
    """Put arrays one after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def most_at_once(values: int) -> int:
    """Return how many rows or row-passes one run may take that computes ``values`` for each."""
    return min(ROWS_AT_ONCE, max(1, VALUES_AT_ONCE // values))


def pieces(length: int, size: int) -> Iterator[range]:
    """Cut ``range(length)`` into ranges of at most ``size``."""
    for start in range(0, length, size):
        yield range(start, min(start + size, length))
