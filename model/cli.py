"""``dropserve train`` makes a checkpoint of a data set, ``dropserve evaluate`` judges one."""

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
    """Read ``--p``."""
    try:
        p = float(text)
        check_probability(p)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), not {text!r}") from None
    return p


def positive(text: str) -> int:
    """Read a whole number from 1 to below 2^31."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number in [1, 2^31), not {text!r}")
    return int(text)


def finite(text: str) -> float:
    """Read a number that is at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return number


def patience(text: str) -> int | None:
    """Read ``--patience``: epochs, or ``none``."""
    return None if text == "none" else positive(text)


def seed(text: str) -> int:
    """Read ``--seed``."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2^63), not {text!r}")
    return int(text)


def widths(text: str) -> tuple[int, ...]:
    """Read ``--hidden``: layer widths separated by commas."""
    try:
        return tuple(positive(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers like 256,256, not {text!r}"
        ) from None


def train_parser(prog: str) -> OneLineParser:
    """Describe the command line of ``train``."""
    train = OneLineParser(
        prog,
        "Train a network, report on the held-out split, write a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("--data", default="digits", help="digits, diabetes, FILE.csv or FILE.npz")
    train.add_argument("--target", metavar="COLUMN", help="the CSV column to predict")
    train.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    train.add_argument("--task", choices=datasets.TASKS, help="by default, what the target is")
    train.add_argument("--network", choices=NETWORKS, default="mlp", help="kind of network")
    train.add_argument("--hidden", type=widths, default=(256, 256), help="widths of the layers")
    train.add_argument("--p", type=probability, default=0.5, help="share of units dropped")
    train.add_argument(
        "--input-p", type=probability, default=0.0, help="share of the features dropped"
    )
    train.add_argument(
        "--noise",
        choices=NOISES,
        default="constant",
        help="of a regression's targets; input: a second head answers how large it is where",
    )
    train.add_argument("--scaling", choices=SCALINGS, default="classic", help="who scales when")
    train.add_argument(
        "--epochs", type=positive, default=training.TrainingConfig.epochs, help="epochs at most"
    )
    train.add_argument("--batch-size", type=positive, default=64, help="rows of one step")
    train.add_argument(
        "--learning-rate",
        type=finite,
        default=training.TrainingConfig.learning_rate,
        help="of AdamW, at the start",
    )
    train.add_argument(
        "--schedule",
        choices=training.SCHEDULES,
        default=training.TrainingConfig.schedule,
        help="of the learning rate: to 0 over the epochs, or none",
    )
    train.add_argument(
        "--weight-decay",
        type=finite,
        default=training.TrainingConfig.weight_decay,
        help="of AdamW",
    )
    train.add_argument(
        "--patience",
        type=patience,
        default=training.TrainingConfig.patience,
        metavar="EPOCHS",
        help="without a better validation loss before training stops and takes the best weights; "
        "none: train all epochs and keep the last",
    )
    train.add_argument("--seed", type=seed, default=0, help="of split, weights, order and masks")
    train.add_argument(
        "--calibrate",
        action="store_true",
        help="fit a temperature on the validation part and fold it into the last layer",
    )
    return train


def evaluate_parser(prog: str) -> OneLineParser:
    """Describe the command line of ``evaluate``."""
    evaluate = OneLineParser(
        prog, "Judge a checkpoint on its held-out rows, eval mode beside Monte Carlo passes."
    )
    evaluate.add_argument("run", type=Path, help="directory of the checkpoint")
    evaluate.add_argument(
        "--out",
        type=Path,
        help="directory for evaluation.json and evaluation.png; by default the checkpoint's",
    )
    return evaluate


def train(arguments: Sequence[str], prog: str) -> int:
    """Run the command line after ``train``; return the exit status."""
    return without_trace(run_training, train_parser(prog).parse_args(arguments))


def evaluate(arguments: Sequence[str], prog: str) -> int:
    """Run the command line after ``evaluate``; return the exit status."""
    return without_trace(run_evaluation, evaluate_parser(prog).parse_args(arguments))


def without_trace(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; print what is wrong with its input as one line; return the exit status."""
    try:
        run(args)
    except (datasets.DataError, checkpoint.CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_training(args: argparse.Namespace) -> None:
    """Train, report, and write a checkpoint."""
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
        result = checkpoint.of(trained, config, parts, args.seed)
        checkpoint.save(result, output.staging)
        found = judge(result)
        plots.write_page(found, output.staging / "plots.png", trained.losses)
        output.commit()
    if trained.temperature is not None:
        print(f"temperature {trained.temperature:.4g}, folded into the last layer")
    print_metrics(trained, len(parts.test))
    print("", *report.lines(found), sep="\n")
    print(f"wrote {args.out}")


def run_evaluation(args: argparse.Namespace) -> None:
    """Judge a checkpoint and write the report."""
    run = checkpoint.load(args.run)
    out = args.run if args.out is None else args.out
    # Before the work whose outcome it takes.
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise checkpoint.CheckpointError(f"cannot write to {out}: it is no folder") from None
    found = judge(run)
    text = json.dumps(asdict(found), indent=2, allow_nan=False)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    plots.write_page(found, out / "evaluation.png")
    print(f"{found.data}: {found.task}, {found.rows} held-out rows")
    print(*report.lines(found), sep="\n")
    print(f"wrote {out / 'evaluation.json'} and {out / 'evaluation.png'}")


def judge(run: checkpoint.Checkpoint) -> report.Report:
    """Report on the held-out rows of a checkpoint."""
    noise = None if run.noise_std is None else np.array(run.noise_std)
    # Older checkpoints do not say the noise around eval mode.
    eval_noise = noise if run.eval_noise_std is None else np.array(run.eval_noise_std)
    return report.report(run.model, run.holdout, noise, eval_noise)


def print_metrics(trained: training.Trained, rows: int) -> None:
    """Print the held-out metrics, eval mode beside the Monte Carlo mean."""
    print(f"{f'held out: {rows} rows':<24}{'eval mode':>12}{'100 passes':>12}")
    for name, value in trained.metrics["eval"].items():
        print(f"{name:<24}{value:>12.4g}{trained.metrics['mc'][name]:>12.4g}")
