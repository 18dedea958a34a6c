"""Request and response bodies: read one of bounded length, parse it, write an answer."""

import asyncio
from collections.abc import Callable, KeysView, Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response as StarletteResponse
from starlette.types import Message, Receive, Send

from dropserve.app.errors import InputError
from dropserve.app.http.compression import Unpacker, accepted, compress
from dropserve.app.observability.record import CLIENT_DISCONNECTED, RequestRecord

JSON = b"application/json"
IDENTITY = b"identity"
# Bodies up to this size are not counted: a thousand of them take a few MB.
SHORT_BYTES = 4096
# Bytes of a body that one of its lists counts for: parsed, a list takes as much memory as the
# numbers of so many bytes.
LIST_WEIGHT = 6
# JSON texts up to this length are parsed before their lists are known to be too many.
COUNTED_BYTES = 2**16
# Responses up to this size are never compressed: that would take longer than to send them.
SHORT_RESPONSE_BYTES = 16 * 2**10
# Longest path of a field that an error repeats.
LONGEST_PATH = 200
# Set in the scope of a request that was refused because the queue is full: the server may then
# pause reading from its client.
PAUSE = "dropserve.pause"

Headers = Mapping[bytes, bytes]
Parsed = TypeVar("Parsed", bound=BaseModel)
Asked = TypeVar("Asked")


class Request(NamedTuple):
    """A request whose body is complete."""

    path: str
    headers: Headers  # by lower-case name
    body: bytes | bytearray


class Response(NamedTuple):
    """A response, without the headers that ``complete`` adds."""

    status: int
    content: bytes
    headers: list[tuple[bytes, bytes]]


async def read_body(
    headers: Headers,
    receive: Receive,
    max_bytes: int,
    hold: Callable[[int], None] | None = None,
) -> bytes | bytearray:
    """Read the body of a request.

    Parameters
    ----------
    headers, receive
        The request's headers, and ASGI's ``receive``.
    max_bytes
        Longest body, as it is sent and, if it is compressed, unpacked.
    hold
        Called with the growth of a body beyond ``SHORT_BYTES``, to account for it; may raise.

    Returns
    -------
    bytes or bytearray
        The body, unpacked.

    Raises
    ------
    HTTPException
        413 if it is too long, 415 if its content encoding is unknown, 400 if it cannot be unpacked.
    ClientDisconnect
        If the client disconnects first.
    """
    coding = headers.get(b"content-encoding")
    unpacker = None if coding is None or coding.lower() == IDENTITY else Unpacker(coding)
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_long(max_bytes)
    # FastAPI's own ``max_body_size`` would answer in plain text and not name the limit.
    message = await receive()
    last = message["type"] == "http.request" and not message.get("more_body", False)
    if last and unpacker is None:
        # A body in one piece is not copied.
        content: bytes = message.get("body", b"")
        if len(content) > max_bytes:
            raise too_long(max_bytes)
        if hold and len(content) > SHORT_BYTES:
            hold(len(content))
        return content
    body, held, sent = bytearray(), 0, 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        sent += len(piece)
        for part in unpacker.unpack(piece) if unpacker else (piece,):
            if max(sent, len(body) + len(part)) > max_bytes:
                raise too_long(max_bytes)
            body += part
            if hold and len(body) > SHORT_BYTES:
                hold(len(body) - held)
                held = len(body)
        if not message.get("more_body", False):
            if unpacker:
                unpacker.finish()
            return body
        message = await receive()


def count_lists(text: bytes | bytearray | memoryview) -> int:
    """Return the number of lists and objects that a JSON text can hold: of its opening brackets."""
    # "[" and "{" differ in one bit. A string may hold them, too, but hardly a name or id.
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) | 0x20 == ord("{")))


def load_json(
    text: bytes | bytearray | memoryview, most_lists: Callable[[], int], part: str = "body"
) -> Any:
    """Parse a JSON text; a long one may hold at most ``most_lists()`` lists and objects.

    The lists of a shorter one count as a part of its body (``LIST_WEIGHT``).

    Raises
    ------
    InputError
        If it holds more. Parsed, they can take forty times the memory of the text.
    HTTPException
        400 if it is not JSON; ``part`` names the text.
    """
    if len(text) > COUNTED_BYTES and (found := count_lists(text)) > (most := most_lists()):
        raise InputError(
            "inputs",
            f"the {part} holds {found} lists and objects; as many rows as are allowed take at most "
            f"{most}",
        )
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"the {part} is not JSON: {error}") from None


