"""Answer requests: find the model, run it in pieces of bounded size, put the answer together.

A request is a generator of steps: it says how much it asks for, yields the runs it needs, is sent
what came out, and returns its answer. So one text serves both ways of answering: ``alone``, a step
after the other in the caller's thread, and ``Service.answer``, on an event loop, where the runs are
shared with the requests beside it and the queue is bounded.

Answers are dictionaries of arrays, named as the HTTP interface names them.
"""

import math
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dropserve.app.errors import InputError, Overloaded
from dropserve.app.inference import batch
from dropserve.app.inference.batch import Inputs, Statistics, join_groups
from dropserve.app.inference.executor import Turns
from dropserve.app.inference.registry import Engines, Models
from dropserve.app.inference.rows import check_count
from dropserve.app.inference.runner import Aside, Model, Shared
from dropserve.app.observability.record import Call
from dropserve.app.uncertainty import conformal, masks
from dropserve.app.uncertainty import statistics as uncertainty
from dropserve.app.uncertainty.masks import Kind, MaskStream
from dropserve.app.uncertainty.statistics import Samples

Answer = dict[str, object]

# Numbers in the samples of an answer that is made of all of them at once: a debug answer, and one
# of which it is not known how many passes it takes.
MAX_KEPT_VALUES = 1_000_000
# A drawn seed is a whole number that JavaScript, too, reads without loss.
SEED_BITS = 53
# Row-passes of all requests that are being answered.
QUEUE_ROWS = 4_000_000
# What a client is told to wait at most before it tries again.
MAX_RETRY_SECONDS = 60


@dataclass(frozen=True)
class Query:
    """What a Monte Carlo request asks for."""

    inputs: Inputs
    model: str | None
    version: int | None
    passes: int
    seed: int | None
    interval: float
    masks: Kind = "independent"
    tolerance: float | None = None
    coverage: float | None = None


class Admit(NamedTuple):
    """A step: what a request asks for, before any of it is done."""

    model: Model
    rows: int
    passes: int  # 0 in eval mode


class Took(NamedTuple):
    """A step: how many passes it took."""

    passes: int


# What a step is sent depends on the step, so no one type says it.
Answered = TypeVar("Answered")
Steps = Generator[Shared | Aside | Admit | Took, Any, Answered]


class Queue:
    """Holds something of all requests that are being answered, so much and no more.

    Parameters
    ----------
    most
        How much.
    what
        Of what, for who is refused.
    """

    def __init__(self, most: int, what: str = "rows x passes") -> None:
        self.most = most
        self.what = what
        self.held = 0
        # How long what is held should take.
        self.seconds = 0.0

    def enter(self, size: int, seconds: float) -> None:
        """Take what a request asks for, which should take so many ``seconds``.

        A request larger than the queue is taken when there is no other: refused, it would be tried
        again for ever.

        Raises
        ------
        Overloaded
            If it is too much.
        """
        self.check(size)
        self.held += size
        self.seconds += seconds

    def check(self, size: int = 1) -> None:
        """Raise Overloaded if there is no room for a request, whose body may not be read yet."""
        if self.held and self.held + size > self.most:
            raise Overloaded(
                f"the queue is full: {self.what} of all requests may be at most {self.most}",
                min(MAX_RETRY_SECONDS, max(1, math.ceil(self.seconds))),
            )

    def leave(self, size: int, seconds: float) -> None:
        """Let go of what a request asked for."""
        self.held -= size
        self.seconds -= seconds


