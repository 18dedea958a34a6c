"""Triton's statistics extension: what became of the requests to each model.

The counts are those of all workers since the service started, and of all endpoints: a row that
``/predict`` answers counts for NAME, one of ``/uncertainty`` for NAME.mc.

References
----------
https://github.com/triton-inference-server/server, ``docs/protocol/extension_statistics.md``
"""

from collections.abc import Awaitable, Callable, Iterator

from fastapi import APIRouter
from fastapi.params import Depends as Dependency

from dropserve.app.http.schemas import (
    InferenceStatistics,
    ModelStatistics,
    Statistic,
    VersionStatistics,
)
from dropserve.app.http.v2.infer import Target, parse_target
from dropserve.app.inference.registry import Registry
from dropserve.app.observability.metrics import (
    EVAL,
    PASSES,
    STATISTICS,
    Counts,
    RequestStatistics,
)
from dropserve.export.bundle import RESERVED_SUFFIX as MC


def router(
    registry: Registry, counts: Callable[[], Awaitable[Counts]], guard: Dependency
) -> APIRouter:
    """Return the routes of the statistics.

    Parameters
    ----------
    registry
        The served models.
    counts
        Returns the counts of all workers.
    guard
        Admits requests about a model.
    """
    routes = APIRouter(prefix="/v2/models", dependencies=[guard])

    async def of(*targets: Target) -> ModelStatistics:
        # Before the counts: the models may change meanwhile.
        asked = [(target, version) for target in targets for version in versions(target)]
        found = await counts()
        return ModelStatistics(model_stats=[statistics(*each, found) for each in asked])

    def versions(target: Target) -> Iterator[int]:
        if target.version is None:
            yield from registry.versions(target.name)
        else:
            registry.find(target.name, target.version)
            yield target.version

    # Before the routes of a model, which could have this name.
    @routes.get("/stats")
    async def all_models() -> ModelStatistics:
        """Return the statistics of every served version."""
        names = sorted(registry.served)
        return await of(*(Target(name, None, mc) for name in names for mc in (False, True)))

    @routes.get("/{name}/stats")
    async def model(name: str) -> ModelStatistics:
        """Return the statistics of all versions of a model."""
        return await of(parse_target(name, None))

    @routes.get("/{name}/versions/{version}/stats")
    async def model_version(name: str, version: str) -> ModelStatistics:
        """Return the statistics of a version of a model."""
        return await of(parse_target(name, version))

    return routes


def statistics(target: Target, version: int, counts: Counts) -> VersionStatistics:
    """Return the statistics of a version of a model."""
    kind, graph = (PASSES, "stochastic") if target.mc else (EVAL, "predict")
    labels = (target.name, str(version))
    found = RequestStatistics(*counts.get((STATISTICS, (*labels, kind)), ()))
    # The last number is the sum of the sizes.
    *runs, _ = counts.get(("dropserve_batch_size", (*labels, graph)), [0.0])
    succeeded = found.succeeded
    return VersionStatistics(
        name=target.name + MC if target.mc else target.name,
        version=str(version),
        inference_count=int(found.rows),
        execution_count=int(sum(runs)),
        inference_stats=InferenceStatistics(
            success=statistic(succeeded, found.succeeded_seconds),
            fail=statistic(found.failed, found.failed_seconds),
            queue=statistic(succeeded, found.queue_seconds),
            # Part of the runs.
            compute_input=statistic(succeeded, 0),
            compute_infer=statistic(succeeded, found.run_seconds),
            compute_output=statistic(succeeded, 0),
        ),
        batch_stats=[],
    )


def statistic(number: float, seconds: float) -> Statistic:
    """Return a number of requests, and the time that they took."""
    return Statistic(count=int(number), ns=round(seconds * 1e9))
