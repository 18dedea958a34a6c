"""``dropserve score``: the uncertainty of each row of a Parquet file, in bounded memory.

The threads of one machine or, with ``--ray``, the processes of a cluster score parts of the file,
which are written in order.
"""

import argparse
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow as pa
from tqdm import tqdm

from dropserve.app.errors import InputError, StartError, UnknownModel
from dropserve.app.inference.providers import Device
from dropserve.app.inference.query import SEED_LIMIT, Query, draw_seed
from dropserve.app.processes.cpus import available
from dropserve.app.scoring import parquet, ray
from dropserve.app.scoring.scorer import MAX_ROWS, Scorer, Task
from dropserve.app.settings import Settings
from dropserve.app.uncertainty.masks import KINDS
from dropserve.commandline import OneLineParser

# The service's default, which bounds the memory of a row.
MAX_PASSES: int = Settings.model_fields["max_passes"].default
DEVICES = ("auto", *get_args(Device))
# Exit status after an interrupt, as in shells.
INTERRUPTED = 128 + signal.SIGINT


def command(arguments: Sequence[str], prog: str) -> int:
    """Run the command line after ``score``; return the exit status."""
    options = build_parser(prog).parse_args(arguments)
    seed = draw_seed() if options.seed is None else options.seed
    task = Task(
        options.models.resolve(),
        options.device,
        options.model,
        options.version,
        options.passes,
        seed,
        options.interval,
        options.masks,
    )
    # SIGTERM acts like Ctrl-C: an unfinished output is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rows = score(options.input, options.output, task, on_ray=options.ray)
    except KeyboardInterrupt:
        return INTERRUPTED
    except InputError as error:
        print(f"error: {str(options.input)!r}: {error}", file=sys.stderr)
        return 1
    except (StartError, UnknownModel) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}: {rows} rows, {options.passes} passes each, seed {seed}")
    return 0


def build_parser(prog: str) -> OneLineParser:
    """Describe the command line."""
    parser = OneLineParser(
        prog,
        "Run train-mode passes of each row of a Parquet file, and write their statistics.",
    )
    parser.add_argument("input", type=Path, metavar="IN.parquet")
    parser.add_argument("output", type=Path, metavar="OUT.parquet", help="replaced if it is there")
    parser.add_argument(
        "--passes", type=passes, default=Query.passes, help="of each row (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, help="of the masks; drawn and told if not given")
    parser.add_argument(
        "--interval", type=level, default=Query.interval, help="its level (default: %(default)s)"
    )
    parser.add_argument(
        "--masks",
        choices=KINDS,
        default=Query.masks,
        help="as the service's (default: %(default)s)",
    )
    parser.add_argument("--model", help="needed where there are several")
    parser.add_argument("--version", type=positive, help="the newest by default")
    parser.add_argument("--models", type=Path, default=default("models"), help="folder of bundles")
    parser.add_argument("--device", type=device, default=default("device"), help="as the service's")
    parser.add_argument(
        "--ray", action="store_true", help="on a Ray cluster: $RAY_ADDRESS, or one started here"
    )
    return parser


def default(name: str) -> object:
    """Return a setting of the service: its environment variable or its default."""
    return os.environ.get(f"DROPSERVE_{name.upper()}") or Settings.model_fields[name].default


def positive(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def passes(text: str) -> int:
    """Parse the number of passes."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PASSES:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {MAX_PASSES}")
    return int(text)


def seed(text: str) -> int:
    """Parse a seed."""
    if not text.isdecimal() or int(text) >= SEED_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2^63 - 1")
    return int(text)


def level(text: str) -> float:
    """Parse the level of an interval."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


def device(text: str) -> str:
    """Parse a device. Unlike ``choices``, this also checks the environment variable."""
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DEVICES)}")
    return text


def score(source: Path, target: Path, task: Task, *, on_ray: bool) -> int:
    """Score a file into another, which appears once it is complete; return the number of rows.

    Raises
    ------
    InputError, StartError, UnknownModel
        If there is a fault in the rows, the models, the files or the cluster.
    """
    target = parquet.check_target(source, target)
    if on_ray:
        ray.connect()
        # A process must not take a GPU that Ray has not assigned to it.
        task = replace(task, device="cpu" if task.device == "auto" else task.device)
    # The schema of the output does not need a GPU here.
    scorer = load(replace(task, device="cpu") if on_ray else task)
    with parquet.opened(source) as file:
        rows: int = file.metadata.num_rows
        schema = scorer.schema(file.schema_arrow)
    if rows > MAX_ROWS:
        raise InputError("rows", f"at most {MAX_ROWS} are allowed, not {rows}")
    if on_ray:
        task = replace(scorer.task, device=task.device)
        scored = ray.scored(source, rows, task, scorer.table_rows)
    else:
        scored = in_threads(source, rows, scorer)
    with tqdm(total=rows, unit="row", unit_scale=True) as bar:
        parquet.write(target, schema, counted(scored, bar.update))
    return rows


def load(task: Task) -> Scorer:
    """Load the model.

    Raises
    ------
    StartError, UnknownModel
        If it cannot be loaded, or a name is needed and missing.
    """
    try:
        return Scorer(task)
    except InputError as error:
        # A fault of the command line, not of the file.
        raise StartError(f"--{error}") from None


def counted(scored: Iterator[pa.Table], count: Callable[[int], object]) -> Iterator[pa.Table]:
    """Count the rows of tables as they pass."""
    for table in scored:
        yield table
        count(len(table))


def in_threads(source: Path, rows: int, scorer: Scorer) -> Iterator[pa.Table]:
    """Score a file with one thread for each CPU, without reading far ahead."""
    threads = available()
    scoring: deque[Future[pa.Table]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for first, table in parquet.tables(source, range(rows), scorer.table_rows):
            scoring.append(pool.submit(scorer.score, table, first))
            if len(scoring) > threads:
                yield scoring.popleft().result()
        while scoring:
            yield scoring.popleft().result()
    finally:
        # The tables in progress take another second or two.
        pool.shutdown(cancel_futures=True)