def parse_json(
    headers: Headers,
    body: bytes | bytearray,
    schema: type[Parsed],
    most_lists: Callable[[], int],
) -> Parsed:
    """Parse and validate a JSON body, as ``load_json`` does.

    Raises
    ------
    HTTPException
        415 if its content type is not JSON, 400 if it is not valid JSON.
    InputError, ValidationError
        If its content is not what ``schema`` allows.
    """
    content_type = headers.get(b"content-type", b"")
    if content_type != JSON:
        check_media_type(content_type)
    document = load_json(body, most_lists)
    # Before pydantic, which would describe each of a million unknown fields.
    known = field_names(schema)
    if isinstance(document, dict) and not document.keys() <= known:
        unknown = next(field for field in document if field not in known)
        raise InputError(unknown[:LONGEST_PATH], f"allowed are {', '.join(known)}")
    # Does what model_validate does, in half the time.
    request: Parsed = schema.__pydantic_validator__.validate_python(document)
    return request


@cache
def field_names(schema: type[BaseModel]) -> KeysView[str]:
    """Return the names of the fields of a schema."""
    return schema.model_fields.keys()


def check_media_type(content_type: bytes) -> None:
    """Raise HTTPException (415) unless the content type, parameters aside, is JSON."""
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type != JSON:
        said = media_type[:100].decode("latin-1") or "left out"
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the content type must be application/json, not {said!r}",
        )


def too_long(max_bytes: int) -> HTTPException:
    """Return the error of a body that is too long."""
    return HTTPException(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may be at most {max_bytes} bytes long"
    )


def parse_query(
    schema: type[Parsed],
    query: Callable[[Parsed], Asked],
    most_lists: Callable[[], int],
    request: Request,
) -> Asked:
    """Parse the JSON body of a request, and return the query that it holds."""
    return query(parse_json(request.headers, request.body, schema, most_lists))


def json_response(answer: Mapping[str, object]) -> Response:
    """Write an answer, which may hold arrays, as JSON."""
    content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(200, content, [(b"content-type", JSON)])


def starlette_response(answer: Mapping[str, object], status: int = 200) -> StarletteResponse:
    """Write an answer as JSON for FastAPI's routes."""
    return StarletteResponse(json_response(answer).content, status, media_type=JSON.decode())


async def encode(response: Response, headers: Headers) -> Response:
    """Compress a long response if its client accepts that.

    Parameters
    ----------
    response
        The response, without its length.
    headers
        The request's headers.
    """
    status, content, given = response
    accept = headers.get(b"accept-encoding")
    if accept is None:
        return response
    given = [*given, (b"vary", b"accept-encoding")]
    coding = accepted(accept.decode("latin-1"))
    if coding is not None:
        # In a thread: 10 MB would keep the loop busy for 100 ms.
        content = await asyncio.to_thread(compress, content, coding)
        given.append((b"content-encoding", coding.encode()))
    return Response(status, content, given)


def complete(response: Response, request_id: str) -> Response:
    """Add the headers that every response has: its length and the id of the request."""
    status, content, headers = response
    length = (b"content-length", str(len(content)).encode())
    named = (b"x-request-id", request_id.encode())
    return Response(status, content, [*headers, length, named])


async def send_response(send: Send, response: Response, record: RequestRecord) -> None:
    """Send a complete response through ASGI; note in the record if its client is gone."""
    status, content, headers = response
    try:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})
    # As ASGI has it for a client that is gone.
    except OSError:
        record.rejected, record.status = "unread", CLIENT_DISCONNECTED


def encoding_send(send: Send, headers: Headers) -> Send:
    """Return an ASGI ``send`` that compresses long responses of one piece, as `encode` does.

    Parameters
    ----------
    send
        Sends the response.
    headers
        The request's headers.
    """
    if b"accept-encoding" not in headers:
        return send
    start: Message = {}

    async def send_encoded(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            # Held back until the length of the body is known; an ASGI server, too, may do so.
            start = message
            return
        if start:
            head, start = start, {}
            names = {name for name, _ in head["headers"]}
            content = message.get("body", b"")
            # A validator is that of a file as it is.
            if (
                len(content) > SHORT_RESPONSE_BYTES
                and not message.get("more_body", False)
                and b"etag" not in names
            ):
                given = [each for each in head["headers"] if each[0] != b"content-length"]
                encoded = await encode(Response(head["status"], content, given), headers)
                length = (b"content-length", str(len(encoded.content)).encode())
                head = {**head, "headers": [*encoded.headers, length]}
                message = {**message, "body": encoded.content}
            await send(head)
        await send(message)

    return send_encoded
