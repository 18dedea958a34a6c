"""Metrics of the service, written for Prometheus.

Counting a request takes a few additions to plain numbers, a fraction of the time that the client
library's objects take. The library writes the exposition, with the sums over all workers.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from dropserve.app.observability.record import RequestRecord

SECONDS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = ("queue", "run", "total")
# Counts of the requests to a model, by model, version and kind (eval mode or train-mode passes),
# for `RequestStatistics`. They are no metrics of Prometheus, which has the same in other forms.
STATISTICS = "statistics"
EVAL, PASSES = "eval", "passes"

Labels = tuple[str, ...]
# A single number; or the count of each bucket, the last one unbounded, and the sum.
Numbers = list[float]
Counts = dict[tuple[str, Labels], Numbers]  # by family and labels


class Family(NamedTuple):
    """A family of counters, or of histograms if it has bounds."""

    help: str
    labels: Labels
    bounds: Sequence[float] = ()


FAMILIES = {
    "dropserve_requests": Family("Requests answered", ("route", "model", "version", "status")),
    "dropserve_request_seconds": Family(
        "Seconds that requests took: waiting for runs, in runs (shared ones in full), in all",
        ("route", "model", "version", "stage"),
        SECONDS,
    ),
    "dropserve_rows": Family("Rows of requests", ("route", "model", "version")),
    "dropserve_passes": Family("Rows x passes of requests", ("route", "model", "version")),
    "dropserve_rejected": Family("Requests refused", ("reason",)),
    "dropserve_batch_size": Family(
        "Rows, or rows x passes, of the runs of a graph", ("model", "version", "graph"), SIZES
    ),
    "dropserve_model_loads": Family("Versions loaded, or refused", ("model", "outcome")),
}


class Snapshot(NamedTuple):
    """The counts of one process, and its present state."""

    pid: int
    queue: int
    connections: int
    unread: int
    counts: Counts


class ModelInfo(NamedTuple):
    """A served version, and where it runs."""

    model: str
    version: str
    device: str
    provider: str


class RequestStatistics(NamedTuple):
    """What became of the requests to a model: numbers of requests and rows, sums of seconds."""

    succeeded: float = 0
    failed: float = 0
    rows: float = 0
    succeeded_seconds: float = 0
    failed_seconds: float = 0
    queue_seconds: float = 0
    run_seconds: float = 0


class Seen:
    """Counts of the requests with one route, model, version and status, of one kind."""

    def __init__(self) -> None:
        self.stages: list[Numbers] = [empty(SECONDS) for _ in STAGES]
        self.rows = 0
        self.passes = 0


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, int, int, bool], Seen] = {}
        self.rejected: Counter[str] = Counter()

    def count(self, record: RequestRecord, seconds: float) -> None:
        """Count a request whose response came ``seconds`` after it."""
        alike = (record.route, record.model, record.version, record.status, record.passes > 0)
        seen = self.seen.get(alike)
        if seen is None:
            seen = self.seen[alike] = Seen()
        queue, run, total = seen.stages
        queue[bisect_left(SECONDS, record.queue_seconds)] += 1
        queue[-1] += record.queue_seconds
        run[bisect_left(SECONDS, record.run_seconds)] += 1
        run[-1] += record.run_seconds
        total[bisect_left(SECONDS, seconds)] += 1
        total[-1] += seconds
        seen.rows += record.rows
        seen.passes += record.rows * record.passes
        if record.rejected:
            self.rejected[record.rejected] += 1

    def snapshot(
        self,
        *,
        pid: int,
        queue: int,
        connections: int,
        unread: int,
        loads: Mapping[tuple[str, str], int],
        batch_sizes: Iterable[tuple[tuple[str, str, str], int, int]],
    ) -> Snapshot:
        """Return the present counts.

        Parameters
        ----------
        pid
            The id of this process.
        queue, connections, unread
            Rows x passes being answered, open connections, and bytes of long responses that clients
            have yet to read.
        loads
            Number of versions loaded or refused, by name and outcome.
        batch_sizes
            (model, version, graph), size of a run, and number of such runs.
        """
        parts: list[Counts] = []
        for (route, model, number, status, passes), seen in self.seen.items():
            alike = (route, model, str(number or ""))
            part: Counts = {
                ("dropserve_requests", (*alike, str(status))): [sum(seen.stages[-1][:-1])],
                ("dropserve_request_seconds", (*alike, STAGES[-1])): seen.stages[-1],
            }
            if model:
                part["dropserve_rows", alike] = [seen.rows]
                part["dropserve_passes", alike] = [seen.passes]
                kind = (model, str(number), PASSES if passes else EVAL)
                part[STATISTICS, kind] = [*statistics_of(seen, status)]
                for stage, numbers in zip(STAGES, seen.stages, strict=True):
                    part["dropserve_request_seconds", (*alike, stage)] = numbers
            parts.append(part)
        for reason, number in self.rejected.items():
            parts.append({("dropserve_rejected", (reason,)): [number]})
        for version, number in loads.items():
            parts.append({("dropserve_model_loads", version): [number]})
        for graph, size, number in batch_sizes:
            numbers = empty(SIZES)
            numbers[bisect_left(SIZES, size)] = number
            numbers[-1] = size * number
            parts.append({("dropserve_batch_size", graph): numbers})
        return Snapshot(pid, queue, connections, unread, merged(parts))


def statistics_of(seen: Seen, status: int) -> RequestStatistics:
    """Return the statistics of requests that were answered with a status."""
    queue, run, total = seen.stages
    number = sum(total[:-1])
    if status != HTTPStatus.OK:
        return RequestStatistics(failed=number, failed_seconds=total[-1])
    return RequestStatistics(
        succeeded=number,
        rows=seen.rows,
        succeeded_seconds=total[-1],
        queue_seconds=queue[-1],
        run_seconds=run[-1],
    )


def empty(bounds: Sequence[float]) -> Numbers:
    """Return the numbers of a histogram without observations."""
    return [0.0] * (len(bounds) + 2)


def merged(parts: Iterable[Counts]) -> Counts:
    """Add up several counts."""
    total: Counts = {}
    for part in parts:
        for key, numbers in part.items():
            before = total.get(key)
            total[key] = (
                [*numbers]
                if before is None
                else [a + b for a, b in zip(before, numbers, strict=True)]
            )
    return total


def exposition(
    snapshots: Sequence[Snapshot],
    *,
    earlier: Sequence[Counts],
    deaths: int,
    silences: int,
    queue_limit: int,
    models: Iterable[ModelInfo],
) -> bytes:
    """Write all metrics in Prometheus' text format.

    Parameters
    ----------
    snapshots
        The snapshots of the workers that answer.
    earlier
        Last counts of others: of workers that died, or do not answer now.
    deaths
        Number of workers that died.
    silences
        How often a living worker did not answer in time.
    queue_limit
        Limit of rows x passes of one worker.
    models
        The served versions.
    """
    counts = merged([*earlier, *(snapshot.counts for snapshot in snapshots)])
    registry = CollectorRegistry()
    registry.register(
        Written(
            [
                *counters(counts),
                CounterMetricFamily("dropserve_worker_deaths", "Workers that died", deaths),
                CounterMetricFamily(
                    "dropserve_worker_silences",
                    "Times that a worker did not tell its metrics in time",
                    silences,
                ),
                *gauges(snapshots, queue_limit, models),
                *processes([snapshot.pid for snapshot in snapshots]),
            ]
        )
    )
    return generate_latest(registry)


class Written(Collector):
    """Hands finished metrics to the registry."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self.metrics


