"""The served models, by name and version, which can be loaded, replaced and unloaded at any time.

They come from the models folder, at the start and later. A new version is read, checked, tried on
its own examples and only then put in place, between two requests. A refused version changes
nothing. A request keeps the model it has found until its response is out.
"""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import onnxruntime

from dropserve.app.bundles import loader
from dropserve.app.errors import DeviceUnavailable, InputError, LoadError, StartError, UnknownModel
from dropserve.app.inference import batch, loading, memory
from dropserve.app.inference.batch import PassesJob
from dropserve.app.inference.batcher import Paces
from dropserve.app.inference.engine import Engine, refusing, run_options
from dropserve.app.inference.executor import Executor
from dropserve.app.inference.providers import PROVIDERS, Device
from dropserve.app.inference.runner import ModelRunner, passes_pace, predict_pace
from dropserve.app.observability.metrics import ModelInfo
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.export.bundle import PREDICT, STOCHASTIC, BundleError, Manifest

# Passes of each example when a bundle is tried.
TRIAL_PASSES = 10
# Outcomes of loading a version, as counted.
LOADED, REFUSED = "loaded", "refused"

Found = TypeVar("Found")
Result = TypeVar("Result")
Versions = TypeVar("Versions")

log = logging.getLogger(__name__)


class Engines(dict[str, dict[int, Engine]]):
    """Engines by name and version, their device, and why other versions were refused.

    ``load_seconds`` is the longest time that loading a version may take; None: any.
    """

    def __init__(self, device: Device, threads: int, load_seconds: float | None = None) -> None:
        super().__init__()
        self.device = device
        self.threads = threads
        self.load_seconds = load_seconds
        self.refused: dict[tuple[str, int], str] = {}

    def state(self) -> "Served":
        """Return what is served with these engines."""
        versions = {
            name: {version: digest(engine.manifest) for version, engine in versions.items()}
            for name, versions in self.items()
        }
        return Served(versions, frozenset(), dict(self.refused))


