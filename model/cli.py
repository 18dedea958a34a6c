"""``dropserve train`` and ``dropserve evaluate``: options, console output, files written."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dropserve.commandline import OneLineParser
from dropserve.model import checkpoint, datasets, plots, report, training
from dropserve.model.dropout import SCALINGS, check_probability, double_scaling_warning
from dropserve.model.networks import NETWORKS, NOISES, NetworkConfig


def probability(text: str) -> float:
    """Parse the probability of dropping a unit, in [0, 1)."""
    try:
        p = float(text)
        check_probability(p)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), not {text!r}") from None
    return p


def positive_integer(text: str) -> int:
    """Parse a whole number in [1, 2^31)."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number in [1, 2^31), not {text!r}")
    return int(text)


def non_negative(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return number


def patience(text: str) -> int | None:
    """Parse a number of epochs, or ``none``."""
    return None if text == "none" else positive_integer(text)


def seed(text: str) -> int:
    """Parse a seed, a whole number in [0, 2^63)."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2^63), not {text!r}")
    return int(text)


def widths(text: str) -> tuple[int, ...]:
    """Parse layer widths separated by commas."""
    try:
        return tuple(positive_integer(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers like 256,256, not {text!r}"
        ) from None


def train_parser(prog: str) -> OneLineParser:
    """Return the parser of ``train``."""
    defaults = training.TrainingConfig
    parser = OneLineParser(
        prog,
        "Train a network, report metrics on the test split, write a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, diabetes, FILE.csv or FILE.npz")
    add("--target", metavar="COLUMN", help="CSV column to predict")
    add("--out", type=Path, required=True, help="directory of the checkpoint")
    add(
        "--task", choices=datasets.TASKS, help="kind of task; inferred from the target if not given"
    )
    add("--network", choices=NETWORKS, default="mlp", help="kind of network")
    add("--hidden", type=widths, default="256,256", help="widths of the hidden layers")
    add("--p", type=probability, default=0.5, help="probability of dropping a unit")
    add("--input-p", type=probability, default=0.0, help="probability of dropping a feature")
    add(
        "--noise",
        choices=NOISES,
        default="constant",
        help="noise of a regression's targets; input: a second head predicts it for each row",
    )
    add("--scaling", choices=SCALINGS, default="classic", help="scaling of dropout")
    add("--epochs", type=positive_integer, default=defaults.epochs, help="maximum number of epochs")
    add(
        "--batch-size",
        type=positive_integer,
        default=defaults.batch_size,
        help="rows in each training step",
    )
    add(
        "--learning-rate",
        type=non_negative,
        default=defaults.learning_rate,
        help="initial learning rate of AdamW",
    )
    add(
        "--schedule",
        choices=training.SCHEDULES,
        default=defaults.schedule,
        help="learning rate over the epochs; cosine: falls to 0",
    )
    add(
        "--weight-decay",
        type=non_negative,
        default=defaults.weight_decay,
        help="weight decay of AdamW",
    )
    add(
        "--patience",
        type=patience,
        default=defaults.patience,
        metavar="EPOCHS",
        help="epochs without a better validation loss before training stops and restores the best "
        "weights; none: train all epochs and keep the last weights",
    )
    add(
        "--seed",
        type=seed,
        default=defaults.seed,
        help="seed of the split, the initial weights, the order of rows and the masks",
    )
    add(
        "--calibrate",
        action="store_true",
        help="fit a temperature on the validation split and fold it into the last layer",
    )
    return parser


def evaluate_parser(prog: str) -> OneLineParser:
    """Return the parser of ``evaluate``."""
    parser = OneLineParser(
        prog, "Evaluate a checkpoint on its held-out rows, in eval mode and with dropout passes."
    )
    parser.add_argument("run", type=Path, help="directory of the checkpoint")
    parser.add_argument(
        "--out",
        type=Path,
        help="directory for evaluation.json and evaluation.png; default: that of the checkpoint",
    )
    return parser


def train(arguments: Sequence[str], prog: str) -> int:
    """Run ``train`` with the arguments after its name; return the exit status."""
    return exit_status(run_training, train_parser(prog).parse_args(arguments))


def evaluate(arguments: Sequence[str], prog: str) -> int:
    """Run ``evaluate`` with the arguments after its name; return the exit status."""
    return exit_status(run_evaluation, evaluate_parser(prog).parse_args(arguments))


def exit_status(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command and return its exit status; print an error in its input as one line."""
    try:
        run(args)
    except (datasets.DataError, checkpoint.CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_training(args: argparse.Namespace) -> None:
    """Train, write a checkpoint, and print its report."""
    dataset = datasets.load(args.data, args.target, args.task)
    config = NetworkConfig(
        network=args.network,
        input_shape=dataset.x.shape[1:],
        outputs=len(dataset.outputs),
        hidden=args.hidden,
        p=args.p,
        scaling=args.scaling,
        input_p=args.input_p,
        noise=args.noise,
    )
    parts = datasets.split(dataset, args.seed)
    how = training.TrainingConfig(
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        schedule=args.schedule,
        patience=args.patience,
        calibrate=args.calibrate,
    )
    with checkpoint.Output(args.out) as output:
        print(
            f"{dataset.name}: {dataset.task}, {len(dataset)} rows of shape "
            f"{list(config.input_shape)}, {config.outputs} outputs"
        )
        trained = training.train(config, parts, how, progress=True)
        if warning := double_scaling_warning(trained.model):
            print(f"warning: {warning}", file=sys.stderr)
        result = checkpoint.from_training(trained, config, parts, args.seed)
        checkpoint.save(result, output.staging)
        found = report_of(result)
        plots.write_page(found, output.staging / "plots.png", trained.losses)
        output.commit()
    if trained.temperature is not None:
        print(f"temperature {trained.temperature:.4g}, folded into the last layer")
    print_metrics(trained, len(parts.test))
    print("", *report.table_lines(found), sep="\n")
    print(f"wrote {args.out}")


def run_evaluation(args: argparse.Namespace) -> None:
    """Evaluate a checkpoint, write the report, and print it."""
    run = checkpoint.load(args.run)
    out = args.run if args.out is None else args.out
    # Fail before the evaluation, not after it.
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise checkpoint.CheckpointError(f"cannot write to {out}: it is no folder") from None
    found = report_of(run)
    text = json.dumps(asdict(found), indent=2, allow_nan=False)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    plots.write_page(found, out / "evaluation.png")
    print(f"{found.data}: {found.task}, {found.rows} held-out rows")
    print(*report.table_lines(found), sep="\n")
    print(f"wrote {out / 'evaluation.json'} and {out / 'evaluation.png'}")


def report_of(run: checkpoint.Checkpoint) -> report.Report:
    """Return the report on the held-out rows of a checkpoint."""
    noise = None if run.noise_std is None else np.array(run.noise_std)
    # Older checkpoints lack the noise around eval mode.
    eval_noise = noise if run.eval_noise_std is None else np.array(run.eval_noise_std)
    return report.report(run.model, run.holdout, noise, eval_noise)


def print_metrics(trained: training.Trained, rows: int) -> None:
    """Print the metrics on ``rows`` held-out rows: a column for eval mode, one for the passes."""
    print(f"{f'held out: {rows} rows':<24}{'eval mode':>12}{'100 passes':>12}")
    for name, value in trained.metrics["eval"].items():
        print(f"{name:<24}{value:>12.4g}{trained.metrics['mc'][name]:>12.4g}")
