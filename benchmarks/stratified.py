"""What do stratified masks save, and what do they cost? ``make stratified``.

Trains MLPs of 256 and 256 on digits and diabetes, with p = 0.5 and 0.1, and asks for 50 passes of
held-out rows with many seeds: how the mean scatters about itself, in units of how it does with
independent masks. Beside the service's masks, which come in replicates of ten, stand what no
standard error could be told of: one Latin hypercube over all 50 passes, and antithetic pairs (what
one pass keeps the other drops, as far as p lets it). And what it costs to make the masks, and to
answer a query.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from app.engine import Engine
from app.masks import KINDS, stream
from app.models import load_engines
from app.runs import as_answers, values
from app.service import Query, Service
from benchmarks import timing
from benchmarks.network import FOLDER
from export.bundle import DropoutSite
from model import checkpoint

DATA = ("digits", "diabetes")
PS = (0.5, 0.1)
PASSES, ROWS, SEEDS = 50, 64, 300
COST_PASSES, COST_ROWS, WIDTH = 100, (1, 16), 256

Floats = NDArray[np.float64]
Masks = dict[str, NDArray[np.bool_]]
Uniforms = Callable[[tuple[int, int, int]], Floats]  # of rows, passes and units


def main() -> None:
    rows: list[timing.Row] = []
    with tqdm(total=len(DATA) * len(PS), unit="network") as bar:
        for data in DATA:
            for p in PS:
                rows += variances(data, p)
                bar.update()
    timing.report(__file__, f"{PASSES} passes, {ROWS} held-out rows, {SEEDS} seeds", rows + costs())


def variances(data: str, p: float) -> list[timing.Row]:
    """Compare how the means of passes scatter, over seeds."""
    name = f"{data}-{p:g}"
    service, x = served(name, data, p)
    engine = service.models.find(name, 1).engine

    def asked(kind: str, seed: int) -> Floats:
        assert kind in KINDS
        query = Query(x, name, 1, PASSES, seed, 0.9, kind)
        return np.asarray(service.uncertainty(query)["mean"], np.float64)

    ways: dict[str, Callable[[int], Floats]] = {kind: partial(asked, kind) for kind in KINDS}
    for title, uniforms in (("one Latin hypercube", hypercube), ("antithetic pairs", antithetic)):
        ways[title] = partial(mean_of, engine, x, uniforms)
    found = {way: np.array([mean(seed) for seed in range(SEEDS)]) for way, mean in ways.items()}
    independent = found["independent"].var(axis=0, ddof=1).sum()
    ratios = {way: float(m.var(axis=0, ddof=1).sum() / independent) for way, m in found.items()}
    return [
        {
            "data": data,
            "p": p,
            "masks": way,
            "variance of the mean / independent": ratio,
            "independent passes as precise": round(PASSES / ratio),
        }
        for way, ratio in ratios.items()
    ]


def served(name: str, data: str, p: float) -> tuple[Service, NDArray[np.float32]]:
    """Train and export a network, once; return a service of it, and held-out rows."""
    run, models = FOLDER / "stratified" / "runs" / name, FOLDER / "stratified" / "models"
    if not (models / name / "1").exists():
        command("model", "train", "--data", data, "--p", str(p), "--out", str(run))
        command("export", str(run), "--models", str(models), "--name", name)
    limits = {"max_rows": ROWS, "max_passes": PASSES, "max_row_passes": ROWS * PASSES}
    return Service(load_engines(models, "cpu"), **limits), checkpoint.load(run).holdout.x[:ROWS]


def command(*arguments: str) -> None:
    """Run a command of the project."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-m", *arguments], check=True, **quiet)


def mean_of(engine: Engine, x: NDArray[np.float32], uniforms: Uniforms, seed: int) -> Floats:
    """Return the mean of passes whose masks keep a unit where its uniform is at least p."""
    generator = np.random.default_rng(seed)
    masks = {
        site.mask_input: kept(site, partial(uniforms, generator), len(x))
        for site in engine.manifest.sites
    }
    outputs = engine.passes(x, np.repeat(np.arange(len(x)), PASSES), masks)
    answers = values(engine.manifest, as_answers(engine.manifest, outputs))
    mean: Floats = answers.astype(np.float64).reshape(len(x), PASSES, -1).mean(axis=1)
    return mean


def kept(site: DropoutSite, uniforms: Uniforms, rows: int) -> NDArray[np.bool_]:
    """Make the masks of a site, ``[rows x passes, *mask_shape]``."""
    units = int(np.prod(site.mask_shape))
    return (uniforms((rows, PASSES, units)) >= site.p).reshape(-1, *site.mask_shape)


def hypercube(generator: np.random.Generator, shape: tuple[int, int, int]) -> Floats:
    """Draw uniforms of which each unit has one in every fiftieth."""
    places = generator.random(shape).argsort(axis=1)
    drawn: Floats = (places + generator.random(shape)) / shape[1]
    return drawn


def antithetic(generator: np.random.Generator, shape: tuple[int, int, int]) -> Floats:
    """Draw uniforms u, and 1 - u for the next pass."""
    half = generator.random((shape[0], shape[1] // 2, shape[2]))
    return np.stack([half, 1 - half], axis=2).reshape(shape)


def costs() -> list[timing.Row]:
    """Time masks, and whole queries, of both kinds."""
    name = f"digits-{PS[0]:g}"
    service, x = served(name, "digits", PS[0])
    service.max_passes, service.max_row_passes = COST_PASSES, 10**6
    sites = service.models.find(name, 1).manifest.sites
    found: list[timing.Row] = []
    for count in COST_ROWS:
        drawing = {
            kind: partial(stream(kind, 7, sites).draw, range(count), range(COST_PASSES))
            for kind in KINDS
        }
        asking = {
            kind: partial(
                service.uncertainty,
                Query(x[:count], name, 1, COST_PASSES, 7, 0.9, kind),
            )
            for kind in KINDS
        }
        for what, works in (("masks", drawing), ("a query", asking)):
            seconds = timing.interleaved(works)
            found += [
                {
                    "masks": kind,
                    "what": f"{what}, {count} x {COST_PASSES} passes, 2 x {WIDTH} units",
                    "ms": 1000 * seconds[kind],
                    "time / independent": seconds[kind] / seconds["independent"],
                }
                for kind in KINDS
            ]
    return found


if __name__ == "__main__":
    main()
