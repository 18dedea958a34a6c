"""The files, tests, headings, endpoints and fields that the documentation names exist."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TOP = "app|benchmarks|deploy|docs|dropserve|export|model|tests"
# The service's pages, which are not in its OpenAPI document.
FOR_PEOPLE = {"GET /", "GET /docs", "GET /openapi.json"}

Examples = Callable[[str], list[object]]


def identified(document: Path) -> str:
    return str(document.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """Return what GitHub names the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(text: str) -> Iterator[list[str]]:
    """Return the cells of all tables."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("document", PAGES, ids=identified)
def test_every_link_within_the_repository_leads_to_a_file_and_a_heading(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if re.match("https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", PAGES, ids=identified)
def test_every_file_and_test_that_a_page_names_exists(document: Path) -> None:
    named = ROOT
    for word in code(document.read_text()):
        if re.fullmatch(rf"({TOP})/[\w./-]*", word):
            named = ROOT / word
            assert named.exists(), word
        elif re.fullmatch(r"test_\w+", word):
            assert f"def {word}(" in named.read_text(), (named, word)


def test_the_docs_list_every_endpoint(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    served = {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method in operations
    }
    text = (ROOT / "docs" / "http.md").read_text()
    listed = [word for cells in rows(text) for word in code(cells[0]) if re.match("GET|POST", word)]
    assert len(listed) == len(set(listed))
    assert set(listed) == served


def test_every_endpoint_that_the_readme_lists_is_served(client: httpx.Client) -> None:
    text = (ROOT / "README.md").read_text()
    listed = {
        word.replace("NAME", "digits")
        for cells in rows(text)
        for word in code(cells[0])
        if re.match("(GET|POST) ", word)
    }
    assert listed >= FOR_PEOPLE
    for endpoint in listed:
        method, path = endpoint.split()
        # Without a body a POST is refused, but not for its path or its method.
        status = client.request(method, path).status_code
        assert status == 200 if method == "GET" else status not in (404, 405), endpoint


def test_the_docs_list_every_request_field_with_its_default(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    properties = schemas["UncertaintyRequest"]["anyOf"][0]["properties"]
    text = (ROOT / "docs" / "http.md").read_text()
    parts = text[text.index("## Predict") : text.index("## Debug")]
    listed = {code(cells[0])[0]: cells[1].strip("`") for cells in rows(parts) if code(cells[0])}
    assert set(listed) == set(properties)
    for name, field in properties.items():
        if field.get("default") is not None:
            assert listed[name] == str(field["default"])


@pytest.fixture(scope="module")
def answers(client: httpx.Client, examples: Examples) -> dict[str, Any]:
    """Real answers, by endpoint and model."""

    def answer(path: str, model: str) -> Any:
        body = {"inputs": examples(model)[:1], "model": model}
        more = {} if path == "/predict" else {"coverage": 0.9, "passes": 10}
        return client.post(path, json=body | more).raise_for_status().json()

    paths = ("/predict", "/uncertainty", "/debug/mc")
    return {f"{path} {model}": answer(path, model) for path in paths for model in MODELS}


MODELS = ("digits", "diabetes")
# Which an answer repeats from its request.
REPEATED = {"model", "version", "passes", "seed"}


def test_the_docs_define_every_field_of_an_answer(answers: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "uncertainty.md").read_text()
    table = text[: text.index("## Masks")]
    defined = {word.partition("[")[0] for cells in rows(table) for word in code(cells[0])}
    returned = set(chain(*(answers[f"/debug/mc {model}"] for model in MODELS)))
    assert defined == returned - REPEATED - {"labels", "samples"}


def test_the_readme_explains_every_field_of_an_uncertainty(answers: dict[str, Any]) -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## First request") : text.index("## Endpoints")]
    explained = {word for cells in rows(table) for word in code(cells[0])}
    returned = set(chain(*(answers[f"/uncertainty {model}"] for model in MODELS)))
    assert explained == returned - REPEATED


def fields(document: object) -> object:
    """Return the names in a JSON document: those of a list are those of its first item."""
    if isinstance(document, dict):
        return {name: fields(value) for name, value in document.items()}
    return fields(document[0]) if isinstance(document, list) and document else None


def test_the_answers_that_the_docs_show_have_the_fields_of_real_ones(
    client: httpx.Client, answers: dict[str, Any]
) -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    prediction, uncertainty, passes, problem, first_protocol = (
        json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", text, re.M | re.S)
    )
    for path, shown in (
        ("/predict", prediction),
        ("/uncertainty", uncertainty),
        ("/debug/mc", passes),
    ):
        real = answers[f"{path} digits"]
        real.pop("prediction_set", None)  # the requests on the page ask for no coverage
        assert fields(shown) == fields(real)
    assert first_protocol == {"predictions": prediction["probabilities"]}
    body = {"inputs": [[1, 2, 3]], "model": "digits"}
    refused = client.post("/predict", json=body)
    request_id = {"request_id": problem["request_id"]}
    assert refused.json() | request_id == problem
