"""Read a request's body, of bounded length; parse and validate what is JSON."""

from collections.abc import Callable, KeysView, Mapping
from functools import cache
from http import HTTPStatus
from typing import TypeVar

import orjson
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from dropserve.app.errors import InputError
from dropserve.app.http.problems import LONGEST_PATH, BodyError

JSON = b"application/json"
# Bodies that are not worth counting: of a thousand connections they are some MB.
SHORT_BYTES = 4096
Headers = Mapping[bytes, bytes]

Typed = TypeVar("Typed", bound=BaseModel)


async def read(
    headers: Headers,
    receive: Receive,
    max_bytes: int,
    hold: Callable[[int], None] | None = None,
) -> bytes | bytearray:
    """Read the body.

    Parameters
    ----------
    headers, receive
        Of the request.
    max_bytes
        Longest body.
    hold
        Called with how much longer a body has become, once it is not short any more; what it
        raises is raised.

    Raises
    ------
    BodyError
        413 if it is too long, 415 if it is compressed.
    ClientDisconnect
        If it is not sent to its end.
    """
    if (coding := headers.get(b"content-encoding")) is not None and coding != b"identity":
        raise BodyError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must not be compressed (content-encoding)"
        )
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_long(max_bytes)
    # FastAPI's own ``max_body_size`` would answer in plain text and not name the limit.
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        # As it is: nothing copies a body that has come in one piece.
        content: bytes = message.get("body", b"")
        if len(content) > max_bytes:
            raise too_long(max_bytes)
        if hold and len(content) > SHORT_BYTES:
            hold(len(content))
        return content
    body, held = bytearray(), 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        if len(body) + len(piece) > max_bytes:
            raise too_long(max_bytes)
        body += piece
        if hold and len(body) > SHORT_BYTES:
            hold(len(body) - held)
            held = len(body)
        if not message.get("more_body", False):
            return body
        message = await receive()


def parse(headers: Headers, body: bytes | bytearray, model: type[Typed]) -> Typed:
    """Parse and validate a body as ``model``.

    Raises
    ------
    BodyError
        415 if it is not said to be JSON, 400 if it is no JSON.
    InputError, ValidationError
        If its content is not what ``model`` allows.
    """
    content_type = headers.get(b"content-type", b"")
    if content_type != JSON:
        check_media_type(content_type)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BodyError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None
    # Before pydantic, which would describe each of a million unknown fields.
    known = fields(model)
    if isinstance(document, dict) and not document.keys() <= known:
        unknown = next(field for field in document if field not in known)
        raise InputError(unknown[:LONGEST_PATH], f"allowed are {', '.join(known)}")
    # What model_validate does, in half the time.
    request: Typed = model.__pydantic_validator__.validate_python(document)
    return request


@cache
def fields(model: type[BaseModel]) -> KeysView[str]:
    """Return the names of a model's fields."""
    return model.model_fields.keys()


def check_media_type(content_type: bytes) -> None:
    """Raise BodyError unless the content type, parameters aside, is JSON's."""
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type != JSON:
        said = media_type[:100].decode("latin-1") or "left out"
        raise BodyError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the content type must be application/json, not {said!r}",
        )


def too_long(max_bytes: int) -> BodyError:
    """Return the error of a body that is too long."""
    return BodyError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may be at most {max_bytes} bytes long"
    )
