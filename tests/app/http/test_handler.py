"""The handler of an endpoint: a request's bytes to a response's bytes, without a server."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from dropserve.app.http import app
from dropserve.app.http.bodies import Response
from dropserve.app.http.context import Context
from dropserve.app.http.handler import Application, Endpoint
from dropserve.app.inference.admission import Admission
from dropserve.app.inference.executor import Executor
from dropserve.app.inference.registry import load_engines
from dropserve.app.inference.service import Service
from dropserve.app.observability.logs import RequestLog
from dropserve.app.observability.metrics import Metrics
from dropserve.app.observability.record import RequestRecord
from dropserve.app.security.hosts import Hosts

JSON = {b"content-type": b"application/json"}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    with (tmp_path_factory.mktemp("log") / "log").open("w") as log:
        yield Context(
            keys=None,
            hosts=Hosts(()),
            allow_local_admin=False,
            timeout_ms=60_000,
            metrics=Metrics(),
            log=RequestLog(log.fileno()),
            spans=None,
        )


@pytest.fixture(scope="module")
def application(built: Path, context: Context) -> Iterator[Application]:
    service = Service(
        load_engines(built / "models", "cpu"),
        max_rows=10,
        max_passes=100,
        max_row_passes=1000,
        queue_rows=1000,
    )

    async def nothing(*_: object) -> Any:
        return b""

    yield app.create(
        service,
        debug=False,
        max_body_bytes=10_000,
        unread=Admission(10_000_000),
        context=context,
        load=nothing,
        unload=nothing,
        index=nothing,
        metrics=nothing,
        counts=nothing,
        startup=lambda: None,
        shutdown=nothing,
    )
    service.close()


def respond(
    endpoint: Endpoint[Any, Any], path: str, body: bytes, record: RequestRecord
) -> Coroutine[Any, Any, Response]:
    """Have an endpoint respond to a request that has arrived, from a client that stays."""

    async def read() -> bytes:
        return body

    return endpoint.respond(path, JSON, read, lambda work: work, record)


def handled(
    endpoint: Endpoint[Any, Any], path: str, document: object
) -> tuple[Response, RequestRecord]:
    """Handle a request on an event loop of its own."""
    record = RequestRecord("POST", path, "an-id")
    return asyncio.run(respond(endpoint, path, json.dumps(document).encode(), record)), record


def test_the_bytes_of_a_request_become_those_of_its_response(
    application: Application, examples: Callable[[str], list[Any]]
) -> None:
    body = {"model": "digits", "inputs": examples("digits")[:2]}
    response, record = handled(application.endpoints["/predict"], "/predict", body)
    assert response.status == record.status == 200
    assert (b"x-request-id", b"an-id") in response.headers
    answer = json.loads(response.content)
    assert (answer["model"], answer["version"], len(answer["labels"])) == ("digits", 1, 2)
    assert [len(row) for row in answer["probabilities"]] == [10, 10]
    assert (record.model, record.version, record.rows, record.passes) == ("digits", 1, 2, 0)


def test_while_requests_come_one_at_a_time_each_is_handled_without_a_turn_of_the_loop(
    application: Application, examples: Callable[[str], list[Any]]
) -> None:
    endpoint = application.endpoints["/predict"]
    body = json.dumps({"model": "digits", "inputs": examples("digits")[:1]}).encode()

    async def main() -> Response:
        for _ in range(2):
            await respond(endpoint, "/predict", body, RequestRecord())
            await asyncio.sleep(0)
        # Driven by hand, as a parser's callback would, with no task.
        with pytest.raises(StopIteration) as done:
            respond(endpoint, "/predict", body, RequestRecord()).send(None)
        response: Response = done.value.value
        return response

    assert asyncio.run(main()).status == 200


@pytest.mark.parametrize(
    ("path", "document", "status", "said"),
    [
        ("/predict", {"inputs": [[1]]}, 422, "model: is needed, one of: diabetes, digits, double"),
        ("/predict", {"inputs": [[1]], "model": "x"}, 404, "no model 'x'"),
        ("/uncertainty", {"inputs": [[1]], "model": "digits", "passes": 101}, 422, "at most 100"),
        ("/uncertainty", {"inputs": [], "passes": 0}, 422, "passes"),
    ],
)
def test_an_error_is_a_response_and_noted_in_the_record(
    application: Application, path: str, document: object, status: int, said: str
) -> None:
    response, record = handled(application.endpoints[path], path, document)
    problem = json.loads(response.content)
    assert (response.status, record.status, record.rejected) == (status, status, "invalid")
    assert problem["status"] == status
    assert problem["request_id"] == "an-id"
    assert said in problem["detail"]


def test_a_fault_of_the_service_is_logged_and_tells_the_client_nothing(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(asked: object, record: RequestRecord) -> Awaitable[Response]:
        raise ZeroDivisionError("a secret")

    endpoint = Endpoint(
        "/x",
        "predict",
        lambda request: None,
        answer,
        lambda response: response,
        context=context,
        admission=Admission(1),
        max_body_bytes=1,
        bodies=Admission(1),
        unread=Admission(1),
        executor=Executor(),
    )
    with caplog.at_level(logging.ERROR):
        response, record = handled(endpoint, "/x", {})
    assert (response.status, record.rejected) == (500, "error")
    assert b"secret" not in response.content
    assert "an-id" in caplog.text
    assert "ZeroDivisionError: a secret" in caplog.text
