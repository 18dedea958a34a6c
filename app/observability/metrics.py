"""Count what the service does, and write it for Prometheus.

A request costs a few additions to plain numbers, a fraction of what the client library's own
objects cost. The library writes them when they are asked for; with several workers, the sum of
what each has counted.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from dropserve.app.inference.service import Service
from dropserve.app.observability.record import Call

SECONDS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = ("queue", "run", "total")

Labels = tuple[str, ...]
# A single number; or how many were observed in each bucket, the last without a bound, and their
# sum.
Numbers = list[float]
Counts = dict[tuple[str, Labels], Numbers]  # by family and labels


class Family(NamedTuple):
    """A family of counters, or of histograms where it has bounds."""

    says: str
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
    """What one process has counted, and how it is at the moment."""

    pid: int
    queue: int
    connections: int
    counts: Counts


class Seen:
    """What was counted of requests alike in route, model, version and status."""

    def __init__(self) -> None:
        self.stages: list[Numbers] = [empty(SECONDS) for _ in STAGES]
        self.rows = 0
        self.passes = 0


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, int, int], Seen] = {}
        self.rejected: Counter[str] = Counter()

    def count(self, call: Call, status: int, seconds: float) -> None:
        """Count a request that was answered so many ``seconds`` after it came."""
        alike = (call.route, call.model, call.version, status)
        seen = self.seen.get(alike)
        if seen is None:
            seen = self.seen[alike] = Seen()
        queue, run, total = seen.stages
        queue[bisect_left(SECONDS, call.queued)] += 1
        queue[-1] += call.queued
        run[bisect_left(SECONDS, call.ran)] += 1
        run[-1] += call.ran
        total[bisect_left(SECONDS, seconds)] += 1
        total[-1] += seconds
        seen.rows += call.rows
        seen.passes += call.rows * call.passes
        if call.rejected:
            self.rejected[call.rejected] += 1

    def snapshot(self, pid: int, service: Service, connections: int) -> Snapshot:
        """Say what was counted here, and by a service."""
        parts: list[Counts] = []
        for (route, model, number, status), seen in self.seen.items():
            alike = (route, model, str(number or ""))
            part: Counts = {
                ("dropserve_requests", (*alike, str(status))): [sum(seen.stages[-1][:-1])],
                ("dropserve_request_seconds", (*alike, STAGES[-1])): seen.stages[-1],
            }
            if model:
                part["dropserve_rows", alike] = [seen.rows]
                part["dropserve_passes", alike] = [seen.passes]
                for stage, numbers in zip(STAGES, seen.stages, strict=True):
                    part["dropserve_request_seconds", (*alike, stage)] = numbers
            parts.append(part)
        for reason, number in self.rejected.items():
            parts.append({("dropserve_rejected", (reason,)): [number]})
        for version, number in service.models.loads.items():
            parts.append({("dropserve_model_loads", version): [number]})
        for graph, size, number in service.models.sizes():
            numbers = empty(SIZES)
            numbers[bisect_left(SIZES, size)] = number
            numbers[-1] = size * number
            parts.append({("dropserve_batch_size", graph): numbers})
        return Snapshot(pid, service.queue.held, connections, merged(parts))


def empty(bounds: Sequence[float]) -> Numbers:
    """Return the numbers of a histogram in which nothing was observed."""
    return [0.0] * (len(bounds) + 2)


def merged(parts: Iterable[Counts]) -> Counts:
    """Add up what was counted in several places."""
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


def exposition(snapshots: Sequence[Snapshot], gone: Counts, deaths: int, service: Service) -> bytes:
    """Write how a service does, in Prometheus' text format.

    Parameters
    ----------
    snapshots
        Of the processes that serve.
    gone
        What those have counted that died.
    deaths
        How many did.
    service
        Of the process that writes.
    """
    counts = merged([gone, *(snapshot.counts for snapshot in snapshots)])
    registry = CollectorRegistry()
    registry.register(
        Written(
            [
                *counters(counts),
                CounterMetricFamily("dropserve_worker_deaths", "Workers that died", deaths),
                *gauges(snapshots, service),
                *processes([snapshot.pid for snapshot in snapshots]),
            ]
        )
    )
    return generate_latest(registry)


class Written(Collector):
    """Hands the registry what is to be written."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self.metrics


def counters(counts: Counts) -> Iterator[Metric]:
    """Write what was counted."""
    for name, family in FAMILIES.items():
        own = {labels: numbers for (of, labels), numbers in counts.items() if of == name}
        if not family.bounds:
            counter = CounterMetricFamily(name, family.says, labels=family.labels)
            for labels, (number,) in own.items():
                counter.add_metric(labels, number)
            yield counter
            continue
        histogram = HistogramMetricFamily(name, family.says, labels=family.labels)
        names = [*(str(float(bound)) for bound in family.bounds), "+Inf"]
        for labels, numbers in own.items():
            # Prometheus wants the buckets added up from below.
            buckets = list(zip(names, accumulate(numbers[:-1]), strict=True))
            histogram.add_metric(labels, buckets, numbers[-1])
        yield histogram


def gauges(snapshots: Sequence[Snapshot], service: Service) -> Iterator[Metric]:
    """Write how things are at the moment."""
    queue = sum(snapshot.queue for snapshot in snapshots)
    limit = service.queue.most * len(snapshots)
    connections = sum(snapshot.connections for snapshot in snapshots)
    for name, says, value in (
        ("queue_rows", "Rows x passes of the requests that are being answered", queue),
        ("queue_rows_limit", "What these may be at most", limit),
        ("connections", "Open connections", connections),
        ("workers", "Worker processes", len(snapshots)),
    ):
        yield GaugeMetricFamily(f"dropserve_{name}", says, value)
    info = GaugeMetricFamily(
        "dropserve_model_info",
        "The versions that are served, and on what",
        labels=["model", "version", "device", "provider"],
    )
    for name, versions in service.models.served.items():
        for version, model in versions.items():
            info.add_metric([name, str(version), model.engine.device, model.engine.provider], 1)
    yield info


def processes(pids: Sequence[int]) -> Iterator[Metric]:
    """Describe processes as the client library does its own, with their numbers as a label."""
    found: dict[str, Metric] = {}
    for pid in pids:
        for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
            samples, family.samples = family.samples, []
            known = found.setdefault(family.name, family)
            for sample in samples:
                known.add_sample(sample.name, {"pid": str(pid)}, sample.value)
    yield from found.values()
