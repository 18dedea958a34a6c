"""``python -m app score``: the uncertainty of each row of a Parquet file, in bounded memory.

Parts of the file are scored by the threads of one machine or, with ``--ray``, by the processes of a
cluster; they come back, and are written, in order.
"""

import argparse
import logging
import os
import secrets
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from app.commandline import OneLineParser
from app.cpus import available
from app.device import Device
from app.errors import InputError, StartError, UnknownModel
from app.runs import pieces
from app.scoring import MAX_ROWS, Scorer, Task
from app.service import SEED_BITS
from app.settings import Settings

# Rows that are read, scored and written together.
TABLE_ROWS = 8192
# Rows that a process of a cluster is given at once: to reach them it reads what is before.
PART_ROWS = 8 * TABLE_ROWS
# The exit status of what was told to end, as shells have it.
INTERRUPTED = 128 + signal.SIGINT
# What of a column is read at once.
BUFFER_BYTES = 2**18


def command(arguments: Sequence[str]) -> int:
    """Run the command line after ``score``; return the exit status."""
    options = build_parser().parse_args(arguments)
    seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
    task = Task(
        options.models.resolve(),
        options.device,
        options.model,
        options.version,
        options.passes,
        seed,
        options.interval,
    )
    # As Ctrl-C does: what is half written goes.
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
    except pa.ArrowInvalid as error:
        print(f"error: {str(options.input)!r} is no Parquet file: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or options.input
        # Arrow's own text repeats the path.
        what = os.strerror(error.errno) if error.errno else error
        print(f"error: {str(where)!r}: {what}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}: {rows} rows, {options.passes} passes each, seed {seed}")
    return 0


def build_parser() -> OneLineParser:
    """Describe the command line."""
    parser = OneLineParser(
        prog="python -m app score",
        description="Run train-mode passes of each row of a Parquet file, and write what they say.",
    )
    parser.add_argument("input", type=Path, metavar="IN.parquet")
    parser.add_argument("output", type=Path, metavar="OUT.parquet", help="replaced if it is there")
    parser.add_argument("--passes", type=positive, default=100, help="of each row (default: 100)")
    parser.add_argument("--seed", type=seed, help="of the masks; drawn and told if not given")
    parser.add_argument("--interval", type=level, default=0.9, help="its level (default: 0.9)")
    parser.add_argument("--model", help="needed where there are several")
    parser.add_argument("--version", type=positive, help="the newest by default")
    parser.add_argument("--models", type=Path, default=default("models"), help="folder of bundles")
    parser.add_argument("--device", choices=("auto", *get_args(Device)), default=default("device"))
    parser.add_argument(
        "--ray", action="store_true", help="on a Ray cluster: $RAY_ADDRESS, or one started here"
    )
    return parser


def default(name: str) -> object:
    """Return what a setting of the service is, by its variable or its default."""
    return os.environ.get(f"DROPSERVE_{name.upper()}") or Settings.model_fields[name].default


def positive(text: str) -> int:
    """Read a whole number that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def seed(text: str) -> int:
    """Read a seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2^63 - 1")
    return int(text)


def level(text: str) -> float:
    """Read the level of an interval."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return value


def score(source: Path, target: Path, task: Task, *, on_ray: bool) -> int:
    """Score a file into another, which is there once it is whole; return the number of rows.

    Raises
    ------
    InputError, StartError, UnknownModel, OSError, pyarrow.ArrowInvalid
        If something is wrong with the rows, the models or the files.
    """
    scorer = Scorer(task)
    with open_parquet(source) as file:
        rows: int = file.metadata.num_rows
        schema = scorer.schema(file.schema_arrow)
    if rows > MAX_ROWS:
        raise InputError("rows", f"at most {MAX_ROWS} are allowed, not {rows}")
    scored = (
        across_cluster(source, rows, scorer.task) if on_ray else in_threads(source, rows, scorer)
    )
    try:
        descriptor, beside = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    try:
        with (
            os.fdopen(descriptor, "wb") as new,
            pq.ParquetWriter(new, schema) as writer,
            tqdm(total=rows, unit="row", unit_scale=True) as bar,
        ):
            for table in scored:
                writer.write_table(table)
                bar.update(len(table))
        # As open() would make it, not as only its maker may read it.
        os.chmod(beside, 0o666 & ~umask())
        os.replace(beside, target)
    except BaseException:
        os.unlink(beside)
        raise
    return rows


def umask() -> int:
    """Return what new files may not be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def in_threads(source: Path, rows: int, scorer: Scorer) -> Iterator[pa.Table]:
    """Score a file with as many threads as there are CPUs; little more than they have is read."""
    threads = available()
    scoring: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for first, table in tables(source, range(rows)):
            scoring.append(pool.submit(scorer.score, table, first))
            if len(scoring) > threads:
                yield scoring.popleft().result()
        while scoring:
            yield scoring.popleft().result()


class RayScorer:
    """Scores parts of a file in a process of a Ray cluster, which reads them itself."""

    def __init__(self, source: Path, task: Task) -> None:
        self.source = source
        self.scorer = Scorer(task)

    def __call__(self, parts: dict[str, Any]) -> Iterator[pa.Table]:
        """Score the parts that begin and end at some rows."""
        for start, stop in zip(parts["start"], parts["stop"], strict=True):
            for first, table in tables(self.source, range(start, stop)):
                yield self.scorer.score(table, first)


def across_cluster(source: Path, rows: int, task: Task) -> Iterator[pa.Table]:
    """Score a file, which all nodes can read, with Ray Data."""
    import ray

    # A cluster started here reports to nobody how it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # There is one bar, that of the rows written.
    context.enable_progress_bars = False
    # What goes wrong is raised here, too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    parts = [{"start": part.start, "stop": part.stop} for part in pieces(rows, PART_ROWS)]
    gpus = int(task.device in ("cuda", "tensorrt"))
    units = ray.cluster_resources()["GPU" if gpus else "CPU"]  # type: ignore[no-untyped-call] # Ray does not type it
    scored = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        RayScorer,
        fn_constructor_args=(source.resolve(), task),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=int(units)),
        num_cpus=1,
        num_gpus=gpus,
    )
    try:
        yield from scored.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayTaskError as error:
        # What was raised over there.
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise StartError(f"Ray: {str(error).strip().splitlines()[-1]}") from None


def open_parquet(source: Path) -> pq.ParquetFile:
    """Open a file to be read bit by bit."""
    return pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)


def tables(source: Path, rows: range) -> Iterator[tuple[int, pa.Table]]:
    """Read some rows of a file: tables of ``TABLE_ROWS``, and the number of each one's first."""
    with open_parquet(source) as file:
        start, groups = 0, []
        for number in range(file.num_row_groups):
            stop = start + file.metadata.row_group(number).num_rows
            if start < rows.stop and stop > rows.start:
                groups.append((number, start))
            start = stop
        first, held = rows.start, []
        at = groups[0][1] if groups else 0
        numbers = [number for number, _ in groups]
        for batch in file.iter_batches(TABLE_ROWS, row_groups=numbers, use_threads=False):
            some = batch.slice(max(0, rows.start - at), rows.stop - max(at, rows.start))
            at += len(batch)
            held.append(some)
            while sum(map(len, held)) >= TABLE_ROWS:
                table = pa.Table.from_batches(held)
                yield first, table.slice(0, TABLE_ROWS)
                first += TABLE_ROWS
                held = table.slice(TABLE_ROWS).to_batches()
            if at >= rows.stop:
                break
        if sum(map(len, held)):
            yield first, pa.Table.from_batches(held)
