"""Read a request's body: JSON of bounded length, then a typed request."""

from http import HTTPStatus
from typing import TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel

from app.api.problems import LONGEST_PATH, BodyError
from app.errors import InputError

Typed = TypeVar("Typed", bound=BaseModel)


async def read(request: Request, model: type[Typed], max_bytes: int) -> Typed:
    """Read the body and validate it as ``model``.

    Raises
    ------
    BodyError
        415 if it is not said to be JSON, 413 if it is too long, 400 if it is no JSON.
    InputError, ValidationError
        If its content is not what ``model`` allows.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise BodyError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the content type must be application/json, not {media_type[:100] or 'left out'!r}",
        )
    body = await read_bytes(request, max_bytes)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BodyError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None
    # Before pydantic, which would describe each of a million unknown fields.
    if isinstance(document, dict) and not document.keys() <= model.model_fields.keys():
        unknown = next(field for field in document if field not in model.model_fields)
        raise InputError(unknown[:LONGEST_PATH], f"allowed are {', '.join(model.model_fields)}")
    return model.model_validate(document)


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """Read the body, refusing a long one from its header or while it comes in.

    FastAPI's own ``max_body_size`` would answer in plain text and not name the limit.
    """
    too_long = BodyError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may be at most {max_bytes} bytes long"
    )
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise too_long
    chunks = []
    length = 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > max_bytes:
            raise too_long
        chunks.append(chunk)
    return b"".join(chunks)
