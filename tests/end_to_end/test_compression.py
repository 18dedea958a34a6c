"""Compressed requests and responses, over HTTP."""

import gzip
import json
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import memory, service

Examples = Callable[[str], list[Any]]
Packer = Callable[[bytes], bytes]

MAX_BODY = 4 * 2**20
JSON = {"content-type": "application/json"}
RAW = -zlib.MAX_WBITS
CODINGS: dict[str, tuple[str, Packer]] = {
    "gzip": ("gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", lambda content: zlib.compress(content, wbits=RAW)),
}
every_coding = pytest.mark.parametrize("coding", CODINGS)


def send(client: httpx.Client, path: str, body: object, coding: str) -> httpx.Response:
    """Send JSON, compressed."""
    name, pack = CODINGS[coding]
    content = pack(body if isinstance(body, bytes) else json.dumps(body).encode())
    return client.post(path, content=content, headers=JSON | {"content-encoding": name})


@pytest.fixture(scope="module")
def bodies(examples: Examples) -> dict[str, dict[str, Any]]:
    """A body for each endpoint."""
    rows = examples("digits")[:2]
    mc = {"inputs": rows, "model": "digits", "seed": 1, "passes": 2}
    tensor = {"name": "x", "shape": [2, 8, 8], "datatype": "FP32", "data": rows}
    masks = {"model": "digits", "version": 1, "seed": 1, "passes": 2, "masks": "independent"}
    return {
        "/predict": {"inputs": rows, "model": "digits"},
        "/uncertainty": mc,
        "/debug/mc": mc,
        "/console/masks": masks,
        "/v1/models/digits:predict": {"instances": rows},
        "/v2/models/digits/infer": {"inputs": [tensor]},
        "/v2/models/digits/versions/1/infer": {"inputs": [tensor]},
        "/v2/repository/index": {"ready": True},
    }


@every_coding
def test_every_endpoint_takes_compressed_bodies(
    client: httpx.Client, bodies: dict[str, Any], coding: str
) -> None:
    for path, body in bodies.items():
        plain = client.post(path, json=body)
        assert plain.status_code == 200, plain.text
        packed = send(client, path, body, coding)
        assert (packed.status_code, packed.content) == (200, plain.content)


@every_coding
def test_the_header_of_binary_tensors_is_as_long_as_it_is_unpacked(
    client: httpx.Client, examples: Examples, coding: str
) -> None:
    rows = np.array(examples("digits"), "<f4")
    size = {"binary_data_size": rows.nbytes}
    tensor = {"name": "x", "shape": rows.shape, "datatype": "FP32", "parameters": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    name, pack = CODINGS[coding]
    length = {"inference-header-content-length": str(len(head))}
    path, content = "/v2/models/digits/infer", head + rows.tobytes()
    plain = client.post(path, content=content, headers=length)
    packed = client.post(path, content=pack(content), headers=length | {"content-encoding": name})
    assert packed.content == plain.content
    assert plain.json()["outputs"][0]["shape"] == [10, 10]


@every_coding
def test_a_body_may_come_in_pieces(
    client: httpx.Client, bodies: dict[str, Any], coding: str
) -> None:
    name, pack = CODINGS[coding]
    packed = pack(json.dumps(bodies["/predict"]).encode())

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(packed), 7):
            yield packed[start : start + 7]

    head = JSON | {"content-encoding": name}
    answer = client.post("/predict", content=pieces(), headers=head)
    assert answer.content == client.post("/predict", json=bodies["/predict"]).content


@every_coding
def test_the_limit_is_on_what_a_body_unpacks_to(
    client: httpx.Client, bodies: dict[str, Any], coding: str
) -> None:
    body = json.dumps(bodies["/predict"]).encode()
    longest = body + b" " * (MAX_BODY - len(body))
    assert send(client, "/predict", longest, coding).status_code == 200
    refused = send(client, "/predict", longest + b" ", coding)
    assert (refused.status_code, refused.json()["detail"]) == (
        413,
        f"the body may be at most {MAX_BODY} bytes long",
    )


