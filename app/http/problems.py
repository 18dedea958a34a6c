"""Errors as responses: problem documents (RFC 9457).

Under /v1 and /v2 they follow KServe's protocols: ``{"error": ...}``, and 400 in place of 422.
"""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import NamedTuple

import orjson
from fastapi import FastAPI, Request
from fastapi import Response as FastAPIResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from dropserve.app.errors import (
    DeadlineExceeded,
    Forbidden,
    InputError,
    LoadError,
    Misdirected,
    Overloaded,
    Unauthorized,
    UnknownModel,
)
from dropserve.app.http.bodies import LONGEST_PATH, Response
from dropserve.app.observability.record import RequestRecord

MEDIA_TYPE = "application/problem+json"
PROTOCOLS = ("/v1/", "/v2")
# Set in the scope of a request that FastAPI answers: its record.
RECORD = "dropserve.record"
# Most errors that a response lists: a body could have many.
MOST_ERRORS = 20
# Reason under which unexpected errors are counted.
ERROR = "error"
PHRASES = {status.value: status.phrase for status in HTTPStatus}
log = logging.getLogger(__name__)

REFUSALS = (
    InputError,
    UnknownModel,
    LoadError,
    Overloaded,
    DeadlineExceeded,
    Misdirected,
    Unauthorized,
    Forbidden,
)


class Problem(NamedTuple):
    """The client's view of an error, and the reason under which it is counted."""

    status: int
    detail: str
    rejected: str = "invalid"
    errors: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = {}


def problem_of(error: Exception) -> Problem:
    """Return the client's view of an error."""
    match error:
        case ValidationError():
            return invalid(
                [
                    (".".join(map(str, e["loc"]))[:LONGEST_PATH] or "body", e["msg"])
                    for e in error.errors(
                        include_url=False, include_input=False, include_context=False
                    )
                ]
            )
        case InputError():
            return invalid([(error.path, error.message)])
        case UnknownModel():
            return Problem(404, str(error))
        case LoadError():
            return Problem(400, str(error))
        case Overloaded():
            return Problem(503, str(error), "queue", headers={"retry-after": str(error.seconds)})
        case DeadlineExceeded():
            return Problem(504, str(error), "deadline")
        case Misdirected():
            return Problem(421, str(error), "host")
        case Unauthorized():
            challenge = {"www-authenticate": 'Bearer realm="dropserve"'}
            return Problem(401, str(error), "unauthorized", headers=challenge)
        case Forbidden():
            return Problem(403, str(error), "forbidden")
        case HTTPException():
            too_long = error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            rejected = "body" if too_long else "invalid"
            return Problem(error.status_code, error.detail, rejected, headers=error.headers or {})
    # The traceback is in the log, with the id that the client gets.
    return Problem(500, "an error of the service; its log says more", ERROR)


def invalid(errors: Sequence[tuple[str, str]]) -> Problem:
    """Return the problem of a body whose content is not allowed."""
    path, message = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Problem(422, f"{path}: {message}{more}", errors=errors[:MOST_ERRORS])


def respond(error: Exception, path: str, record: RequestRecord) -> Response:
    """Answer a request for ``path`` that met an error, and note that in its record."""
    problem = problem_of(error)
    record.rejected, record.status = problem.rejected, problem.status
    if problem.rejected == ERROR:
        log.error("request %s met an unexpected error", record.id, exc_info=error)
    if not path.startswith(PROTOCOLS):
        return write(problem, record.id)
    record.status = 400 if problem.status == 422 else problem.status
    return Response(
        record.status,
        orjson.dumps({"error": problem.detail}),
        [(b"content-type", b"application/json"), *raw(problem.headers)],
    )


def write(problem: Problem, request_id: str) -> Response:
    """Write a problem document."""
    document: dict[str, object] = {
        "type": "about:blank",
        "title": PHRASES[problem.status],
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
    }
    if problem.errors:
        document["errors"] = [
            {"path": path, "message": message} for path, message in problem.errors
        ]
    return Response(
        problem.status,
        orjson.dumps(document),
        [(b"content-type", MEDIA_TYPE.encode()), *raw(problem.headers)],
    )


def raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Encode headers for ASGI."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def register(app: FastAPI) -> None:
    """Have FastAPI answer with problem documents."""

    async def answer(request: Request, error: Exception) -> FastAPIResponse:
        status, content, headers = respond(error, request.scope["path"], request.scope[RECORD])
        response = FastAPIResponse(content, status)
        response.raw_headers += headers
        return response

    # Registered for each class: FastAPI would raise errors handled as Exception again once they are
    # answered.
    for kind in (HTTPException, ValidationError, *REFUSALS, Exception):
        app.add_exception_handler(kind, answer)
