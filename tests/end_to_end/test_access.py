"""Access: keys and their scopes, addresses other than loopback, pages of other origins."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import events, run, service

BODY = {"inputs": [[0.0] * 64], "model": "digits"}
PROTOCOL_BODY = {
    "inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]
}
MASKS_BODY = {"model": "digits", "version": 1, "passes": 1, "seed": 7, "masks": "independent"}
SCOPES = ("predict", "debug", "admin")
# The scope that each route needs; None: any key.
ROUTES: dict[tuple[str, str], str | None] = {
    ("POST", "/predict"): "predict",
    ("POST", "/uncertainty"): "predict",
    ("POST", "/debug/mc"): "debug",
    ("POST", "/v2/models/digits/infer"): "predict",
    ("POST", "/v2/models/digits.mc/infer"): "predict",
    ("POST", "/v2/models/digits/versions/1/infer"): "predict",
    ("GET", "/v2"): "predict",
    ("GET", "/v2/models/digits"): "predict",
    ("GET", "/v2/models/digits/versions/1"): "predict",
    ("GET", "/v2/models/digits/ready"): "predict",
    ("POST", "/v2/repository/index"): "admin",
    ("POST", "/v2/repository/models/digits/load"): "admin",
    ("GET", "/console/models/digits/versions/1"): "predict",
    ("POST", "/console/masks"): "debug",
    ("GET", "/metrics"): None,
}
OPEN = (
    *("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/docs"),
    *("/", "/console/main.js", "/console/service"),
)


def new_key(file: Path, *scopes: str) -> str:
    """Make a key with the command."""
    arguments = [word for scope in scopes for word in ("--scope", scope)]
    done = run("app", "key", "new", *arguments, "--file", str(file))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A key for each scope, by its name, and the keys file as "file"."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return {scope: new_key(file, scope) for scope in SCOPES} | {"file": str(file)}


@pytest.fixture(scope="module")
def locked(built: Path, keys: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of a service that requires keys."""
    with service(built / "models", DROPSERVE_API_KEYS_FILE=keys["file"]) as client:
        yield client


def ask(client: httpx.Client, route: tuple[str, str], **headers: str) -> httpx.Response:
    method, path = route
    body: object = PROTOCOL_BODY if path.endswith("/infer") else BODY
    if path.startswith("/v2/repository"):
        body = {}
    if path == "/console/masks":
        body = MASKS_BODY
    return client.request(method, path, json=body if method == "POST" else None, headers=headers)


@pytest.mark.parametrize("route", ROUTES, ids="{0[1]}".format)
def test_a_route_answers_with_a_key_of_its_scope_alone(
    locked: httpx.Client, keys: dict[str, str], route: tuple[str, str]
) -> None:
    needed = ROUTES[route]
    for answer in (ask(locked, route), ask(locked, route, **{"x-api-key": "ds_wrong"})):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json().keys() >= ({"error"} if route[1].startswith("/v2") else {"detail"})
    for scope in SCOPES:
        expected = 200 if needed in (None, scope) else 403
        for headers in (
            {"x-api-key": keys[scope]},
            {"authorization": f"Bearer {keys[scope]}"},
        ):
            assert ask(locked, route, **headers).status_code == expected


@pytest.mark.parametrize("path", OPEN)
def test_probes_documentation_and_the_page_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_a_request_without_a_key_is_refused_before_its_body_is_read(locked: httpx.Client) -> None:
    answer = locked.post("/predict", content=b"no json")
    assert answer.status_code == 401
    assert "body" not in answer.json()["detail"]


def test_the_documentation_says_that_keys_are_required(
    locked: httpx.Client, client: httpx.Client
) -> None:
    paths = locked.get("/openapi.json").json()["paths"]
    assert paths["/predict"]["post"]["security"]
    assert "security" not in paths["/health/live"]["get"]
    assert "security" not in client.get("/openapi.json").json()["paths"]["/predict"]["post"]


def test_no_key_and_no_value_of_a_feature_is_in_the_log(
    built: Path, keys: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    secret = 7.125
    with service(built / "models", DROPSERVE_API_KEYS_FILE=keys["file"]) as client:
        for body in (
            {"inputs": [[secret] * 64], "model": "digits"},
            {"inputs": [[secret] * 63], "model": "digits"},
            {"inputs": [[str(secret)] * 64], "model": f"{secret}", "colour": secret},
        ):
            for route in ("/predict", "/uncertainty", "/debug/mc"):
                for key in (*keys.values(), "ds_unknown"):
                    client.post(route, json=body, headers={"x-api-key": key})
    log = capfd.readouterr().out
    assert len(events(log)) > 36
    assert str(secret) not in log
    for key in (*keys.values(), "ds_unknown"):
        assert key not in log.replace(keys["file"], "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_it_listens_on_other_than_loopback_addresses_only_if_told_to(
    built: Path, host: str
) -> None:
    done = run("app", "--models", str(built / "models"), "--host", host, "--port", "0")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: host {host} may be reached by others: name a file of keys (--api-keys-file), or "
        "say that it is meant to be open to all (--open)"
    )


def test_open_to_all_it_answers_but_lets_nobody_change_its_models(built: Path) -> None:
    with service(built / "models", DROPSERVE_HOST="0.0.0.0", DROPSERVE_OPEN="1") as client:
        client.base_url = httpx.URL(f"http://127.0.0.1:{client.base_url.port}")
        assert client.post("/predict", json=BODY).status_code == 200
        refused = client.post("/v2/repository/models/digits/unload")
        assert refused.status_code == 403
        assert "requires an admin key" in refused.json()["error"]
        assert client.post("/predict", json=BODY).status_code == 200


def test_a_page_in_a_browser_may_not_change_models_of_an_open_service(
    client: httpx.Client,
) -> None:
    refused = client.post(
        "/v2/repository/models/digits/unload", headers={"origin": "http://evil.example"}
    )
    assert refused.status_code == 403


def test_a_bad_keys_file_ends_the_start_with_one_line_and_status_1(
    built: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    file.write_text('{"keys": []}')
    done = run("app", "--models", str(built / "models"), DROPSERVE_API_KEYS_FILE=str(file))
    assert done.returncode == 1
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "]


def test_pages_of_other_origins_are_shut_out_unless_they_were_let_in(
    built: Path, client: httpx.Client
) -> None:
    preflight = {
        "origin": "http://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,x-api-key",
    }
    allowed = "access-control-allow-origin"
    assert allowed not in client.options("/predict", headers=preflight).headers
    origins = "http://page.example, http://other.example"
    with service(built / "models", DROPSERVE_CORS_ORIGINS=origins) as let_in:
        answer = let_in.options("/predict", headers=preflight)
        assert (answer.status_code, answer.headers[allowed]) == (200, "http://page.example")
        answer = let_in.post("/predict", json=BODY, headers={"origin": "http://other.example"})
        assert (answer.status_code, answer.headers[allowed]) == (200, "http://other.example")
        answer = let_in.post("/predict", json={}, headers={"origin": "http://page.example"})
        assert (answer.status_code, answer.headers[allowed]) == (422, "http://page.example")
        stranger = preflight | {"origin": "http://evil.example"}
        assert allowed not in let_in.options("/predict", headers=stranger).headers