@every_coding
def test_a_body_that_expands_takes_no_more_memory_than_the_limit(
    built: Path, bodies: dict[str, Any], coding: str
) -> None:
    # 100 MB in 100 KB.
    packer = zlib.compressobj(9, wbits={"gzip": 31, "zlib": 15, "raw deflate": RAW}[coding])
    bomb = b"".join([*(packer.compress(bytes(2**20)) for _ in range(100)), packer.flush()])
    assert len(bomb) < 2**17
    with service(built / "models") as client:
        head = JSON | {"content-encoding": CODINGS[coding][0]}
        assert send(client, "/predict", bodies["/predict"], coding).status_code == 200
        before = memory(client, "VmHWM")
        for _ in range(5):
            assert client.post("/predict", content=bomb, headers=head).status_code == 413
        assert memory(client, "VmHWM") - before < 4 * MAX_BODY


@pytest.mark.parametrize("fault", ["cut", "empty", "more", "twice", "plain"])
@every_coding
def test_a_stream_that_is_damaged_is_a_400_that_says_so(
    client: httpx.Client, bodies: dict[str, Any], coding: str, fault: str
) -> None:
    name, pack = CODINGS[coding]
    body = json.dumps(bodies["/predict"]).encode()
    packed = pack(body)
    content, says = {
        "cut": (packed[:-1], "ends too early"),
        "empty": (b"", "ends too early"),
        "more": (packed + b"\0", "goes on behind its end"),
        "twice": (packed * 2, "goes on behind its end"),
        "plain": (body, "is damaged: Error -3 while decompressing data: "),
    }[fault]
    answer = client.post("/predict", content=content, headers=JSON | {"content-encoding": name})
    assert answer.status_code == 400
    found = answer.json()["detail"]
    assert found.startswith(f"the {name} stream in the body {says}")
    assert "\n" not in found


@pytest.mark.parametrize("name", ["br", "zstd", "gzip, gzip", "identity, gzip", "", "a" * 200])
def test_another_encoding_is_a_415_that_names_what_is_allowed(
    client: httpx.Client, bodies: dict[str, Any], name: str
) -> None:
    head = {"content-encoding": name}
    answer = client.post("/predict", json=bodies["/predict"], headers=head)
    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "gzip, deflate"
    says = f"the content encoding must be gzip, deflate or identity, not {name[:100]!r}"
    assert answer.json()["detail"] == says
    head = {"content-encoding": "Identity"}
    assert client.post("/predict", json=bodies["/predict"], headers=head).status_code == 200


def test_what_unpacked_bodies_hold_is_counted(built: Path, bodies: dict[str, Any]) -> None:
    limit = 200_000
    with (
        service(built / "models", DROPSERVE_MAX_BODY_BYTES=str(limit)) as client,
        ExitStack() as all_,
    ):
        packed = gzip.compress(bytes(limit - 100))
        assert len(packed) < 300
        head = (
            "POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-encoding: gzip\r\ncontent-length: {len(packed)}\r\n\r\n"
        )
        address = client.base_url.host, client.base_url.port
        for _ in range(8):
            held = all_.enter_context(socket.create_connection(address))
            # All but the last byte, which has no content.
            held.sendall(head.encode() + packed[:-1])
        long = json.dumps(bodies["/predict"] | {"inputs": [[0.0] * 64] * 100})
        # Refused once the eight are read.
        status = 0
        for _ in range(100):
            status = client.post("/predict", content=long, headers=JSON).status_code
            if status == 503:
                break
        assert status == 503
    with service(built / "models", DROPSERVE_MAX_BODY_BYTES=str(limit)) as client:
        assert client.post("/predict", content=long, headers=JSON).status_code == 200


# Responses


