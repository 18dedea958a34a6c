"""Turn what went wrong into problem documents (RFC 9457); the one place that does."""

import re
import uuid
from collections.abc import Sequence
from http import HTTPStatus

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.errors import DebugOff, InputError, UnknownModel

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "x-request-id"
# A request's own id is repeated only where it can do no harm in a header or a log.
SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# A body chooses the names of its fields, and could choose long ones and many.
MOST_ERRORS = 20
LONGEST_PATH = 200


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


def register(app: FastAPI) -> None:
    """Teach an app to answer with problem documents."""

    @app.exception_handler(BodyError)
    async def body(request: Request, error: BodyError) -> Response:
        return problem(request, error.status, error.detail)

    @app.exception_handler(ValidationError)
    async def validation(request: Request, error: ValidationError) -> Response:
        found = [
            (".".join(map(str, e["loc"]))[:LONGEST_PATH] or "body", e["msg"])
            for e in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        return invalid(request, found)

    @app.exception_handler(InputError)
    async def content(request: Request, error: InputError) -> Response:
        return invalid(request, [(error.path, error.message)])

    @app.exception_handler(UnknownModel)
    async def unknown(request: Request, error: UnknownModel) -> Response:
        return problem(request, 404, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        # Nobody reads this, and the log has nothing to learn from it.
        return problem(request, 400, "the body was not sent to its end")

    @app.exception_handler(DebugOff)
    async def debug_off(request: Request, error: DebugOff) -> Response:
        return problem(request, 404, str(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return problem(request, error.status_code, error.detail, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The server's log gets the trace; the client learns the id to ask for.
        return problem(request, 500, "an error of the service; its log says more")
