"""An answer, ready to be sent."""

from typing import NamedTuple

from starlette.types import Send

JSON = b"application/json"


class Reply(NamedTuple):
    """An answer's status, body and headers, but for those that ``send`` adds."""

    status: int
    content: bytes
    headers: list[tuple[bytes, bytes]]


def json(status: int, content: bytes) -> Reply:
    """Answer with a JSON document."""
    return Reply(status, content, [(b"content-type", JSON)])


async def send(to: Send, reply: Reply, name: str) -> None:
    """Send the answer to the request of some name."""
    headers = [
        *reply.headers,
        (b"content-length", str(len(reply.content)).encode()),
        (b"x-request-id", name.encode()),
    ]
    await to({"type": "http.response.start", "status": reply.status, "headers": headers})
    await to({"type": "http.response.body", "body": reply.content})