@pytest.fixture(scope="module")
def long(bodies: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Requests with long answers, one of them binary."""
    rows = [[0.0] * 64] * 300
    data = {"name": "x", "shape": [300, 64], "datatype": "UINT8", "data": [0] * 64 * 300}
    binary = {"binary_data_output": True}
    return [
        ("/predict", {"inputs": rows, "model": "digits"}),
        ("/uncertainty", {"inputs": rows, "model": "digits", "passes": 2, "seed": 1}),
        ("/debug/mc", {"inputs": rows, "model": "digits", "passes": 2, "seed": 1}),
        ("/console/masks", bodies["/console/masks"]),
        ("/v1/models/digits:predict", {"instances": rows}),
        ("/v2/models/digits/infer", {"inputs": [data]}),
        ("/v2/models/digits.mc/infer", {"inputs": [data | {}], "parameters": binary | {"seed": 1}}),
    ]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_long_answers_are_compressed_for_clients_that_accept_it(
    client: httpx.Client, long: list[tuple[str, Any]], coding: str
) -> None:
    for path, body in long:
        if path == "/console/masks":
            continue
        plain = raw(client, path, body, "identity")
        assert len(plain.content) > 16_384, path
        packed = raw(client, path, body, coding)
        assert packed.headers["content-encoding"] == coding
        assert "accept-encoding" in packed.headers["vary"]
        content = b"".join(packed.iter_raw())
        assert int(packed.headers["content-length"]) == len(content) < len(plain.content)
        assert zlib.decompress(content, {"gzip": 31, "deflate": 15}[coding]) == plain.content
        for name in ("content-type", "inference-header-content-length"):
            assert packed.headers.get(name) == plain.headers.get(name)


def raw(client: httpx.Client, path: str, body: Any, accepts: str | None) -> httpx.Response:
    """Send a request that accepts some encodings; None: that does not say."""
    request = client.build_request("POST", path, json=body)
    del request.headers["accept-encoding"]
    if accepts is not None:
        request.headers["accept-encoding"] = accepts
    # A stream, so that its bytes can be read as they were sent.
    answer = client.send(request, stream=accepts in ("gzip", "deflate"))
    assert answer.status_code == 200
    return answer


@pytest.mark.parametrize("accepts", [None, "", "br", "gzip;q=0", "identity", "*;q=0"])
def test_answers_are_as_they_are_for_other_clients(
    client: httpx.Client, long: list[tuple[str, Any]], accepts: str | None
) -> None:
    answer = raw(client, *long[0], accepts)
    assert "content-encoding" not in answer.headers
    assert ("vary" in answer.headers) == (accepts is not None)
    assert len(answer.content) > 16_384


def test_short_answers_and_errors_are_never_compressed(
    client: httpx.Client, bodies: dict[str, Any]
) -> None:
    for path, body in bodies.items():
        for status in (200, 415):
            head = {"accept-encoding": "gzip"} | {200: {}, 415: {"content-encoding": "br"}}[status]
            answer = client.post(path, json=body, headers=head)
            assert (answer.status_code, len(answer.content) <= 16_384) == (status, True)
            assert not {"content-encoding", "vary"} & set(answer.headers), path


def test_long_documents_are_compressed(client: httpx.Client) -> None:
    for path in ("/openapi.json", "/metrics"):
        packed = client.get(path, headers={"accept-encoding": "gzip"})
        plain = client.get(path, headers={"accept-encoding": "identity"})
        assert packed.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers
        if path == "/openapi.json":
            assert packed.content == plain.content


def test_pages_of_allowed_origins_may_send_and_read_compressed_bodies(
    built: Path, long: list[tuple[str, Any]]
) -> None:
    origin = "https://page.example"
    with service(built / "models", DROPSERVE_CORS_ORIGINS=origin) as client:
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-encoding",
        }
        assert client.options("/predict", headers=asked).status_code == 200
        path, body = long[0]
        answer = client.post(path, json=body, headers={"origin": origin})
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["access-control-allow-origin"] == origin
        varies = {each.strip().lower() for each in answer.headers["vary"].split(",")}
        assert varies == {"accept-encoding", "origin"}