class Service:
    """The models that are served, and the limits of a request.

    Every way to ask raises ``UnknownModel`` for a name or version that is not served, and
    ``InputError`` for content that is not allowed.
    """

    def __init__(
        self,
        engines: Engines,
        *,
        max_rows: int,
        max_passes: int,
        max_row_passes: int,
        queue_rows: int = QUEUE_ROWS,
        folder: Path | None = None,
    ) -> None:
        self.turns = Turns()
        self.models = Models(engines, self.turns, folder)
        self.queue = Queue(queue_rows)
        self.max_rows = max_rows
        self.max_passes = max_passes
        self.max_row_passes = max_row_passes

    def close(self) -> None:
        """End the thread of long runs."""
        self.turns.close()

    def predict(self, inputs: Inputs, model: str | None, version: int | None) -> Answer:
        """Answer with class probabilities or values ``[B, C]`` of eval mode."""
        return alone(self.predict_steps(inputs, model, version))

    def uncertainty(self, query: Query) -> Answer:
        """Answer with the statistics of train-mode passes."""
        return alone(self.uncertainty_steps(query))

    def debug(self, query: Query) -> Answer:
        """Answer as ``uncertainty`` does, and with the passes themselves."""
        return alone(self.debug_steps(query))

    async def answer(self, steps: Steps[Answered], call: Call) -> Answered:
        """Answer on the event loop, beside other requests; ``call`` takes note of it.

        Raises
        ------
        Overloaded
            If the queue is full.
        DeadlineExceeded
            If the time of ``call`` is up before the work is done.
        """
        outcome: object = None
        held = (0, 0.0)
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Shared):
                    outcome = await step.batcher.submit(step.job, step.size, call)
                elif isinstance(step, Aside):
                    call.check_time(time.monotonic())
                    outcome = await self.turns.submit(step.work, long=True)
                elif isinstance(step, Took):
                    call.passes = step.passes
                else:
                    model, call.rows, call.passes = step
                    call.model, call.version = model.manifest.name, model.manifest.version
                    size = call.rows * max(1, call.passes)
                    pace = (model.draws if call.passes else model.predictions).pace
                    self.queue.enter(size, size * pace.unit)
                    held = (size, size * pace.unit)
                    outcome = None
        except StopIteration as end:
            answer: Answered = end.value
            return answer
        finally:
            self.queue.leave(*held)

    def predict_steps(self, inputs: Inputs, name: str | None, version: int | None) -> Steps[Answer]:
        """Answer with class probabilities or values ``[B, C]`` of eval mode."""
        model = self.models.find(name, version)
        check_count(inputs, self.max_rows)
        yield Admit(model, len(inputs), 0)
        outputs, largest = yield from model.deterministic(inputs)
        if model.classification:
            return model.identity | {"labels": model.labels(largest), "probabilities": outputs}
        return model.identity | {"values": outputs}

    def uncertainty_steps(self, query: Query) -> Steps[Answer]:
        """Answer with the statistics of train-mode passes."""
        model, stream = yield from self.begin(query)
        if query.tolerance is None:
            passes = range(query.passes)
            groups = yield from model.sample(query.inputs, stream, passes, query.interval)
            return describe(model, query, stream, query.passes, join_groups(groups))
        samples, statistics = yield from sampled(model, query, stream)
        return describe(model, query, stream, len(samples), statistics)

    def debug_steps(self, query: Query) -> Steps[Answer]:
        """Answer as ``uncertainty_steps`` does, and with the passes themselves."""
        model, stream = yield from self.begin(query)
        samples, statistics = yield from sampled(model, query, stream)
        passes, rows = samples.shape[:2]
        point, _ = yield from model.deterministic(query.inputs)
        gap = uncertainty.expectation_gap(statistics.moments, point)
        kept = yield Aside(partial(kept_shares, model, stream, rows, passes))
        return describe(model, query, stream, passes, statistics) | {
            "samples": np.ascontiguousarray(batch.values(model.manifest, samples)),
            "deterministic": point,
            "expectation_gap": None if passes == 1 else gap,
            "sites": [
                {"name": site.name, "p": site.p, "scaling": site.scaling, "kept": share}
                for site, share in zip(model.manifest.sites, kept, strict=True)
            ],
        }

    def masks_steps(
        self, name: str, version: int, passes: int, seed: int, kind: Kind
    ) -> Steps[Answer]:
        """Answer with the masks of the first pass, of so many, of the first row."""
        model = self.models.find(name, version)
        self.check_passes(1, passes)
        yield Admit(model, 1, 1)
        stream = masks.stream(kind, seed, model.manifest.sites, passes)
        found = stream.draw(range(1), range(1))
        return model.identity | {
            "sites": [
                {"name": site.name, "mask": found[site.mask_input][0].view(np.uint8)}
                for site in model.manifest.sites
            ],
        }

    def state(self) -> Answer:
        """Say which versions of which models are served, and on what."""
        return {
            "device": self.models.device,
            "provider": self.models.provider,
            "models": {name: list(versions) for name, versions in self.models.served.items()},
        }

    def begin(self, query: Query) -> Generator[Admit, Any, tuple[Model, MaskStream]]:
        """Check a query; give the model and the masks it is about."""
        model = self.models.find(query.model, query.version)
        check_count(query.inputs, self.max_rows)
        self.check_passes(len(query.inputs), query.passes)
        if query.coverage is not None:
            conformal.check(model.manifest, query.coverage)
        yield Admit(model, len(query.inputs), query.passes)
        seed = secrets.randbits(SEED_BITS) if query.seed is None else query.seed
        return model, masks.stream(query.masks, seed, model.manifest.sites, query.passes)

    def check_passes(self, rows: int, passes: int) -> None:
        """Raise InputError if a request asks for too much."""
        if passes > self.max_passes:
            raise InputError("passes", f"must be at most {self.max_passes}, not {passes}")
        if rows * passes > self.max_row_passes:
            raise InputError(
                "passes",
                f"rows x passes may be at most {self.max_row_passes}, not {rows} x {passes}",
            )


