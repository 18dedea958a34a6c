"""Answer requests: find the model, run it in chunks of bounded memory, put the answer together.

Answers are dictionaries of arrays, named as the HTTP interface names them.
"""

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app import repository, uncertainty
from app.device import Device
from app.engine import Engine
from app.errors import DeviceUnavailable, InputError, StartError, UnknownModel
from app.masks import MaskStream
from app.rows import rows_from_lists
from export.bundle import BundleError

Answer = dict[str, object]
Rows = NDArray[np.float32]
Engines = dict[str, dict[int, Engine]]  # by name and version

# What bounds the memory of a request: rows or row-passes of one run, and numbers it computes.
ROWS_AT_ONCE = 4096
VALUES_AT_ONCE = 2**24
# Numbers in the samples of a debug answer.
MAX_DEBUG_VALUES = 1_000_000
# A drawn seed is a whole number that JavaScript, too, reads without loss.
SEED_BITS = 53

log = logging.getLogger(__name__)


def load_engines(models: Path, device: Literal["auto"] | Device) -> Engines:
    """Load every bundle in the models folder; one that is refused costs a line in the log.

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
                engine = Engine(bundle, chosen)
            except DeviceUnavailable as error:
                if device != "auto":
                    raise
                log.warning("serving on the CPU: %s", error)
                chosen = "cpu"
                engine = Engine(bundle, chosen)
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


class Service:
    """The models that are served, and the limits of a request.

    Every method that takes a request raises ``UnknownModel`` for a name or version that is not
    served, and ``InputError`` for content that is not allowed.
    """

    def __init__(
        self, engines: Engines, *, max_rows: int, max_passes: int, max_row_passes: int
    ) -> None:
        self.engines = engines
        self.max_rows = max_rows
        self.max_passes = max_passes
        self.max_row_passes = max_row_passes

    def engine(self, model: str | None, version: int | None) -> Engine:
        """Find a model: the only one where no name is given, the newest of its versions."""
        if model is None:
            if len(self.engines) > 1:
                raise InputError("model", f"is needed, one of: {', '.join(self.engines)}")
            (model,) = self.engines
        if model not in self.engines:
            raise UnknownModel(f"no model {model[:100]!r}; served are: {', '.join(self.engines)}")
        versions = self.engines[model]
        if version is None:
            version = max(versions)
        if version not in versions:
            served = ", ".join(map(str, versions))
            raise UnknownModel(f"no version {version} of model {model}; served are: {served}")
        return versions[version]

    def predict(self, inputs: list[object], model: str | None, version: int | None) -> Answer:
        """Answer with class probabilities or values ``[B, C]`` of eval mode."""
        engine = self.engine(model, version)
        output = deterministic(engine, self.rows(engine, inputs))
        if engine.manifest.task == "regression":
            return identity(engine) | {"values": output}
        return identity(engine) | {"labels": labels(engine, output), "probabilities": output}

    def uncertainty(self, query: Query) -> Answer:
        """Answer with the statistics of train-mode passes."""
        engine, x, stream = self.begin(query)
        answer, _ = summarize(engine, sample(engine, x, stream, query.passes), query.interval)
        return head(engine, stream, query) | answer

    def debug(self, query: Query) -> Answer:
        """Answer as ``uncertainty`` does, and with the passes themselves."""
        engine, x, stream = self.begin(query)
        values = len(x) * query.passes * len(engine.manifest.outputs.labels)
        if values > MAX_DEBUG_VALUES:
            raise InputError(
                "passes",
                f"rows x passes x outputs may be at most {MAX_DEBUG_VALUES} here, not {values}",
            )
        groups = list(sample(engine, x, stream, query.passes))
        answer, moments = summarize(engine, iter(groups), query.interval)
        point = deterministic(engine, x)
        gap = uncertainty.expectation_gap(moments, point)
        kept = kept_shares(engine, stream, len(x), query.passes)
        return (
            head(engine, stream, query)
            | answer
            | {
                "samples": np.concatenate(groups, axis=1),
                "deterministic": point,
                "expectation_gap": None if query.passes == 1 else gap,
                "sites": [
                    {"name": site.name, "p": site.p, "scaling": site.scaling, "kept": share}
                    for site, share in zip(engine.manifest.sites, kept, strict=True)
                ],
            }
        )

    def state(self) -> Answer:
        """Say which versions of which models are served, and on what."""
        engines = [engine for versions in self.engines.values() for engine in versions.values()]
        return {
            "device": engines[0].device,
            "provider": engines[0].provider,
            "models": {name: sorted(versions) for name, versions in self.engines.items()},
        }

    def begin(self, query: Query) -> tuple[Engine, Rows, MaskStream]:
        """Check a query; return the model, the rows and the masks it is about."""
        engine = self.engine(query.model, query.version)
        x = self.rows(engine, query.inputs)
        self.check_passes(len(x), query.passes)
        seed = secrets.randbits(SEED_BITS) if query.seed is None else query.seed
        return engine, x, MaskStream(seed, engine.manifest.sites)

    def rows(self, engine: Engine, inputs: list[object]) -> Rows:
        """Return the request's rows ``[B, *shape]``."""
        return rows_from_lists(inputs, engine.manifest.input.shape, self.max_rows)

    def check_passes(self, rows: int, passes: int) -> None:
        """Raise InputError if a request asks for too much."""
        if passes > self.max_passes:
            raise InputError("passes", f"must be at most {self.max_passes}, not {passes}")
        if rows * passes > self.max_row_passes:
            raise InputError(
                "passes",
                f"rows x passes may be at most {self.max_row_passes}, not {rows} x {passes}",
            )


