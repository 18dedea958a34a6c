"""What do stratified masks save, and what do they cost? ``make stratified``.

MLPs of 256 and 256 units are trained on digits and diabetes with p = 0.5 and 0.1; 300 queries of 50
passes, a seed each, then predict the same held-out rows.

The first table gives the variance of the mean over the seeds, relative to independent masks.
Beside the service's masks, which come in replicates of ten, stand two designs that allow no
estimate of a standard error: one Latin hypercube over all 50 passes, and antithetic pairs (the
second pass drops the units that the first one keeps, as far as p allows). The second table gives
the time to draw the masks, and that of a whole query.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import figures, network, timing
from benchmarks.blocking import BlockingService
from dropserve.app.inference.batch import activate
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.query import Query
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.service import Service
from dropserve.app.uncertainty.masks import KINDS, stream
from dropserve.app.uncertainty.summary import values
from dropserve.model import checkpoint

DATA = ("digits", "diabetes")
PS = (0.5, 0.1)
PASSES, ROWS, SEEDS = 50, 64, 300
COST_PASSES, COST_ROWS, WIDTH = 100, (1, 16), 256

Floats = NDArray[np.float64]
Shape = tuple[int, int, int]  # rows, passes, units
Draw = Callable[[np.random.Generator, Shape], Floats]


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    networks = [(data, p) for data in DATA for p in PS]
    variance = [row for each in tqdm(networks, unit="network") for row in variances(*each)]
    cost = costs()
    figures.write(args.result, {"variance": variance, "cost": cost})
    print(f"\n{PASSES} passes, {ROWS} held-out rows, {SEEDS} seeds\n")
    print("\n".join(figures.markdown(variance)))
    print(f"\n{COST_PASSES} passes, 2 x {WIDTH} units, one thread ({timing.machine()})\n")
    print("\n".join(figures.markdown(cost)))


def read(part: str) -> list[figures.Row]:
    """Return the committed rows of one table, ``variance`` or ``cost``."""
    rows: list[figures.Row] = figures.read("stratified")[part]
    return rows


def variances(data: str, p: float) -> list[figures.Row]:
    """Compare the variances, over seeds, of the mean of the passes."""
    name = f"{data}-{p:g}"
    service, x = served(name, data, p)
    engine = service.service.registry.find(name, 1).engine
    found: dict[str, Floats] = {}
    held: dict[str, float] = {}
    for kind in KINDS:
        answers = [
            service.uncertainty(Query(x, name, 1, PASSES, seed, 0.9, kind)) for seed in range(SEEDS)
        ]
        found[kind], error = (
            np.array([answer[field] for answer in answers], np.float64)
            for field in ("mean", "standard_error")
        )
        # The mean over all seeds stands in for the exact mean. Of the classes, only the predicted
        # one counts.
        exact = found[kind].mean(axis=0)
        inside = np.abs(found[kind] - exact) <= 1.96 * error
        held[kind] = float(inside[:, np.arange(len(x)), exact.argmax(axis=1)].mean())
    for title, draw in (("one Latin hypercube", hypercube), ("antithetic pairs", antithetic)):
        found[title] = np.array([mean_of(engine, x, draw, seed) for seed in range(SEEDS)])
    independent = found["independent"].var(axis=0, ddof=1).sum()
    ratios = {way: float(m.var(axis=0, ddof=1).sum() / independent) for way, m in found.items()}
    return [
        {
            "data": data,
            "p": p,
            "masks": way,
            "variance of the mean / independent": ratio,
            "independent passes as precise": round(PASSES / ratio),
            "within 1.96 standard errors": held.get(way),
        }
        for way, ratio in ratios.items()
    ]


def served(name: str, data: str, p: float) -> tuple[BlockingService, NDArray[np.float32]]:
    """Return a service of a network, trained and exported once, and its held-out rows."""
    folder = network.FOLDER / "stratified"
    run, models = folder / "runs" / name, folder / "models"
    if not (models / name / "1").exists():
        network.command("model", "train", "--data", data, "--p", str(p), "--out", str(run))
        network.command("export", str(run), "--models", str(models), "--name", name)
    engines = load_engines(models, "cpu")
    most = ROWS * COST_PASSES
    service = Service(
        engines, max_rows=ROWS, max_passes=COST_PASSES, max_row_passes=most, queue_rows=most
    )
    return BlockingService(service), checkpoint.load(run).holdout.x[:ROWS]


def mean_of(engine: Engine, x: NDArray[np.float32], draw: Draw, seed: int) -> Floats:
    """Return the mean over passes whose masks keep a unit where its uniform is at least p."""
    generator = np.random.default_rng(seed)
    masks = {
        site.mask_input: (
            draw(generator, (len(x), PASSES, math.prod(site.mask_shape))) >= site.p
        ).reshape(-1, *site.mask_shape)
        for site in engine.manifest.sites
    }
    outputs = engine.passes(x, np.repeat(np.arange(len(x)), PASSES), masks)
    answers = values(engine.manifest, activate(engine.manifest, outputs))
    mean: Floats = answers.astype(np.float64).reshape(len(x), PASSES, -1).mean(axis=1)
    return mean


def hypercube(generator: np.random.Generator, shape: Shape) -> Floats:
    """Draw uniforms such that each unit has exactly one in each of 50 equal intervals."""
    places = generator.random(shape).argsort(axis=1)
    drawn: Floats = (places + generator.random(shape)) / PASSES
    return drawn


def antithetic(generator: np.random.Generator, shape: Shape) -> Floats:
    """Draw uniforms u for even passes and 1 - u for the odd one that follows."""
    rows, passes, units = shape
    half = generator.random((rows, passes // 2, units))
    return np.stack([half, 1 - half], axis=2).reshape(shape)


def costs() -> list[figures.Row]:
    """Time both kinds of masks, and whole queries with each."""
    name = f"digits-{PS[0]:g}"
    service, x = served(name, "digits", PS[0])
    sites = service.service.registry.find(name, 1).manifest.sites
    found: list[figures.Row] = []
    for count in COST_ROWS:
        passes = range(COST_PASSES)
        masks: dict[str, Callable[[], object]] = {
            kind: partial(stream(kind, 7, sites, COST_PASSES).draw, range(count), passes)
            for kind in KINDS
        }
        queries: dict[str, Callable[[], object]] = {
            kind: partial(service.uncertainty, Query(x[:count], name, 1, COST_PASSES, 7, 0.9, kind))
            for kind in KINDS
        }
        for what, works in (("masks", masks), ("query", queries)):
            seconds = timing.interleaved(works)
            found += [
                {
                    "rows": count,
                    "what": what,
                    "masks": kind,
                    "ms": 1000 * seconds[kind],
                    "time / independent": seconds[kind] / seconds["independent"],
                }
                for kind in KINDS
            ]
    return found


if __name__ == "__main__":
    main()