def counters(counts: Counts) -> Iterator[Metric]:
    """Make the families of counters and histograms."""
    for name, family in FAMILIES.items():
        own = {labels: numbers for (of, labels), numbers in counts.items() if of == name}
        if not family.bounds:
            counter = CounterMetricFamily(name, family.help, labels=family.labels)
            for labels, (number,) in own.items():
                counter.add_metric(labels, number)
            yield counter
            continue
        histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
        names = [*(str(float(bound)) for bound in family.bounds), "+Inf"]
        for labels, numbers in own.items():
            # Prometheus wants cumulative buckets.
            buckets = list(zip(names, accumulate(numbers[:-1]), strict=True))
            histogram.add_metric(labels, buckets, numbers[-1])
        yield histogram


def gauges(
    snapshots: Sequence[Snapshot], queue_limit: int, models: Iterable[ModelInfo]
) -> Iterator[Metric]:
    """Make the gauges of the present state."""
    queue = sum(snapshot.queue for snapshot in snapshots)
    limit = queue_limit * len(snapshots)
    connections = sum(snapshot.connections for snapshot in snapshots)
    unread = sum(snapshot.unread for snapshot in snapshots)
    for name, text, value in (
        ("queue_rows", "Rows x passes of the requests that are being answered", queue),
        ("queue_rows_limit", "Their limit", limit),
        ("connections", "Open connections", connections),
        ("unread_bytes", "Bytes of long responses that clients have yet to read", unread),
        ("workers", "Worker processes that answer", len(snapshots)),
    ):
        yield GaugeMetricFamily(f"dropserve_{name}", text, value)
    info = GaugeMetricFamily(
        "dropserve_model_info",
        "The served versions, with device and provider",
        labels=["model", "version", "device", "provider"],
    )
    for model in models:
        info.add_metric(model, 1)
    yield info


def processes(pids: Sequence[int]) -> Iterator[Metric]:
    """Make the client library's process metrics for several processes, with the pid as a label."""
    found: dict[str, Metric] = {}
    for pid in pids:
        for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
            samples, family.samples = family.samples, []
            known = found.setdefault(family.name, family)
            for sample in samples:
                known.add_sample(sample.name, {"pid": str(pid)}, sample.value)
    yield from found.values()
