"""Score a file on a Ray cluster, with Ray Data."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from dropserve.app.errors import StartError
from dropserve.app.inference.batch import pieces
from dropserve.app.scoring.parquet import tables
from dropserve.app.scoring.scorer import Scorer, Task

# Tables of one task: to reach them, a process must read the rows before them in the row group.
TABLES_AT_ONCE = 8


class RayScorer:
    """Reads and scores parts of a file, in a process of the cluster."""

    def __init__(self, source: Path, task: Task) -> None:
        self.source = source
        self.scorer = Scorer(task)

    def __call__(self, parts: dict[str, Any]) -> Iterator[pa.Table]:
        """Score the parts from ``start`` to ``stop``."""
        for start, stop in zip(parts["start"], parts["stop"], strict=True):
            for first, table in tables(self.source, range(start, stop), self.scorer.table_rows):
                yield self.scorer.score(table, first)


def connect() -> None:
    """Connect to the cluster at ``$RAY_ADDRESS``, or start one here.

    Raises
    ------
    StartError
        If Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise StartError("--ray needs Ray: install the extra 'ray'") from None
    # A cluster started here sends no usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise StartError(f"no Ray cluster at {where}: {str(error).splitlines()[0]}") from None


def scored(source: Path, rows: int, task: Task, table_rows: int) -> Iterator[pa.Table]:
    """Score a file that all nodes can read; return the tables in order.

    Raises
    ------
    InputError, StartError
        As for a ``Scorer``, or if the cluster fails.
    """
    import ray

    parts = [{"start": p.start, "stop": p.stop} for p in pieces(rows, TABLES_AT_ONCE * table_rows)]
    if not parts:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # The command shows a progress bar of its own.
    context.enable_progress_bars = False
    # Ray's errors are raised below, so it need not log them.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    gpus = int(task.device in ("cuda", "tensorrt"))
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call] # Ray does not type it
    # An autoscaling cluster may not have any yet.
    most = max(1, int(resources.get("GPU" if gpus else "CPU", 1)))
    found = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        RayScorer,
        fn_constructor_args=(source.resolve(), task),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=1,
        num_gpus=gpus,
    )
    try:
        yield from found.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise StartError(f"Ray: {str(error).strip().splitlines()[-1]}") from None