def identity(engine: Engine) -> Answer:
    """Say who answers."""
    return {"model": engine.manifest.name, "version": engine.manifest.version}


def head(engine: Engine, stream: MaskStream, query: Query) -> Answer:
    """Say who answers, and what it takes to ask again."""
    return identity(engine) | {"passes": query.passes, "seed": stream.seed}


def labels(engine: Engine, probabilities: NDArray[np.floating]) -> list[str]:
    """Name the likeliest class of each row."""
    names = engine.manifest.outputs.labels
    return [names[place] for place in probabilities.argmax(axis=1)]


def answers(engine: Engine, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn a graph's outputs ``[..., C]`` into class probabilities or values."""
    check_finite(outputs)
    return uncertainty.softmax(outputs) if engine.manifest.task == "classification" else outputs


def check_finite(numbers: NDArray[np.floating]) -> None:
    """Raise InputError where an answer would hold infinity or NaN."""
    if not np.isfinite(numbers).all():
        raise InputError("inputs", "values so large that what they lead to is beyond float32")


def deterministic(engine: Engine, x: Rows) -> NDArray[np.float32]:
    """Run eval mode: ``[B, C]``."""
    at_once = rows_at_once(engine.manifest.values_per_row)
    parts = [engine.predict(x[r.start : r.stop]) for r in pieces(len(x), at_once)]
    return answers(engine, np.concatenate(parts))


def sample(
    engine: Engine, x: Rows, stream: MaskStream, passes: int
) -> Iterator[NDArray[np.float32]]:
    """Run train-mode passes, a group of rows after the other: ``[T, b, C]`` each.

    A group holds as many rows as fit one run with all their passes; a row with more passes than
    that is a group of its own, run in pieces.
    """
    at_once = rows_at_once(engine.manifest.values_per_pass)
    for rows in pieces(len(x), max(1, at_once // passes)):
        group = x[rows.start : rows.stop]
        parts = []
        for some in pieces(passes, at_once):
            places = np.repeat(np.arange(len(rows)), len(some))
            outputs = engine.passes(group, places, stream.draw(rows, some))  # [N, C]
            parts.append(outputs.reshape(len(rows), len(some), -1))
        outputs = np.ascontiguousarray(np.concatenate(parts, axis=1).swapaxes(0, 1))
        yield answers(engine, outputs)


def rows_at_once(values: int) -> int:
    """Return how many rows or row-passes one run may take that computes ``values`` for each."""
    return min(ROWS_AT_ONCE, max(1, VALUES_AT_ONCE // values))


def kept_shares(engine: Engine, stream: MaskStream, rows: int, passes: int) -> list[float]:
    """Return the share of units that the masks of a request kept at each site."""
    kept = np.zeros(len(engine.manifest.sites))
    for row in range(rows):
        for some in pieces(passes, rows_at_once(engine.manifest.values_per_pass)):
            masks = stream.draw(range(row, row + 1), some)
            kept += [masks[site.mask_input].mean() * len(some) for site in engine.manifest.sites]
    shares: list[float] = (kept / (rows * passes)).tolist()
    return shares


def summarize(
    engine: Engine, groups: Iterator[NDArray[np.float32]], level: float
) -> tuple[Answer, uncertainty.Moments]:
    """Put together what the samples ``[T, b, C]`` of all groups of rows say."""
    classification = engine.manifest.task == "classification"
    moment_parts, entropy_parts = [], []
    passes = 0
    for samples in groups:
        passes = len(samples)
        moment_parts.append(uncertainty.moments(samples, level))
        if classification:
            entropy_parts.append(uncertainty.entropies(samples))
    m = uncertainty.join(moment_parts)
    # Passes that are finite can lie further apart than float32 reaches.
    check_finite(m.std)
    answer: Answer = {"labels": labels(engine, m.mean)} if classification else {}
    answer |= {
        "mean": m.mean,
        "std": m.std,
        "standard_error": None if passes == 1 else m.standard_error,
        "interval": {"level": level, "lower": m.lower, "upper": m.upper},
        # Until a tolerance can be asked for, there is nothing to converge to.
        "converged": None,
    }
    if classification:
        return answer | vars(uncertainty.join(entropy_parts)), m
    noise_std = engine.manifest.noise_std or ()
    return answer | vars(uncertainty.spreads(m, noise_std)), m


def pieces(length: int, size: int) -> Iterator[range]:
    """Cut ``range(length)`` into ranges of at most ``size``."""
    for start in range(0, length, size):
        yield range(start, min(start + size, length))
