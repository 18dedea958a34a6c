"""Answer requests: find the model, admit the request, run it, put the answer together.

Nothing here knows of HTTP: every transport calls these methods, with the record of its request.
"""

from pathlib import Path

import numpy as np

from dropserve.app.errors import InputError
from dropserve.app.inference import answers, batch
from dropserve.app.inference.admission import Admission, Admitted
from dropserve.app.inference.answers import Answer
from dropserve.app.inference.executor import Executor
from dropserve.app.inference.query import MasksQuery, PredictQuery, Query, draw_seed
from dropserve.app.inference.registry import Engines, Registry
from dropserve.app.inference.rows import check_count
from dropserve.app.inference.runner import ModelRunner
from dropserve.app.observability.record import RequestRecord
from dropserve.app.uncertainty import conformal, masks
from dropserve.app.uncertainty.masks import MaskStream
from dropserve.app.uncertainty.statistics import Samples
from dropserve.app.uncertainty.summary import Summary

# Most numbers in the samples of an answer that needs all of them at once: one that shows the
# passes, and one with a tolerance, which cannot tell beforehand how many passes it takes.
MAX_KEPT_VALUES = 1_000_000
# Lists and objects that a request may hold beside its rows.
LISTS_BESIDE = 1000


class Service:
    """The served models, and the limits of a request.

    Every request raises ``UnknownModel`` for a name or version that is not served, ``InputError``
    for content that is not allowed, ``Overloaded`` if the queue is full and ``DeadlineExceeded`` if
    its time is up before its work is done.

    Parameters
    ----------
    engines
        The models to start with.
    max_rows, max_passes, max_row_passes
        Most rows, passes of a row, and rows x passes of a request.
    queue_rows
        Most rows x passes of all requests together.
    folder
        The models folder; None: no models can be loaded later.
    """

    def __init__(
        self,
        engines: Engines,
        *,
        max_rows: int,
        max_passes: int,
        max_row_passes: int,
        queue_rows: int,
        folder: Path | None = None,
    ) -> None:
        self.executor = Executor()
        self.registry = Registry(engines, self.executor, folder)
        self.admission = Admission(queue_rows)
        self.max_rows = max_rows
        self.max_passes = max_passes
        self.max_row_passes = max_row_passes

    def close(self) -> None:
        """End the runs that are under way, and the thread of long ones."""
        self.registry.close()
        self.executor.close()

    async def predict(self, query: PredictQuery, record: RequestRecord) -> Answer:
        """Answer with class probabilities or values ``[B, C]`` in eval mode."""
        runner = self.registry.find(query.model, query.version)
        check_count(query.inputs, self.max_rows)
        with self._admit(runner, len(query.inputs), 0, record):
            outputs, largest = await runner.predict(query.inputs, record)
        if runner.is_classifier:
            labels = [runner.labels[place] for place in largest]
            return runner.identity | {"labels": labels, "probabilities": outputs}
        return runner.identity | {"values": outputs}

    async def uncertainty(self, query: Query, record: RequestRecord) -> Answer:
        """Answer with the statistics of train-mode passes."""
        runner = self._find(query)
        with self._admit(runner, len(query.inputs), query.passes, record):
            stream = self._masks(query, runner)
            if query.tolerance is None:
                passes = query.passes
                summary = await runner.summarize_passes(
                    query.inputs, stream, passes, query.interval, record
                )
            else:
                samples, summary = await self._sample(runner, query, stream, record)
                passes = len(samples)
            return answers.uncertainty(runner.manifest, query, stream.seed, passes, summary)

    async def debug(self, query: Query, record: RequestRecord) -> Answer:
        """Answer as ``uncertainty`` does, and with the passes themselves."""
        runner = self._find(query)
        with self._admit(runner, len(query.inputs), query.passes, record):
            stream = self._masks(query, runner)
            samples, summary = await self._sample(runner, query, stream, record)
            passes, rows = samples.shape[:2]
            deterministic = await runner.predict(query.inputs, record)
            kept = await runner.run_aside(lambda: kept_shares(runner, stream, rows, passes), record)
            return answers.uncertainty(
                runner.manifest, query, stream.seed, passes, summary
            ) | answers.passes(runner.manifest, samples, summary, deterministic, kept)

    async def masks(self, query: MasksQuery, record: RequestRecord) -> Answer:
        """Answer with the masks of the first pass of the first row."""
        runner = self.registry.find(query.model, query.version)
        self._check_passes(1, query.passes)
        with self._admit(runner, 1, 1, record):
            stream = masks.stream(query.masks, query.seed, runner.manifest.sites, query.passes)
            drawn = stream.draw(range(1), range(1))
        return runner.identity | {
            "sites": [
                {"name": site.name, "mask": drawn[site.mask_input][0].view(np.uint8)}
                for site in runner.manifest.sites
            ],
        }

    def most_lists(self) -> int:
        """Return the most lists and objects that the JSON of an allowed request may hold."""
        # Copies, as this may be called in another thread than the one that changes the models.
        models = [
            each
            for versions in list(self.registry.served.values())
            for each in list(versions.values())
        ]
        a_row = max((model.lists_a_row for model in models), default=1)
        return LISTS_BESIDE + self.max_rows * a_row

    def status(self) -> Answer:
        """Return the served versions of each model, and the device that runs them."""
        return {
            "device": self.registry.device,
            "provider": self.registry.provider,
            "models": {name: list(versions) for name, versions in self.registry.served.items()},
        }

    def _find(self, query: Query) -> ModelRunner:
        """Find the model of a query, and check the query against its limits."""
        runner = self.registry.find(query.model, query.version)
        check_count(query.inputs, self.max_rows)
        self._check_passes(len(query.inputs), query.passes)
        if query.coverage is not None:
            conformal.check(runner.manifest, query.coverage)
        return runner

    def _check_passes(self, rows: int, passes: int) -> None:
        """Raise InputError if a request asks for too many passes."""
        if passes > self.max_passes:
            raise InputError("passes", f"must be at most {self.max_passes}, not {passes}")
        if rows * passes > self.max_row_passes:
            raise InputError(
                "passes",
                f"rows x passes may be at most {self.max_row_passes}, not {rows} x {passes}",
            )

    def _admit(
        self, runner: ModelRunner, rows: int, passes: int, record: RequestRecord
    ) -> Admitted:
        """Admit a request, and note in its record what it asks for; 0 passes in eval mode."""
        record.model, record.version = runner.manifest.name, runner.manifest.version
        record.rows, record.passes = rows, passes
        size = rows * max(1, passes)
        pace = (runner.passes if passes else runner.predictions).pace
        return Admitted(self.admission, size, size * pace.unit)

    def _masks(self, query: Query, runner: ModelRunner) -> MaskStream:
        """Return the masks of a query, with its seed or one drawn for it."""
        seed = draw_seed() if query.seed is None else query.seed
        return masks.stream(query.masks, seed, runner.manifest.sites, query.passes)

    async def _sample(
        self, runner: ModelRunner, query: Query, stream: MaskStream, record: RequestRecord
    ) -> tuple[Samples, Summary]:
        """Run the passes of a query; return their samples, and the summary of these.

        Raises
        ------
        InputError
            If the samples would hold too many numbers.
        """
        values = len(query.inputs) * query.passes * len(runner.manifest.outputs.labels)
        if values > MAX_KEPT_VALUES:
            why = "here" if query.tolerance is None else "with a tolerance"
            raise InputError(
                "passes",
                f"rows x passes x outputs may be at most {MAX_KEPT_VALUES} {why}, not {values}",
            )
        samples = await runner.sample(query.inputs, stream, query.passes, query.tolerance, record)
        record.passes = len(samples)
        return samples, await runner.summarize(samples, query.interval, stream, record)


def kept_shares(runner: ModelRunner, stream: MaskStream, rows: int, passes: int) -> list[float]:
    """Return the share of units that the masks of a request kept, for each site."""
    kept = np.zeros(len(runner.manifest.sites))
    for row in range(rows):
        for some in batch.pieces(passes, runner.passes_a_piece):
            kept += batch.kept_share(stream, range(row, row + 1), some) * len(some)
    shares: list[float] = (kept / (rows * passes)).tolist()
    return shares
