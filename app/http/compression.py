"""Content codings: unpack the bodies of requests within a limit, pack long responses.

References
----------
RFC 9110, HTTP Semantics, sections 8.4 (codings), 12.5.3 (Accept-Encoding)
RFC 1950, 1951 and 1952: zlib, deflate, gzip
"""

import re
import zlib
from collections.abc import Iterator
from http import HTTPStatus

from starlette.exceptions import HTTPException

# What zlib calls the formats of streams. HTTP's deflate is zlib's, but some clients send it raw.
GZIP, ZLIB, RAW_DEFLATE = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
# The low half of the first byte of a zlib stream. A raw deflate stream could begin with it only if
# the padding before an uncompressed block were not zero.
DEFLATED = 8
CODINGS = {"gzip": GZIP, "x-gzip": GZIP, "deflate": ZLIB}
# Most bytes that are unpacked in one step, and so the most by which a limit can be exceeded.
STEP_BYTES = 2**17
# The fastest. A megabyte of JSON takes 12 ms; level 6 takes 70 ms and saves 8 percent more.
LEVEL = 1
QUALITY = re.compile(r"q=([01](?:\.[0-9]{0,3})?)")


class Unpacker:
    """Unpacks a compressed body, piece by piece.

    Parameters
    ----------
    coding
        The value of ``Content-Encoding``.

    Raises
    ------
    HTTPException
        415 if the coding is not one of ``CODINGS``; from the methods 400 if the body is damaged.
    """

    def __init__(self, coding: bytes) -> None:
        self.name = coding.decode("latin-1").strip().lower()
        if self.name not in CODINGS:
            said = self.name[:100]
            raise HTTPException(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"the content encoding must be gzip, deflate or identity, not {said!r}",
                {"accept-encoding": "gzip, deflate"},
            )
        self.stream: zlib._Decompress | None = None

    def unpack(self, piece: bytes) -> Iterator[bytes]:
        """Iterate over what a piece of the body unpacks to, in parts of at most ``STEP_BYTES``."""
        if not piece:
            return
        if self.stream is None:
            raw = self.name == "deflate" and piece[0] & 0xF != DEFLATED
            self.stream = zlib.decompressobj(RAW_DEFLATE if raw else CODINGS[self.name])
        part = bytes(STEP_BYTES)
        # After a full step there may be more, even if all of the piece is consumed.
        while not self.stream.eof and (piece or len(part) == STEP_BYTES):
            try:
                part = self.stream.decompress(piece, STEP_BYTES)
            except zlib.error as error:
                raise self._damaged(f"is damaged: {error}") from None
            piece = self.stream.unconsumed_tail
            yield part
        if self.stream.unused_data or piece:
            raise self._damaged("goes on behind its end")

    def finish(self) -> None:
        """Raise HTTPException (400) unless the body is complete."""
        if self.stream is None or not self.stream.eof:
            raise self._damaged("ends too early")

    def _damaged(self, fault: str) -> HTTPException:
        return HTTPException(HTTPStatus.BAD_REQUEST, f"the {self.name} stream in the body {fault}")


def compress(content: bytes, coding: str) -> bytes:
    """Compress a response with one of ``CODINGS``."""
    return zlib.compress(content, LEVEL, CODINGS[coding])


def accepted(header: str) -> str | None:
    """Return the coding for a response that a client accepts and prefers; None: as it is.

    Parameters
    ----------
    header
        The value of ``Accept-Encoding``.
    """
    weights: dict[str, float] = {}
    for item in header.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        quality = 1.0
        for parameter in parameters:
            found = QUALITY.fullmatch(parameter.replace(" ", ""))
            quality = float(found[1]) if found else 0.0
        weights[name] = quality
    others = weights.get("*", 0.0)
    # A client that does not mention it takes it, but wants others first.
    identity = weights.get("identity", 0.0)
    best = max(("gzip", "deflate"), key=lambda coding: weights.get(coding, others))
    quality = weights.get(best, others)
    return best if quality > 0 and quality >= identity else None
