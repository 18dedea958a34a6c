"""What does each of the three scalings cost in eval mode? ``make scaling-table``.

The default network is trained with each scaling on three splits of digits and five of diabetes. The
table gives metrics on the held-out rows, averaged over the splits, in eval mode and for the mean of
100 passes.
"""

import numpy as np
from tqdm import tqdm

from benchmarks import figures
from dropserve.model import datasets
from dropserve.model.dropout import SCALINGS, Scaling
from dropserve.model.networks import NetworkConfig
from dropserve.model.training import TrainingConfig, train

SEEDS = {"digits": range(3), "diabetes": range(5)}
# Each column: title, data set, mode, metric and decimals.
COLUMNS = (
    ("digits accuracy, eval mode", "digits", "eval", "accuracy", 3),
    ("NLL, eval mode", "digits", "eval", "nll", 3),
    ("NLL, 100 passes", "digits", "mc", "nll", 3),
    ("ECE, eval mode", "digits", "eval", "ece", 3),
    ("ECE, 100 passes", "digits", "mc", "ece", 3),
    ("diabetes RMSE, eval mode", "diabetes", "eval", "rmse", 1),
    ("RMSE, 100 passes", "diabetes", "mc", "rmse", 1),
)

Metrics = dict[str, dict[str, float]]  # by mode and name
Table = dict[str, dict[str, float]]  # by scaling and column


def measure(data: str, scaling: Scaling, seed: int) -> Metrics:
    """Train one network; return its metrics on the held-out rows."""
    dataset = datasets.load(data)
    config = NetworkConfig(
        network="mlp",
        input_shape=dataset.x.shape[1:],
        outputs=len(dataset.outputs),
        hidden=(256, 256),
        p=0.5,
        scaling=scaling,
    )
    parts = datasets.split(dataset, seed)
    return train(config, parts, TrainingConfig(seed=seed), progress=False).metrics


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    runs = [(data, s, seed) for data, seeds in SEEDS.items() for s in SCALINGS for seed in seeds]
    found: dict[tuple[str, Scaling], list[Metrics]] = {}
    for data, scaling, seed in tqdm(runs, unit="network"):
        found.setdefault((data, scaling), []).append(measure(data, scaling, seed))
    table: Table = {
        scaling: {
            title: float(np.mean([metrics[mode][name] for metrics in found[data, scaling]]))
            for title, data, mode, name, _ in COLUMNS
        }
        for scaling in SCALINGS
    }
    figures.write(args.result, table)
    print("\n".join(markdown(table)))


def read() -> Table:
    """Return the committed table."""
    table: Table = figures.read("scaling_table")
    return table


def markdown(table: Table) -> list[str]:
    """Return the lines of the table as the README shows it."""
    lines = [
        "| scaling | " + " | ".join(title for title, *_ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for scaling, row in table.items():
        cells = (f"{row[title]:.{digits}f}" for title, *_, digits in COLUMNS)
        lines.append(f"| `{scaling}` | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
