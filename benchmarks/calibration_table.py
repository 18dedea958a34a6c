"""Which predicts better, eval mode or Monte Carlo passes? ``make calibration-table``.

And to which of the two should a temperature be fitted? The default network is trained on twelve
splits of digits and, with p = 0.2, which makes it more confident, on six. Three tables give metrics
on the held-out rows:

- each way to predict, averaged over the splits;
- the NLL of 100 passes minus that of eval mode, for each split;
- both NLLs and ECEs after temperature scaling, where the temperature was fitted on the validation
  part to the NLL of eval mode, of 100 passes, or of both.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import figures
from dropserve.model import datasets, evaluation
from dropserve.model.bootstrap import Estimate
from dropserve.model.calibration import fit_temperature
from dropserve.model.evaluation import Floats, class_probabilities, classification_metrics
from dropserve.model.networks import NetworkConfig
from dropserve.model.report import report
from dropserve.model.training import TrainingConfig, train

SPLITS = {0.5: range(12), 0.2: range(6)}  # by p
DEFAULT_P = 0.5
SHIFTS = ("rotated", "noisy", "inverted")
MEASURES = ("max_probability", "mutual_information")
# Outputs to which a temperature is fitted, as indices into (eval mode, 100 passes).
FITTED = {"none": (), "eval mode": (0,), "100 passes": (1,), "both": (0, 1)}

Row = dict[str, float]


@dataclass(frozen=True)
class Table:
    """The figures of the three tables."""

    ways: dict[str, Row]  # by way to predict: means over splits
    differences: list[Estimate]  # NLL of 100 passes - NLL of eval mode, one for each split
    temperatures: dict[str, dict[str, Row]]  # by p and key of FITTED: means over splits


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
    ways: dict[str, list[Row]] = {}
    differences = []
    temperatures: dict[str, dict[str, list[Row]]] = {}
    for p, seed in tqdm([(p, seed) for p, seeds in SPLITS.items() for seed in seeds]):
        digits = datasets.load("digits")
        parts = datasets.split(digits, seed)
        config = NetworkConfig("mlp", digits.x.shape[1:], 10, (256, 256), p, "classic")
        model = train(config, parts, TrainingConfig(seed=seed), progress=False).model
        if p == DEFAULT_P:
            found = report(model, parts.test, None, None)
            differences.append(found.nll_difference)
            for way, answer in found.answers.items():
                row = {name: estimate.value for name, estimate in answer.metrics.items()}
                row |= {"aurc": answer.aurc} | {
                    f"{shift} {measure}": answer.auroc[shift][measure]
                    for measure in MEASURES
                    for shift in SHIFTS
                    if measure in answer.auroc[shift]
                }
                ways.setdefault(way, []).append(row)

        def answers(part: datasets.Dataset, of: torch.nn.Module = model) -> list[Floats]:
            x = torch.from_numpy(part.x)
            return [
                evaluation.eval_outputs(of, x),
                evaluation.mc_outputs(of, x, evaluation.PASSES, seed=0),
            ]

        validation, test = answers(parts.validation), answers(parts.test)
        for name, places in FITTED.items():
            fitted = [validation[place] for place in places]
            t = fit_temperature(parts.validation.y.astype(np.int64), *fitted) if fitted else 1.0
            row = {"temperature": t}
            for way, logits in zip(("eval mode", "100 passes"), test, strict=True):
                y = parts.test.y.astype(np.int64)
                metrics = classification_metrics(class_probabilities(logits / t), y)
                row |= {f"{metric} {way}": metrics[metric] for metric in ("nll", "ece")}
            temperatures.setdefault(f"{p}", {}).setdefault(name, []).append(row)
    table = Table(
        ways={way: means(rows) for way, rows in ways.items()},
        differences=differences,
        temperatures={
            p: {name: means(rows) for name, rows in fits.items()}
            for p, fits in temperatures.items()
        },
    )
    figures.write(args.result, asdict(table))
    for lines in (ways_markdown(table), differences_markdown(table), temperatures_markdown(table)):
        print(*lines, "", sep="\n")


def means(rows: Sequence[Row]) -> Row:
    """Return the mean of each column."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def read() -> Table:
    """Return the committed tables."""
    found = figures.read("calibration_table")
    differences = [Estimate(**row) for row in found["differences"]]
    return Table(found["ways"], differences, found["temperatures"])


def ways_markdown(table: Table) -> list[str]:
    """Return the lines of the table of ways to predict, as the documentation shows it."""
    shifts = ", ".join(SHIFTS)
    lines = [
        "| | accuracy | NLL | Brier | ECE | AURC x 1000 | "
        f"AUROC {shifts}: max probability | mutual information |",
        "|---" * 8 + "|",
    ]
    for way, row in table.ways.items():
        cells = [f"{row[name]:.4f}" for name in ("accuracy", "nll", "brier", "ece")]
        cells.append(f"{1000 * row['aurc']:.2f}")
        for measure in MEASURES:
            found = [row.get(f"{shift} {measure}") for shift in SHIFTS]
            cells.append(" ".join("-" if auroc is None else f"{auroc:.3f}" for auroc in found))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return lines


def differences_markdown(table: Table) -> list[str]:
    """Return the lines of the table of NLL differences, as the documentation shows it."""
    lines = ["| split | NLL of 100 passes - NLL of eval mode | 95 % interval |", "|---|---|---|"]
    for seed, d in zip(SPLITS[DEFAULT_P], table.differences, strict=True):
        lines.append(f"| {seed} | {d.value:+.4f} | {d.lower:+.4f} to {d.upper:+.4f} |")
    return lines


def temperatures_markdown(table: Table) -> list[str]:
    """Return the lines of the table of temperatures, as the documentation shows it."""
    columns = [
        f"{metric} {way}" for metric in ("nll", "ece") for way in ("eval mode", "100 passes")
    ]
    lines = [
        "| p | fitted to the NLL of | T | NLL, eval mode | NLL, 100 passes | ECE, eval mode "
        "| ECE, 100 passes |",
        "|---" * 7 + "|",
    ]
    for p, fits in table.temperatures.items():
        for name, row in fits.items():
            cells = [f"{row['temperature']:.2f}", *(f"{row[column]:.4f}" for column in columns)]
            lines.append(f"| {p} | {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