@dataclass(frozen=True)
class Served:
    """What a process serves, so that another can serve the same.

    Parameters
    ----------
    versions
        Hash of the manifest of each served version, by name and version.
    unloaded
        Names of unloaded models.
    refused
        Why versions were refused. Other processes may have found other reasons.
    """

    versions: dict[str, dict[int, str]]
    unloaded: frozenset[str] = frozenset()
    refused: dict[tuple[str, int], str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        served = (
            f"{name} {version} ({sha256[:8]})"
            for name, versions in sorted(self.versions.items())
            for version, sha256 in sorted(versions.items())
        )
        return ", ".join(served) or "no model"


def digest(manifest: Manifest) -> str:
    """Return a hash that tells a bundle from others of its name and version."""
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()


def load_engine(
    place: Path, device: Device, threads: int, options: onnxruntime.RunOptions
) -> Engine:
    """Read the bundle at ``place``, and try it on its own examples.

    Setting ``options.terminate`` ends the trial.

    Raises
    ------
    BundleError
        If it cannot be served.
    DeviceUnavailable
        If the device is not available.
    """
    with refusing("it does not load"):
        engine = Engine(loader.read_bundle(place), device, threads, options)
        inputs = engine.examples.inputs
        stream = MaskStream(0, engine.manifest.sites)
        trial = PassesJob(inputs, stream, range(len(inputs)), range(TRIAL_PASSES), 0.5)
    with refusing(f"{PREDICT} does not run"):
        check_outcome(PREDICT, engine, *batch.predict(engine, [inputs]))
        predict = predict_pace(engine)
    with refusing(f"{STOCHASTIC} does not run"):
        check_outcome(STOCHASTIC, engine, *batch.run_passes(engine, [trial]))
        passes = passes_pace(engine)
    engine.paces = Paces(predict, passes)
    return engine


def check_outcome(file: str, engine: Engine, outcome: object) -> None:
    """Raise BundleError if the bundle's own examples have no finite answer."""
    if isinstance(outcome, InputError):
        precision = engine.manifest.precision
        raise BundleError(
            f"{file} answers the bundle's own examples with NaN, or beyond {precision}"
        )


class VersionStatus(NamedTuple):
    """Status of a version in the models folder."""

    name: str
    version: int
    served: bool
    reason: str  # why not, if known
    loading: bool = False  # whether it is about to be loaded


class Registry:
    """The served models, by name and version.

    Every change is one step on the event loop, so a request finds the models either as before it or
    as after it.

    Parameters
    ----------
    engines
        The models to start with.
    executor
        Where their long runs are made.
    folder
        The models folder; None: no more models can be loaded.
    """

    def __init__(self, engines: Engines, executor: Executor, folder: Path | None = None) -> None:
        self.executor = executor
        self.folder = folder
        self.device = engines.device
        self.provider = PROVIDERS[engines.device][0]
        self.threads = engines.threads
        self.load_seconds = engines.load_seconds
        self.served = {
            name: {
                version: ModelRunner(engine, executor)
                for version, engine in sorted(versions.items())
            }
            for name, versions in engines.items()
        }
        self.unloaded: set[str] = set()
        # Reason for the refusal of a version when it was last tried.
        self.refused = engines.refused
        # Number of versions loaded or refused, by name and outcome.
        self.loads: Counter[tuple[str, str]] = Counter()
        for name, versions in engines.items():
            self.loads[name, LOADED] += len(versions)
        for name, _ in engines.refused:
            self.loads[name, REFUSED] += 1
        self.changing = asyncio.Lock()

    def find(self, name: str | None, version: int | None) -> ModelRunner:
        """Find a model; see ``find_version``."""
        return find_version(self.served, name, version)

    def versions(self, name: str) -> dict[int, ModelRunner]:
        """Return the versions of a model, ascending; raise UnknownModel if it is not served."""
        return find_versions(self.served, name)

    def state(self) -> Served:
        """Return the served and the unloaded models."""
        versions = {
            name: {version: digest(runner.manifest) for version, runner in versions.items()}
            for name, versions in self.served.items()
        }
        return Served(versions, frozenset(self.unloaded), dict(self.refused))

    def close(self) -> None:
        """End the runs that are under way; nobody waits for their outcomes any more."""
        for versions in self.served.values():
            for runner in versions.values():
                runner.engine.options.terminate = True

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Make changes one at a time, and give back the memory that each of them took."""
        async with self.changing:
            try:
                yield
            finally:
                await asyncio.to_thread(memory.trim)

    async def index(self) -> list[VersionStatus]:
        """Return the status of every version that is served or in the models folder."""
        listed = await self._list_folder()
        found = {name: set(places) for name, places in listed.items()}
        for name, versions in self.served.items():
            found.setdefault(name, set()).update(versions)
        return [
            VersionStatus(
                name,
                version,
                version in self.served.get(name, ()),
                self.refused.get((name, version), ""),
            )
            for name, versions in sorted(found.items())
            for version in sorted(versions)
        ]

    async def load(self, name: str) -> None:
        """Serve the versions of a model that the models folder holds, except those in ``faults``.

        Raises
        ------
        UnknownModel
            If the folder does not hold the model.
        LoadError
            If the folder cannot be read.
        """
        async with self.change():
            listed = await self._list_folder()
            if name not in listed:
                there = ", ".join(listed) or "none"
                raise UnknownModel(f"no model {name[:100]!r} to load; there are: {there}")
            self.unloaded.discard(name)
            await self._refresh(name, listed[name])

    async def unload(self, name: str) -> None:
        """Stop serving a model; requests that have found it are answered.

        Raises
        ------
        UnknownModel
            If it is not served.
        """
        async with self.change():
            self.versions(name)
            del self.served[name]
            self.unloaded.add(name)
            log.info("unloaded %s", name)

    async def reload(self) -> None:
        """Serve the present content of the models folder, except unloaded models.

        Raises
        ------
        LoadError
            If a version is refused, or if the folder holds no bundle; then nothing is unloaded.
        """
        async with self.change():
            listed = await self._list_folder()
            if not listed:
                raise LoadError(f"the models folder {str(self.folder)!r} holds no bundle")
            for name in self.served.keys() - listed.keys():
                del self.served[name]
                log.info("unloaded %s, which is gone", name)
            names = sorted(listed.keys() - self.unloaded)
            for name in names:
                await self._refresh(name, listed[name])
            faults = [fault for name in names for fault in self.faults(name)]
            if faults:
                raise LoadError("; ".join(faults))

    async def follow(self, state: Served) -> None:
        """Serve what another process serves, as far as the models folder still holds it."""
        async with self.change():
            for name in self.served.keys() - state.versions.keys():
                del self.served[name]
                log.info("unloaded %s", name)
            for name, digests in state.versions.items():
                before = self.served.get(name, {})
                versions: dict[int, ModelRunner] = {}
                for version, wanted in sorted(digests.items()):
                    runner = before.get(version)
                    if self.folder and not (runner and digest(runner.manifest) == wanted):
                        place = self.folder / name / str(version)
                        runner = await self._try(name, version, place, runner)
                    if runner:
                        versions[version] = runner
                if versions:
                    self.served[name] = versions
            self.unloaded = set(state.unloaded)
            self.refused = dict(state.refused)

    def infos(self) -> Iterator[ModelInfo]:
        """Iterate over the served versions and where they run."""
        for name, versions in self.served.items():
            for version, runner in versions.items():
                engine = runner.engine
                yield ModelInfo(name, str(version), engine.device, engine.provider)

    def batch_sizes(self) -> Iterator[tuple[tuple[str, str, str], int, int]]:
        """Iterate over (model, version, graph), size of a run, and number of such runs."""
        for name, versions in self.served.items():
            for version, runner in versions.items():
                for graph, sizes in (
                    ("predict", runner.predictions.sizes),
                    ("predict", runner.long_predictions.sizes),
                    ("stochastic", runner.passes.sizes),
                    ("stochastic", runner.long_passes.sizes),
                ):
                    for size, number in sizes.copy().items():
                        yield (name, str(version), graph), size, number

    async def _list_folder(self) -> dict[str, dict[int, Path]]:
        """Return the folder of each version, by name."""
        listed: dict[str, dict[int, Path]] = {}
        if (folder := self.folder) is not None:
            try:
                for place in await self._within(lambda: list(loader.bundle_folders(folder))):
                    listed.setdefault(place.parent.name, {})[int(place.name)] = place
            except (StartError, BundleError) as error:
                raise LoadError(str(error)) from None
        return listed

    async def _within(
        self, work: Callable[[], Result], options: onnxruntime.RunOptions | None = None
    ) -> Result:
        """Do work on the models folder, off the event loop; see ``loading.within``."""
        waiting = loading.in_thread(partial(loading.within, self.load_seconds, work, options))
        return await asyncio.wrap_future(waiting)

    async def _refresh(self, name: str, places: dict[int, Path]) -> None:
        """Load versions of a model, and serve them instead of the present ones.

        A refused version leaves an older bundle of the same number in place.
        """
        served = self.served.get(name, {})
        versions: dict[int, ModelRunner] = {}
        for gone in [key for key in self.refused if key[0] == name and key[1] not in places]:
            del self.refused[gone]
        for version, place in sorted(places.items()):
            runner = await self._try(name, version, place, served.get(version))
            if runner:
                versions[version] = runner
        if versions:
            self.served[name] = versions

    async def _try(
        self, name: str, version: int, place: Path, before: ModelRunner | None
    ) -> ModelRunner | None:
        """Load a version; return ``before``, which is served now, if it is refused or the same."""
        try:
            options = run_options()
            load = partial(self._load_version, place, before, options)
            runner = await self._within(load, options)
        except (BundleError, DeviceUnavailable) as error:
            log.error("refused %s version %d: %s", name, version, error)
            self.refused[name, version] = str(error)
            self.loads[name, REFUSED] += 1
            return before
        self.refused.pop((name, version), None)
        if runner is not before:
            self.loads[name, LOADED] += 1
            log.info("serving %s version %d", name, version)
        return runner

    def faults(self, name: str) -> Iterator[str]:
        """Describe the versions of a model that were refused when last tried."""
        for (of, version), reason in sorted(self.refused.items()):
            if of == name:
                yield f"refused {name} version {version}: {reason}"

    def _load_version(
        self, place: Path, before: ModelRunner | None, options: onnxruntime.RunOptions
    ) -> ModelRunner:
        """Load the bundle at ``place``, unless it is the one being served."""
        with refusing("it does not load"):
            if before and loader.read_manifest(place) == before.manifest:
                return before
        engine = load_engine(place, self.device, self.threads, options)
        return ModelRunner(engine, self.executor)


def find_version(
    served: Mapping[str, Mapping[int, Found]], name: str | None, version: int | None
) -> Found:
    """Find a model: without a name the only one, without a version the newest.

    Raises
    ------
    UnknownModel, InputError
        If there is no such model; if a name is needed and missing.
    """
    if name is None:
        if len(served) > 1:
            raise InputError("model", f"is needed, one of: {', '.join(sorted(served))}")
        if not served:
            raise UnknownModel("no model is served")
        (name,) = served
    versions = find_versions(served, name)
    if version is None:
        version = max(versions)
    if version not in versions:
        numbers = ", ".join(map(str, versions))
        raise UnknownModel(f"no version {version} of model {name}; served are: {numbers}")
    return versions[version]


def find_versions(served: Mapping[str, Versions], name: str) -> Versions:
    """Return the versions of a model; raise UnknownModel if it is not served."""
    if name not in served:
        names = ", ".join(sorted(served)) or "none"
        raise UnknownModel(f"no model {name[:100]!r}; served are: {names}")
    return served[name]


def load_engines(
    models: Path,
    device: Literal["auto"] | Device,
    threads: int = 1,
    only: Mapping[str, Collection[int]] | None = None,
    *,
    load_seconds: float | None = None,
) -> Engines:
    """Load the bundles of the models folder; a refused one is logged.

    Parameters
    ----------
    models
        The models folder.
    device
        Where graphs run; "auto": CUDA if it works, else the CPU with a warning.
    threads
        CPUs for each run of a graph.
    only
        The versions to load, by name; None: all.
    load_seconds
        Longest time that loading a version may take; None: any.

    Raises
    ------
    StartError
        If the folder cannot be read or no bundle in it can be served, or ``device`` (other than
        "auto") is not available.
    """
    engines = Engines("cuda" if device == "auto" else device, threads, load_seconds)

    def load(place: Path) -> Engine:
        options = run_options()
        work = partial(load_engine, place, engines.device, threads, options)
        return loading.within(load_seconds, work, options)

    for place in loader.bundle_folders(models):
        name, version = place.parent.name, int(place.name)
        if only is not None and version not in only.get(name, ()):
            continue
        try:
            try:
                engine = load(place)
            except DeviceUnavailable as error:
                if device != "auto":
                    raise
                log.warning("serving on the CPU: %s", error)
                engines.device = "cpu"
                engine = load(place)
        except BundleError as error:
            log.error("refused %s version %d: %s", name, version, error)
            engines.refused[name, version] = str(error)
            continue
        log.info("serving %s version %d on %s (%s)", name, version, engine.device, engine.provider)
        engines.setdefault(name, {})[version] = engine
    if not engines and only != {}:
        raise StartError(f"the models folder {str(models)!r} holds no bundle that can be served")
    return engines
