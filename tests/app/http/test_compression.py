"""Content codings, piece by piece."""

import asyncio
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.types import Message

from dropserve.app.http.bodies import encoding_send
from dropserve.app.http.compression import STEP_BYTES, Unpacker, accepted, compress

RAW = -zlib.MAX_WBITS
WRITERS = {
    "gzip": lambda content: gzip.compress(content),
    "x-gzip": lambda content: gzip.compress(content, 1),
    "GZIP ": lambda content: zlib.compress(content, 9, 31),
    "deflate": lambda content: zlib.compress(content),
    "Deflate": lambda content: zlib.compress(content, 0, RAW),
    "deflate of zlib's smallest window": lambda content: zlib.compress(content, 6, 9),
    "raw deflate": lambda content: zlib.compress(content, 6, RAW),
}


def coding_of(name: str) -> bytes:
    return b"deflate" if "deflate " in name or " deflate" in name else name.encode()


@pytest.mark.parametrize("name", WRITERS)
@given(
    content=st.binary(max_size=200)
    | st.integers(0, 3).flatmap(
        lambda steps: st.integers(-300, 300).map(
            lambda more: bytes(max(0, steps * STEP_BYTES + more))
        )
    ),
    sizes=st.lists(st.integers(1, 50), max_size=20),
)
def test_a_body_is_unpacked_however_it_is_packed_and_cut(
    name: str, content: bytes, sizes: list[int]
) -> None:
    packed = WRITERS[name](content)
    unpacker = Unpacker(coding_of(name))
    found = b""
    for size in [*sizes, len(packed)]:
        piece, packed = packed[:size], packed[size:]
        for part in unpacker.unpack(piece):
            assert len(part) <= STEP_BYTES
            found += part
    unpacker.finish()
    assert found == content


@pytest.mark.parametrize("name", WRITERS)
@given(st.data())
def test_a_damaged_body_is_a_400_or_unpacks_to_something_else(
    name: str, data: st.DataObject
) -> None:
    packed = bytearray(WRITERS[name](bytes(range(256)) * 4))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    unpacker = Unpacker(coding_of(name))
    fault = None
    try:
        for _ in unpacker.unpack(bytes(packed)):
            pass
        unpacker.finish()
    except HTTPException as error:
        fault = error
    assert fault is None or (fault.status_code == 400 and "\n" not in fault.detail)


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("deflate, gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip; q=0.5 , deflate ; q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0.000, deflate", "deflate"),
        ("gzip;q=0, *", "deflate"),
        ("*", "gzip"),
        ("*;q=0", None),
        ("identity", None),
        ("identity, gzip;q=0.5", None),
        ("identity;q=0.5, gzip;q=1.0", "gzip"),
        ("identity;q=0, br", None),
        ("gzip;q=2", None),
        ("gzip;q=x", None),
        ("br", None),
        ("", None),
        (",;,", None),
    ],
)
def test_the_coding_is_the_one_that_the_client_prefers(header: str, coding: str | None) -> None:
    assert accepted(header) == coding


@pytest.mark.parametrize(
    ("headers", "pieces", "compressed"),
    [
        ([], 1, True),
        ([(b"etag", b'"1"')], 1, False),
        ([], 2, False),
    ],
    ids=["whole", "with a validator", "in pieces"],
)
def test_a_response_is_compressed_if_it_is_whole_and_has_no_validator(
    headers: list[tuple[bytes, bytes]], pieces: int, compressed: bool
) -> None:
    sent: list[Message] = []

    async def main() -> None:
        async def send(message: Message) -> None:
            sent.append(message)

        encode = encoding_send(send, {b"accept-encoding": b"gzip"})
        length = (b"content-length", b"20000")
        start = {"type": "http.response.start", "status": 200, "headers": [length, *headers]}
        await encode(start)
        for number in range(pieces):
            part = bytes(20_000 // pieces)
            more = number < pieces - 1
            await encode({"type": "http.response.body", "body": part, "more_body": more})

    asyncio.run(main())
    start, *parts = sent
    content = b"".join(part["body"] for part in parts)
    named = dict(start["headers"])
    assert int(named[b"content-length"]) == len(content)
    assert (named.get(b"content-encoding") == b"gzip") == compressed
    assert (gzip.decompress(content) if compressed else content) == bytes(20_000)


def test_what_is_compressed_is_as_its_name_says() -> None:
    content = bytes(10_000)
    assert gzip.decompress(compress(content, "gzip")) == content
    assert zlib.decompress(compress(content, "deflate")) == content
