"""A service called from ordinary code: one request at a time, without HTTP."""

import asyncio
from types import TracebackType

from dropserve.app.inference.answers import Answer
from dropserve.app.inference.query import Query
from dropserve.app.inference.service import Service
from dropserve.app.observability.record import RequestRecord


class BlockingService:
    """Answers a query before it returns; a context manager that closes the service at its end."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.runner = asyncio.Runner()

    def uncertainty(self, query: Query) -> Answer:
        """Answer with the statistics of train-mode passes."""
        return self.runner.run(self.service.uncertainty(query, RequestRecord()))

    def debug(self, query: Query) -> Answer:
        """Answer with the passes themselves, too."""
        return self.runner.run(self.service.debug(query, RequestRecord()))

    def __enter__(self) -> "BlockingService":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.service.close()
        self.runner.close()
