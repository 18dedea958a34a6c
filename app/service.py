"""Answer requests: find the model, run it in chunks of bounded memory, put the answer together.

A request is a generator of steps: it yields the runs it needs, is sent what came out, and returns
its answer. So one text serves both ways of answering: ``alone``, a step after the other in the
caller's thread, and ``Service.answer``, on an event loop, where the runs are shared with the
requests beside it.

Answers are dictionaries of arrays, named as the HTTP interface names them.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from app import batching, repository, runs, uncertainty
from app.batching import Batcher
from app.device import Device
from app.engine import Engine
from app.errors import DeviceUnavailable, InputError, StartError, UnknownModel
from app.masks import MaskStream
from app.rows import check_count, rows_from_lists
from app.runs import Draw, Inputs, Prediction, Statistics
from app.uncertainty import Entropies, Moments, Samples
from export.bundle import BundleError

Answer = dict[str, object]
Engines = dict[str, dict[int, Engine]]  # by name and version

# Numbers in the samples of a debug answer.
MAX_DEBUG_VALUES = 1_000_000
# A drawn seed is a whole number that JavaScript, too, reads without loss.
SEED_BITS = 53

log = logging.getLogger(__name__)


def load_engines(models: Path, device: Literal["auto"] | Device, threads: int = 1) -> Engines:
    """Load every bundle in the models folder; one that is refused costs a line in the log.

    Each run of a graph takes ``threads`` CPUs.

    Raises
    ------
    StartError
        If the folder cannot be read or no bundle in it can be served, or ``device`` (other than
        "auto") is not to be had.
    """
    engines: Engines = {}
    chosen: Device = "cuda" if device == "auto" else device
    for place in repository.places(models):
        title = f"{place.parent.name} version {place.name}"
        try:
            bundle = repository.read(place)
            try:
                engine = Engine(bundle, chosen, threads)
            except DeviceUnavailable as error:
                if device != "auto":
                    raise
                log.warning("serving on the CPU: %s", error)
                chosen = "cpu"
                engine = Engine(bundle, chosen, threads)
        except BundleError as error:
            log.error("refused %s: %s", title, error)
            continue
        log.info("serving %s on %s (%s)", title, engine.device, engine.provider)
        engines.setdefault(place.parent.name, {})[int(place.name)] = engine
    if not engines:
        raise StartError(f"the models folder {str(models)!r} holds no bundle that can be served")
    return engines


@dataclass(frozen=True)
class Query:
    """What a Monte Carlo request asks for."""

    inputs: list[object]
    model: str | None
    version: int | None
    passes: int
    seed: int | None
    interval: float


class Shared(NamedTuple):
    """A step: a job for a run that other requests may share."""

    batcher: Batcher[Any, Any]
    job: object
    size: int


class Aside(NamedTuple):
    """A step: work that is long, and not a run."""

    work: Callable[[], object]


# What a step is sent depends on the step, so no one type says it.
Steps = Generator[Shared | Aside, Any, Answer]
Part = Generator[Shared | Aside, Any, Any]


class Model:
    """An engine, and the runs that requests share."""

    def __init__(self, engine: Engine, worker: Executor) -> None:
        self.engine = engine
        self.manifest = engine.manifest
        self.names = self.manifest.outputs.labels
        self.classification = self.manifest.task == "classification"
        # Who answers.
        self.identity: Answer = {"model": self.manifest.name, "version": self.manifest.version}
        self.most_rows = runs.most_at_once(self.manifest.values_per_row)
        self.most_passes = runs.most_at_once(self.manifest.values_per_pass)
        predict, draw = partial(runs.predict, engine), partial(runs.draw, engine)
        # As requests bring them, since the time it takes to read rows counts.
        rows = np.zeros((1, *self.manifest.input.shape)).tolist()
        stream = MaskStream(0, self.manifest.sites)
        pace = batching.measure(
            lambda sizes: predict([rows * size for size in sizes]), self.most_rows
        )
        self.predictions = Batcher(predict, pace, self.most_rows, worker)
        pace = batching.measure(
            lambda sizes: draw(
                # Each at a level of its own, so that nothing they cost is shared.
                [
                    Draw(rows, stream, range(1), range(size), 1 / (2 + number))
                    for number, size in enumerate(sizes)
                ]
            ),
            self.most_passes,
        )
        self.draws = Batcher(draw, pace, self.most_passes, worker)

    def labels(self, largest: list[int]) -> list[str]:
        """Name the likeliest class of each row."""
        return [self.names[place] for place in largest]

    def deterministic(self, inputs: Inputs) -> Part:
        """Run eval mode; give a ``Prediction`` of all rows."""
        if len(inputs) <= self.most_rows:
            return (yield Shared(self.predictions, inputs, len(inputs)))
        outputs, largest = [], []
        x = yield from self.read(inputs)
        for rows in runs.pieces(len(x), self.most_rows):
            part = yield Shared(self.predictions, x[rows.start : rows.stop], len(rows))
            outputs.append(part.outputs)
            largest += part.largest
        return Prediction(runs.joined(outputs), largest)

    def read(self, inputs: Inputs) -> Part:
        """Give rows of more than one run as an array, so that faults are found before any run."""
        if isinstance(inputs, list):
            shape = self.manifest.input.shape
            return (yield Aside(partial(rows_from_lists, inputs, shape, len(inputs))))
        return inputs

    def sample(self, inputs: Inputs, stream: MaskStream, passes: int, level: float | None) -> Part:
        """Run train-mode passes; give each group of rows' samples, or their summary.

        A group holds as many rows as fit one run with all their passes. A row with more passes
        than that is a group of its own, run in pieces.
        """
        if len(inputs) * passes <= self.most_passes:
            draw = Draw(inputs, stream, range(len(inputs)), range(passes), level)
            return [(yield Shared(self.draws, draw, draw.size))]
        found = []
        x = yield from self.read(inputs)
        for rows in runs.pieces(len(x), max(1, self.most_passes // passes)):
            parts = []
            for some in runs.pieces(passes, self.most_passes):
                draw = Draw(x[rows.start : rows.stop], stream, rows, some, None)
                parts.append((yield Shared(self.draws, draw, draw.size)))
            found.append((yield Aside(partial(self.finish, np.concatenate(parts), level))))
        return found

    def finish(self, samples: Samples, level: float | None) -> Samples | Statistics:
        """Summarise samples, where a level says so."""
        return samples if level is None else runs.summarize(self.manifest, level, samples)


class Service:
    """The models that are served, and the limits of a request.

    Every way to ask raises ``UnknownModel`` for a name or version that is not served, and
    ``InputError`` for content that is not allowed.
    """

    def __init__(
        self, engines: Engines, *, max_rows: int, max_passes: int, max_row_passes: int
    ) -> None:
        # One thread: two runs at once would only take each other's core, and double the memory.
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run")
        self.models = {
            name: {version: Model(engine, self.worker) for version, engine in versions.items()}
            for name, versions in engines.items()
        }
        self.max_rows = max_rows
        self.max_passes = max_passes
        self.max_row_passes = max_row_passes

    def close(self) -> None:
        """End the worker thread."""
        self.worker.shutdown()

    def predict(self, inputs: list[object], model: str | None, version: int | None) -> Answer:
        """Answer with class probabilities or values ``[B, C]`` of eval mode."""
        return alone(self.predict_steps(inputs, model, version))

    def uncertainty(self, query: Query) -> Answer:
        """Answer with the statistics of train-mode passes."""
        return alone(self.uncertainty_steps(query))

    def debug(self, query: Query) -> Answer:
        """Answer as ``uncertainty`` does, and with the passes themselves."""
        return alone(self.debug_steps(query))

    async def answer(self, steps: Steps) -> Answer:
        """Answer on the event loop, beside other requests."""
        outcome: object = None
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Shared):
                    outcome = await step.batcher.submit(step.job, step.size)
                else:
                    outcome = await asyncio.to_thread(step.work)
        except StopIteration as end:
            answer: Answer = end.value
            return answer

    def predict_steps(self, inputs: list[object], name: str | None, version: int | None) -> Steps:
        """Answer with class probabilities or values ``[B, C]`` of eval mode."""
        model = self.model(name, version)
        check_count(inputs, self.max_rows)
        outputs, largest = yield from model.deterministic(inputs)
        if model.classification:
            return model.identity | {"labels": model.labels(largest), "probabilities": outputs}
        return model.identity | {"values": outputs}

    def uncertainty_steps(self, query: Query) -> Steps:
        """Answer with the statistics of train-mode passes."""
        model, stream = self.begin(query)
        summaries = yield from model.sample(query.inputs, stream, query.passes, query.interval)
        return head(model, stream, query) | describe(model, query, *join_groups(summaries))

    def debug_steps(self, query: Query) -> Steps:
        """Answer as ``uncertainty_steps`` does, and with the passes themselves."""
        model, stream = self.begin(query)
        inputs = query.inputs
        values = len(inputs) * query.passes * len(model.manifest.outputs.labels)
        if values > MAX_DEBUG_VALUES:
            raise InputError(
                "passes",
                f"rows x passes x outputs may be at most {MAX_DEBUG_VALUES} here, not {values}",
            )
        groups = yield from model.sample(inputs, stream, query.passes, None)
        summaries = yield Aside(
            lambda: [model.finish(samples, query.interval) for samples in groups]
        )
        moments, entropies = join_groups(summaries)
        point, _ = yield from model.deterministic(inputs)
        gap = uncertainty.expectation_gap(moments, point)
        kept = yield Aside(partial(kept_shares, model, stream, len(inputs), query.passes))
        return (
            head(model, stream, query)
            | describe(model, query, moments, entropies)
            | {
                "samples": np.ascontiguousarray(np.concatenate(groups, axis=1)),
                "deterministic": point,
                "expectation_gap": None if query.passes == 1 else gap,
                "sites": [
                    {"name": site.name, "p": site.p, "scaling": site.scaling, "kept": share}
                    for site, share in zip(model.manifest.sites, kept, strict=True)
                ],
            }
        )

    def state(self) -> Answer:
        """Say which versions of which models are served, and on what."""
        engines = [model.engine for versions in self.models.values() for model in versions.values()]
        return {
            "device": engines[0].device,
            "provider": engines[0].provider,
            "models": {name: sorted(versions) for name, versions in self.models.items()},
        }

    def model(self, name: str | None, version: int | None) -> Model:
        """Find a model: the only one where no name is given, the newest of its versions."""
        if name is None:
            if len(self.models) > 1:
                raise InputError("model", f"is needed, one of: {', '.join(self.models)}")
            (name,) = self.models
        if name not in self.models:
            raise UnknownModel(f"no model {name[:100]!r}; served are: {', '.join(self.models)}")
        versions = self.models[name]
        if version is None:
            version = max(versions)
        if version not in versions:
            served = ", ".join(map(str, versions))
            raise UnknownModel(f"no version {version} of model {name}; served are: {served}")
        return versions[version]

    def begin(self, query: Query) -> tuple[Model, MaskStream]:
        """Check a query; return the model and the masks it is about."""
        model = self.model(query.model, query.version)
        check_count(query.inputs, self.max_rows)
        self.check_passes(len(query.inputs), query.passes)
        seed = secrets.randbits(SEED_BITS) if query.seed is None else query.seed
        return model, MaskStream(seed, model.manifest.sites)

    def check_passes(self, rows: int, passes: int) -> None:
        """Raise InputError if a request asks for too much."""
        if passes > self.max_passes:
            raise InputError("passes", f"must be at most {self.max_passes}, not {passes}")
        if rows * passes > self.max_row_passes:
            raise InputError(
                "passes",
                f"rows x passes may be at most {self.max_row_passes}, not {rows} x {passes}",
            )


def alone(steps: Steps) -> Answer:
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
                outcome = step.work()
    except StopIteration as end:
        answer: Answer = end.value
        return answer


def head(model: Model, stream: MaskStream, query: Query) -> Answer:
    """Say who answers, and what it takes to ask again."""
    return model.identity | {"passes": query.passes, "seed": stream.seed}


def kept_shares(model: Model, stream: MaskStream, rows: int, passes: int) -> list[float]:
    """Return the share of units that the masks of a request kept at each site."""
    kept = np.zeros(len(model.manifest.sites))
    for row in range(rows):
        for some in runs.pieces(passes, model.most_passes):
            kept += runs.kept(stream, range(row, row + 1), some) * len(some)
    shares: list[float] = (kept / (rows * passes)).tolist()
    return shares


def join_groups(groups: Sequence[Statistics]) -> Statistics:
    """Put the summaries of groups of rows together."""
    moments = uncertainty.join([moments for moments, _ in groups])
    entropies = [entropies for _, entropies in groups if entropies is not None]
    return moments, uncertainty.join(entropies) if entropies else None


def describe(model: Model, query: Query, m: Moments, e: Entropies | None) -> Answer:
    """Name what the passes say."""
    answer: Answer = {"labels": model.labels(m.mean.argmax(axis=1).tolist())} if e else {}
    answer |= {
        "mean": m.mean,
        "std": m.std,
        "standard_error": None if query.passes == 1 else m.standard_error,
        "interval": {"level": query.interval, "lower": m.lower, "upper": m.upper},
        # Until a tolerance can be asked for, there is nothing to converge to.
        "converged": None,
    }
    noise_std = model.manifest.noise_std or ()
    return answer | vars(e if e else uncertainty.spreads(m, noise_std))
