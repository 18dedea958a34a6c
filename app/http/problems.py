"""Turn what went wrong into answers: problem documents (RFC 9457); the one place that does.

Under /v2 they are as the Open Inference Protocol has them: ``{"error": ...}``, and 400 where a
body's content is not allowed.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import NamedTuple

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from dropserve.app.errors import (
    DeadlineExceeded,
    Forbidden,
    InputError,
    LoadError,
    Overloaded,
    Unauthorized,
    UnknownModel,
)
from dropserve.app.http.responses import Reply
from dropserve.app.observability.record import Call

MEDIA_TYPE = "application/problem+json"
PROTOCOL = "/v2"
# Where a request's ``Call`` stands in its scope.
CALL = "dropserve.call"
# A body chooses the names of its fields, and could choose long ones and many.
MOST_ERRORS = 20
LONGEST_PATH = 200
UNEXPECTED = 500
PHRASES = {status.value: status.phrase for status in HTTPStatus}


class BodyError(Exception):
    """A request that cannot be taken, whatever its body says."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


REFUSALS = (
    BodyError,
    InputError,
    UnknownModel,
    LoadError,
    Overloaded,
    DeadlineExceeded,
    Unauthorized,
    Forbidden,
)


class Fault(NamedTuple):
    """What a client is told of an error, and the reason under which it is counted."""

    status: int
    detail: str
    rejected: str = "invalid"
    errors: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = {}


def fault(error: Exception) -> Fault:
    """Say what a client is told of an error."""
    match error:
        case BodyError():
            too_long = error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            return Fault(error.status, error.detail, "body" if too_long else "invalid")
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
            return Fault(404, str(error))
        case LoadError():
            return Fault(400, str(error))
        case Overloaded():
            return Fault(503, str(error), "queue", headers={"retry-after": str(error.seconds)})
        case DeadlineExceeded():
            return Fault(504, str(error), "deadline")
        case Unauthorized():
            challenge = {"www-authenticate": 'Bearer realm="dropserve"'}
            return Fault(401, str(error), "unauthorized", headers=challenge)
        case Forbidden():
            return Fault(403, str(error), "forbidden")
        case HTTPException():
            return Fault(error.status_code, error.detail, headers=error.headers or {})
    # The server's log gets the trace; the client learns the id to ask for.
    return Fault(UNEXPECTED, "an error of the service; its log says more", "error")


def invalid(errors: Sequence[tuple[str, str]]) -> Fault:
    """Say what is not allowed in a body's content."""
    path, message = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Fault(422, f"{path}: {message}{more}", errors=errors[:MOST_ERRORS])


def respond(scope: Scope, error: Exception) -> Reply:
    """Write the answer of a request that met an error."""
    found = fault(error)
    call: Call = scope[CALL]
    call.rejected = found.rejected
    if scope["path"].startswith(PROTOCOL):
        status = 400 if found.status == 422 else found.status
        return Reply(
            status,
            orjson.dumps({"error": found.detail}),
            [(b"content-type", b"application/json"), *raw(found.headers)],
        )
    return problem(found, call.id)


def problem(found: Fault, name: str) -> Reply:
    """Write a problem document for the request of some name."""
    document: dict[str, object] = {
        "type": "about:blank",
        "title": PHRASES[found.status],
        "status": found.status,
        "detail": found.detail,
        "request_id": name,
    }
    if found.errors:
        document["errors"] = [{"path": path, "message": message} for path, message in found.errors]
    return Reply(
        found.status,
        orjson.dumps(document),
        [(b"content-type", MEDIA_TYPE.encode()), *raw(found.headers)],
    )


def raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Write headers as ASGI has them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def register(app: FastAPI) -> None:
    """Teach an app to answer with problem documents what no endpoint answers."""

    async def handle(request: Request, error: Exception) -> Response:
        reply = respond(request.scope, error)
        response = Response(reply.content, reply.status)
        response.raw_headers += reply.headers
        return response

    # By name: what is left to ``Exception`` is raised again once it is answered.
    for kind in (HTTPException, ValidationError, *REFUSALS, Exception):
        app.add_exception_handler(kind, handle)
