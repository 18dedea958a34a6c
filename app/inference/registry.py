"""The models that are served, by name and version; loaded, replaced and unloaded while they are.

They come from the models folder when the service starts, and while it runs: a version that is new
there is read, checked, tried on its own examples and only then put in place, between two requests.
What is refused leaves what is served as it was. A request keeps the model that it has found until
it is answered.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from dropserve.app.bundles import loader
from dropserve.app.errors import DeviceUnavailable, InputError, LoadError, StartError, UnknownModel
from dropserve.app.inference import batch, memory
from dropserve.app.inference.batch import Draw
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.executor import Turns
from dropserve.app.inference.providers import PROVIDERS, Device
from dropserve.app.inference.runner import Model
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.export.bundle import BundleError

# Passes of each example that a bundle is tried with.
TRIAL_PASSES = 10
# What may come of loading a version.
LOADED, REFUSED = "loaded", "refused"

log = logging.getLogger(__name__)


class Engines(dict[str, dict[int, Engine]]):
    """Engines by name and version, what they run on, and why other versions were refused."""

    def __init__(self, device: Device, threads: int) -> None:
        super().__init__()
        self.device = device
        self.threads = threads
        self.refused: dict[tuple[str, int], str] = {}


class Served(NamedTuple):
    """What is served, for another process to serve the same."""

    versions: dict[str, tuple[int, ...]]
    unloaded: frozenset[str]


def load(place: Path, device: Device, threads: int) -> Engine:
    """Read the bundle at ``place``, and try it on its own examples.

    Raises
    ------
    BundleError
        If it cannot be served.
    DeviceUnavailable
        If the device is not to be had.
    """
    bundle = loader.read(place)
    engine = Engine(bundle, device, threads)
    stream = MaskStream(0, engine.manifest.sites)
    inputs = engine.examples.inputs
    trial = Draw(inputs, stream, range(len(inputs)), range(TRIAL_PASSES), 0.5)
    for (outcome,) in (batch.predict(engine, [trial.inputs]), batch.draw(engine, [trial])):
        if isinstance(outcome, InputError):
            raise BundleError(f"it does not answer its own examples: {outcome}")
    return engine


class State(NamedTuple):
    """What became of a version in the models folder."""

    name: str
    version: int
    served: bool
    reason: str  # why it is not, where that is known


class Models:
    """The models that are served, by name and version.

    Every change is made on the event loop in one step, so a request finds the models as they were
    before or as they are after it.

    Parameters
    ----------
    engines
        To begin with.
    turns
        Where their long runs are made.
    folder
        The models folder; None: nothing more can be loaded.
    """

    def __init__(self, engines: Engines, turns: Turns, folder: Path | None = None) -> None:
        self.turns = turns
        self.folder = folder
        self.device = engines.device
        self.provider = PROVIDERS[engines.device][0]
        self.threads = engines.threads
        self.served = {
            name: {version: Model(engine, turns) for version, engine in sorted(versions.items())}
            for name, versions in engines.items()
        }
        self.unloaded: set[str] = set()
        # Why a version was refused when it was last tried.
        self.refused = engines.refused
        # How often a version was loaded, or refused, by name and outcome.
        self.loads: Counter[tuple[str, str]] = Counter()
        for name, versions in engines.items():
            self.loads[name, LOADED] += len(versions)
        for name, _ in engines.refused:
            self.loads[name, REFUSED] += 1
        self.changing = asyncio.Lock()

    def find(self, name: str | None, version: int | None) -> Model:
        """Find a model: the only one where no name is given, the newest of its versions.

        Raises
        ------
        UnknownModel, InputError
            If there is no such model; if a name is needed.
        """
        if name is None:
            if len(self.served) > 1:
                raise InputError("model", f"is needed, one of: {', '.join(sorted(self.served))}")
            if not self.served:
                raise UnknownModel("no model is served")
            (name,) = self.served
        versions = self.versions(name)
        if version is None:
            # They are kept in order.
            version = next(reversed(versions))
        if version not in versions:
            served = ", ".join(map(str, versions))
            raise UnknownModel(f"no version {version} of model {name}; served are: {served}")
        return versions[version]

    def versions(self, name: str) -> dict[int, Model]:
        """Return the versions of a model, ascending; raise UnknownModel if it is not served."""
        if name not in self.served:
            served = ", ".join(sorted(self.served)) or "none"
            raise UnknownModel(f"no model {name[:100]!r}; served are: {served}")
        return self.served[name]

    def state(self) -> Served:
        """Say what is served, and what was unloaded."""
        versions = {name: tuple(versions) for name, versions in self.served.items()}
        return Served(versions, frozenset(self.unloaded))

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Let one change after the other be made, and give back the memory that each took."""
        async with self.changing:
            try:
                yield
            finally:
                await asyncio.to_thread(memory.release)

    async def index(self) -> list[State]:
        """Say of every version that is served or in the models folder what became of it."""
        listed = await asyncio.to_thread(self.list)
        found = {name: set(places) for name, places in listed.items()}
        for name, versions in self.served.items():
            found.setdefault(name, set()).update(versions)
        return [
            State(
                name,
                version,
                version in self.served.get(name, ()),
                self.refused.get((name, version), ""),
            )
            for name, versions in sorted(found.items())
            for version in sorted(versions)
        ]

    async def load(self, name: str) -> None:
        """Serve what the models folder holds of a model now, but for what ``faults`` names.

        Raises
        ------
        UnknownModel
            If the folder does not hold it.
        LoadError
            If the folder cannot be read.
        """
        async with self.change():
            listed = await asyncio.to_thread(self.list)
            if name not in listed:
                there = ", ".join(listed) or "none"
                raise UnknownModel(f"no model {name[:100]!r} to load; there are: {there}")
            self.unloaded.discard(name)
            await self.renew(name, listed[name])

    async def unload(self, name: str) -> None:
        """Serve a model no more; requests that have found it are answered.

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
        """Serve what the models folder holds now, but for what was unloaded.

        Raises
        ------
        LoadError
            If a version is refused, or the folder holds nothing: then all is served on.
        """
        async with self.change():
            listed = await asyncio.to_thread(self.list)
            if not listed:
                raise LoadError(f"the models folder {str(self.folder)!r} holds no bundle")
            for name in self.served.keys() - listed.keys():
                del self.served[name]
                log.info("unloaded %s, which is gone", name)
            names = sorted(listed.keys() - self.unloaded)
            for name in names:
                await self.renew(name, listed[name])
            faults = [fault for name in names for fault in self.faults(name)]
            if faults:
                raise LoadError("; ".join(faults))

    def sizes(self) -> Iterator[tuple[tuple[str, str, str], int, int]]:
        """Say how many runs of which size were made; by model, version and graph."""
        for name, versions in self.served.items():
            for version, model in versions.items():
                for graph, batchers in (
                    ("predict", (model.predictions, model.many_predictions)),
                    ("stochastic", (model.draws, model.many_draws)),
                ):
                    for batcher in batchers:
                        for size, number in batcher.sizes.copy().items():
                            yield (name, str(version), graph), size, number

    def list(self) -> dict[str, dict[int, Path]]:
        """List the models folder: the place of each version, by name."""
        listed: dict[str, dict[int, Path]] = {}
        if self.folder is not None:
            try:
                for place in loader.places(self.folder):
                    listed.setdefault(place.parent.name, {})[int(place.name)] = place
            except StartError as error:
                raise LoadError(str(error)) from None
        return listed

    async def renew(self, name: str, places: dict[int, Path]) -> None:
        """Load the versions at some places, and put them in the place of those that are served.

        One that is refused leaves the older bundle under its number where it is.
        """
        served = self.served.get(name, {})
        versions: dict[int, Model] = {}
        for gone in [key for key in self.refused if key[0] == name and key[1] not in places]:
            del self.refused[gone]
        for version, place in sorted(places.items()):
            before = served.get(version)
            try:
                model = await asyncio.to_thread(self.load_version, place, before)
            except (BundleError, DeviceUnavailable) as error:
                log.error("refused %s version %d: %s", name, version, error)
                self.refused[name, version] = str(error)
                self.loads[name, REFUSED] += 1
                if before:
                    versions[version] = before
                continue
            self.refused.pop((name, version), None)
            versions[version] = model
            if model is not before:
                self.loads[name, LOADED] += 1
                log.info("serving %s version %d", name, version)
        if versions:
            self.served[name] = versions

    def faults(self, name: str) -> Iterator[str]:
        """Say which versions of a model were refused when they were last tried, and why."""
        for (of, version), reason in sorted(self.refused.items()):
            if of == name:
                yield f"refused {name} version {version}: {reason}"

    def load_version(self, place: Path, before: Model | None) -> Model:
        """Load the bundle at ``place``, unless it is what is served already."""
        if before and loader.read_manifest(place) == before.manifest:
            return before
        return Model(load(place, self.device, self.threads), self.turns)


def load_engines(
    models: Path,
    device: Literal["auto"] | Device,
    threads: int = 1,
    only: Mapping[str, Collection[int]] | None = None,
) -> Engines:
    """Load every bundle in the models folder; one that is refused costs a line in the log.

    Each run of a graph takes ``threads`` CPUs. ``only`` names the versions to load, where it is
    given.

    Raises
    ------
    StartError
        If the folder cannot be read or no bundle in it can be served, or ``device`` (other than
        "auto") is not to be had.
    """
    engines = Engines("cuda" if device == "auto" else device, threads)
    for place in loader.places(models):
        name, version = place.parent.name, int(place.name)
        if only is not None and version not in only.get(name, ()):
            continue
        try:
            try:
                engine = load(place, engines.device, threads)
            except DeviceUnavailable as error:
                if device != "auto":
                    raise
                log.warning("serving on the CPU: %s", error)
                engines.device = "cpu"
                engine = load(place, engines.device, threads)
        except BundleError as error:
            log.error("refused %s version %d: %s", name, version, error)
            engines.refused[name, version] = str(error)
            continue
        log.info("serving %s version %d on %s (%s)", name, version, engine.device, engine.provider)
        engines.setdefault(name, {})[version] = engine
    if not engines and only != {}:
        raise StartError(f"the models folder {str(models)!r} holds no bundle that can be served")
    return engines
