"""Turn what went wrong into problem documents (RFC 9457); the one place that does."""

import re
import uuid
from collections.abc import Sequence
from http import HTTPStatus

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from app.errors import InputError, UnknownModel

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "x-request-id"
# A request's own id is repeated only where it can do no harm in a header or a log.
SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# A body chooses the names of its fields, and could choose long ones and many.
MOST_ERRORS = 20
LONGEST_PATH = 200
UNEXPECTED = 500


class BodyError(Exception):
    """A body that cannot be taken, whatever it says."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def request_id(request: Request) -> str:
    """Return the id the client gave its request, or a new one."""
    given = request.headers.get(REQUEST_ID, "")
    return given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex


def problem(
    request: Request,
    status: int,
    detail: str,
    errors: Sequence[tuple[str, str]] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    """Write a problem document."""
    name = request_id(request)
    document: dict[str, object] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": name,
    }
    if errors:
        document["errors"] = [{"path": path, "message": message} for path, message in errors]
    return Response(
        orjson.dumps(document),
        status,
        {REQUEST_ID: name} | (headers or {}),
        media_type=MEDIA_TYPE,
    )


def invalid(request: Request, errors: Sequence[tuple[str, str]]) -> Response:
    """Write the problem document of a body whose content is not allowed."""
    path, message = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return problem(request, 422, f"{path}: {message}{more}", errors[:MOST_ERRORS])


def respond(request: Request, error: Exception) -> Response:
    """Write the problem document of an error."""
    match error:
        case BodyError():
            return problem(request, error.status, error.detail)
        case ValidationError():
            found = [
                (".".join(map(str, e["loc"]))[:LONGEST_PATH] or "body", e["msg"])
                for e in error.errors(include_url=False, include_input=False, include_context=False)
            ]
            return invalid(request, found)
        case InputError():
            return invalid(request, [(error.path, error.message)])
        case UnknownModel():
            return problem(request, 404, str(error))
        case HTTPException():
            return problem(
                request, error.status_code, error.detail, headers=dict(error.headers or {})
            )
    # The server's log gets the trace; the client learns the id to ask for.
    return problem(request, UNEXPECTED, "an error of the service; its log says more")


def register(app: FastAPI) -> None:
    """Teach an app to answer with problem documents what no endpoint answers."""

    async def handle(request: Request, error: Exception) -> Response:
        return respond(request, error)

    app.add_exception_handler(HTTPException, handle)
    app.add_exception_handler(Exception, handle)
