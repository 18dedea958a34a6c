"""An answer, ready to be sent."""

from collections.abc import Mapping
from typing import NamedTuple

import orjson
from starlette.responses import Response
from starlette.types import Send

JSON = b"application/json"


class Reply(NamedTuple):
    """An answer's status, body and headers, but for those that ``named`` adds."""

    status: int
    content: bytes
    headers: list[tuple[bytes, bytes]]


def json(status: int, content: bytes) -> Reply:
    """Answer with a JSON document."""
    return Reply(status, content, [(b"content-type", JSON)])


def response(answer: Mapping[str, object], status: int = 200) -> Response:
    """Answer a request that is for no endpoint; the answer may hold arrays."""
    content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, media_type="application/json")


def named(reply: Reply, name: str) -> Reply:
    """Add the headers that every answer has; ``name`` is the request's."""
    status, content, headers = reply
    length = (b"content-length", str(len(content)).encode())
    return Reply(status, content, [*headers, length, (b"x-request-id", name.encode())])


async def send(to: Send, reply: Reply, name: str) -> None:
    """Send the answer to the request of some name."""
    status, content, headers = named(reply, name)
    await to({"type": "http.response.start", "status": status, "headers": headers})
    await to({"type": "http.response.body", "body": content})
