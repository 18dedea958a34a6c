"""The names that an open service answers to, and requests that a foreign page can have sent."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import service
from tests.end_to_end.test_access import BODY, PROTOCOL_BODY, new_key

ROUTES = (
    *("/", "/console/main.js", "/console/service", "/console/models/digits/versions/1", "/docs"),
    *("/openapi.json", "/metrics", "/health/live", "/health/ready", "/v2", "/v2/models/digits"),
)
OWN = (
    *("localhost", "LOCALHOST", "localhost.", "app.localhost", "127.0.0.1", "[::1]", "10.1.2.3"),
    *("[fe80::1]", "own.example", "Own.Example", "other"),
)
FOREIGN = (
    *("evil.example", "localhost.evil.example", "notlocalhost", "own.example.evil.example"),
    *("127.0.0.1.evil.example", "127.1", "own.example@evil.example", "[evil.example]", "x:y:z"),
)


@pytest.fixture(scope="module")
def named(built: Path) -> Iterator[httpx.Client]:
    with service(built / "models", DROPSERVE_HOSTS="own.example, other") as client:
        yield client


@pytest.mark.parametrize("host", OWN)
@pytest.mark.parametrize("port", ["", ":8000"])
def test_without_keys_addresses_and_own_names_are_answered(
    named: httpx.Client, host: str, port: str
) -> None:
    headers = {"host": host + port}
    assert named.get("/health/ready", headers=headers).status_code == 200
    assert named.post("/predict", json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_without_keys_a_foreign_name_is_not_answered(named: httpx.Client, host: str) -> None:
    headers = {"host": host}
    for path in ("/predict", "/uncertainty", "/debug/mc"):
        response = named.post(path, json=BODY, headers=headers)
        assert response.status_code == 421
        assert "DROPSERVE_HOSTS" in response.json()["detail"]
    infer = named.post("/v2/models/digits/infer", json=PROTOCOL_BODY, headers=headers)
    assert infer.status_code == 421
    assert "DROPSERVE_HOSTS" in infer.json()["error"]
    for path in ROUTES:
        assert named.get(path, headers=headers).status_code == 421
        assert named.head(path, headers=headers).status_code == 421
    assert named.post("/v2/repository/index", headers=headers).status_code == 421
    assert 'dropserve_rejected_total{reason="host"}' in named.get("/metrics").text


def test_any_name_is_answered_with_keys_or_if_all_are_allowed(built: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "predict")
    foreign = {"host": "evil.example"}
    with service(built / "models", DROPSERVE_API_KEYS_FILE=str(file)) as client:
        headers = foreign | {"x-api-key": key}
        assert client.post("/predict", json=BODY, headers=headers).status_code == 200
        assert client.post("/predict", json=BODY, headers=foreign).status_code == 401
        assert client.get("/health/live", headers=foreign).status_code == 200
    with service(built / "models", DROPSERVE_HOSTS="*") as client:
        assert client.post("/predict", json=BODY, headers=foreign).status_code == 200


def test_an_open_service_on_other_addresses_looks_at_names_too(built: Path) -> None:
    with service(built / "models", DROPSERVE_HOST="0.0.0.0", DROPSERVE_OPEN="1") as client:
        assert client.post("/predict", json=BODY).status_code == 200
        foreign = {"host": "evil.example"}
        assert client.post("/predict", json=BODY, headers=foreign).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "Text/Plain; charset=utf-8", "origin": "https://evil.example"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
    ids=str,
)
def test_a_request_that_a_foreign_page_can_send_unasked_is_refused(
    named: httpx.Client, headers: dict[str, str]
) -> None:
    content = httpx.Request("POST", "http://x", json=PROTOCOL_BODY).content
    for name in ("digits", "digits.mc"):
        path = f"/v2/models/{name}/infer"
        response = named.post(path, content=content, headers=headers)
        assert response.status_code == 415
        assert "must be application/json or application/octet-stream" in response.json()["error"]
    assert named.post("/predict", content=content, headers=headers).status_code == 415


@pytest.mark.parametrize("content_type", [None, "application/json", "application/octet-stream"])
def test_a_client_that_is_no_browser_may_leave_the_content_type_of_infer_out(
    named: httpx.Client, content_type: str | None
) -> None:
    content = httpx.Request("POST", "http://x", json=PROTOCOL_BODY).content
    headers = {} if content_type is None else {"content-type": content_type}
    response = named.post("/v2/models/digits/infer", content=content, headers=headers)
    assert response.status_code == 200


def test_what_answers_get_answers_head_with_the_same_headers(named: httpx.Client) -> None:
    for path in ROUTES:
        got, headed = named.get(path), named.head(path)
        assert (headed.status_code, headed.content) == (200, b"")
        # Metrics differ from one request to the next.
        unlike = {"x-request-id", "date"} | ({"content-length"} if path == "/metrics" else set())
        assert {name: value for name, value in headed.headers.items() if name not in unlike} == {
            name: value for name, value in got.headers.items() if name not in unlike
        }
    assert named.head("/predict").status_code == 405
    assert named.head("/nothing").status_code == 404


def test_all_addresses_of_ipv6_include_those_of_ipv4(built: Path) -> None:
    settings = {"DROPSERVE_HOST": "::", "DROPSERVE_OPEN": "1"}
    with service(built / "models", **settings) as client:
        for host in ("127.0.0.1", "[::1]", "localhost"):
            url = f"http://{host}:{client.base_url.port}/health/live"
            assert httpx.get(url).status_code == 200
