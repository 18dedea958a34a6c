"""The service's side of the console: its files, and the routes that only they use."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest

from dropserve.app.http import console
from dropserve.app.inference.examples import Examples
from tests.conftest import service
from tests.end_to_end.test_access import new_key

MASKS = {"model": "digits", "version": 1, "passes": 100, "seed": 7, "masks": "independent"}


class Page(HTMLParser):
    """The files that a page loads, and the inline code that a policy would have to allow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src" or (name == "href" and tag == "link"):
                self.loads.append(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
        if tag == "style" or (tag == "script" and "src" not in dict(attrs)):
            self.inline.append(tag)


def loaded(client: httpx.Client) -> dict[str, httpx.Response]:
    """Return every file that the page loads before its first request, by path."""
    found = {"": client.get("/")}
    waiting = Page(found[""].text).loads
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = client.get(f"/{path}")
            imports = re.findall(r'^import .* from "\./(.+)";$', found[path].text, re.MULTILINE)
            waiting += [f"console/{name}" for name in imports]
    return found


def test_the_page_and_all_that_it_loads_come_from_the_service(client: httpx.Client) -> None:
    found = loaded(client)
    assert {path: answer.status_code for path, answer in found.items()} == dict.fromkeys(found, 200)
    kinds = {answer.headers["content-type"].partition(";")[0] for answer in found.values()}
    assert kinds == {"text/html", "text/javascript", "text/css", "image/svg+xml"}
    # Relative, so that the page works behind a prefix.
    assert not [path for path in found if path.startswith(("/", "http:", "https:"))]
    modules = {path for path in found if path.endswith(".js")}
    folder = Path(__file__).parents[2] / "app" / "console"
    assert modules == {f"console/{file.name}" for file in folder.glob("*.js")}


def test_scripts_and_styles_are_under_60_kilobytes(client: httpx.Client) -> None:
    code = [a for path, a in loaded(client).items() if path.endswith((".js", ".css"))]
    assert sum(len(answer.content) for answer in code) < 60_000


def test_the_policy_allows_nothing_but_the_services_own_files_and_the_page_needs_no_more(
    client: httpx.Client,
) -> None:
    for answer in loaded(client).values():
        policy = dict(
            part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
        )
        assert policy["default-src"] == "'none'"
        sources = [value for name, value in policy.items() if name.endswith("-src")]
        assert set(sources) == {"'none'", "'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert Page(client.get("/").text).inline == []


def test_a_file_is_revalidated_but_not_sent_again(client: httpx.Client) -> None:
    first = client.get("/console/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/console/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head("/").headers["content-length"] == str(len(client.get("/").content))


@pytest.mark.parametrize(
    "path", ["/console/nothing.js", "/console/..%2fsettings.py", "/console/%2fetc%2fpasswd"]
)
def test_nothing_but_the_pages_files_is_sent(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["title"]) == (404, "Not Found")


def test_the_page_learns_what_is_served(client: httpx.Client) -> None:
    told = client.get("/console/service").json()
    assert told["models"] == {"diabetes": [1], "digits": [1], "double": [1]}
    assert (told["device"], told["keys"]) == ("cpu", False)


def test_the_page_learns_a_requests_defaults(
    client: httpx.Client, examples: Callable[[str], list[object]]
) -> None:
    told = client.get("/console/service").json()["defaults"]
    assert told.keys() == {"passes", "interval", "masks"}
    body = {"model": "digits", "inputs": examples("digits")[:1], "seed": 3}
    explicit = client.post("/uncertainty", json=body | told).json()
    assert client.post("/uncertainty", json=body).json() == explicit


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_a_model_is_described_by_its_manifest_and_real_examples(
    client: httpx.Client, built: Path, name: str
) -> None:
    told = client.get(f"/console/models/{name}/versions/1").json()
    place = built / "models" / name / "1"
    manifest = json.loads((place / "manifest.json").read_text())
    for field in ("name", "version", "task", "input", "outputs", "sites", "noise"):
        assert told[field] == manifest[field]
    assert told["verification"] == manifest["provenance"]["verification"]
    examples = json.loads((place / "examples.json").read_text())
    assert [each["truth"] for each in told["examples"]] == [each["truth"] for each in examples]
    for shown, written in zip(told["examples"], examples, strict=True):
        np.testing.assert_array_equal(np.float32(shown["input"]), np.float32(written["input"]))
    assert told["debug"] is True


@pytest.mark.parametrize(("side", "shown"), [(8, 10), (200, 2), (400, 1)])
def test_the_page_gets_fewer_examples_the_larger_they_are(side: int, shown: int) -> None:
    inputs = np.zeros((10, side, side), np.float32)
    assert len(console.shown(Examples(inputs, [None] * 10))) == shown


@pytest.mark.parametrize("path", ["digits/versions/2", "digits/versions/x", "nothing/versions/1"])
def test_a_model_that_is_not_served_is_a_404(client: httpx.Client, path: str) -> None:
    answer = client.get(f"/console/models/{path}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("kind", ["independent", "stratified"])
def test_masks_are_those_of_the_first_pass(
    client: httpx.Client, examples: Callable[[str], list[object]], kind: str
) -> None:
    # In an answer of one pass, the share kept is that of the first mask.
    fields = {"model": "double", "version": 1, "passes": 1, "seed": 11, "masks": kind}
    answer = client.post("/debug/mc", json=fields | {"inputs": examples("double")[:1]}).json()
    shown = client.post("/console/masks", json=fields).json()["sites"]
    assert [site["name"] for site in shown] == [site["name"] for site in answer["sites"]]
    for site, of_answer in zip(shown, answer["sites"], strict=True):
        assert set(site["mask"]) == {0, 1}
        assert np.mean(site["mask"]) == pytest.approx(of_answer["kept"], abs=1e-12)


def test_masks_do_not_depend_on_how_many_passes_follow(client: httpx.Client) -> None:
    first, more, other = (
        client.post("/console/masks", json=MASKS | change).json()["sites"]
        for change in ({}, {"passes": 50}, {"seed": 8})
    )
    assert first == more != other


@pytest.mark.parametrize(
    ("change", "status"),
    [({"passes": 10_001}, 422), ({"seed": -1}, 422), ({"model": "nothing"}, 404), ({"x": 1}, 422)],
)
def test_masks_of_an_invalid_request_are_refused(
    client: httpx.Client, change: dict[str, object], status: int
) -> None:
    assert client.post("/console/masks", json=MASKS | change).status_code == status


def test_without_debug_the_page_learns_so_and_no_mask_is_shown(built: Path) -> None:
    with service(built / "models", DROPSERVE_DEBUG="0") as client:
        assert client.get("/console/models/digits/versions/1").json()["debug"] is False
        refused = client.post("/console/masks", json=MASKS)
        assert refused.status_code == 404
        assert "DROPSERVE_DEBUG=1" in refused.json()["detail"]


def test_passes_are_shown_only_with_a_key_for_them(built: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    both, one = new_key(file, "predict", "debug"), new_key(file, "predict")
    with service(built / "models", DROPSERVE_API_KEYS_FILE=str(file)) as client:
        assert client.get("/console/service").json()["keys"] is True
        for key, shown in ((both, True), (one, False)):
            headers = {"x-api-key": key}
            told = client.get("/console/models/digits/versions/1", headers=headers).json()
            assert told["debug"] is shown