def alone(steps: Steps[Answer]) -> Answer:
    """Answer in the caller's thread; every run is the request's own."""
    outcome: object = None
    try:
        while True:
            step = steps.send(outcome)
            if isinstance(step, Shared):
                (outcome,) = step.batcher.run([step.job])
                if isinstance(outcome, Exception):
                    raise outcome
            else:
                outcome = step.work() if isinstance(step, Aside) else None
    except StopIteration as end:
        answer: Answer = end.value
        return answer


def sampled(
    model: Model, query: Query, stream: MaskStream
) -> Generator[Shared | Aside | Took, Any, tuple[Samples, Statistics]]:
    """Run all passes of a query at once; give their samples, and what they say.

    Raises
    ------
    InputError
        If that would be too many numbers.
    """
    values = len(query.inputs) * query.passes * len(model.names)
    if values > MAX_KEPT_VALUES:
        why = "here" if query.tolerance is None else "with a tolerance"
        raise InputError(
            "passes",
            f"rows x passes x outputs may be at most {MAX_KEPT_VALUES} {why}, not {values}",
        )
    samples = yield from model.sample_until(query.inputs, stream, query.passes, query.tolerance)
    yield Took(len(samples))
    statistics = yield from model.finish(samples, query.interval, stream)
    return samples, statistics


def kept_shares(model: Model, stream: MaskStream, rows: int, passes: int) -> list[float]:
    """Return the share of units that the masks of a request kept at each site."""
    kept = np.zeros(len(model.manifest.sites))
    for row in range(rows):
        for some in batch.pieces(passes, model.piece_of_passes):
            kept += batch.kept(stream, range(row, row + 1), some) * len(some)
    shares: list[float] = (kept / (rows * passes)).tolist()
    return shares


def describe(
    model: Model, query: Query, stream: MaskStream, passes: int, statistics: Statistics
) -> Answer:
    """Name who answers, what it takes to ask again, and what the passes say."""
    moments, interval, parts = statistics
    answer: Answer = model.identity | {"passes": passes, "seed": stream.seed}
    if model.classification:
        answer["labels"] = model.labels(moments.mean.argmax(axis=1).tolist())
    answer |= {
        "mean": moments.mean,
        "std": moments.std,
        "standard_error": None if passes == 1 else moments.standard_error,
        "interval": {"level": query.interval, "lower": interval.lower, "upper": interval.upper},
        "converged": None
        if query.tolerance is None
        # As Python's numbers, since no float32 is as large as a tolerance may be. That of a single
        # pass is not known: no number, and so not within any.
        else float(moments.standard_error.max()) <= query.tolerance,
    }
    answer |= vars(parts)
    if query.coverage is not None:
        answer |= conformal.describe(model.manifest, query.coverage, statistics)
    return answer
