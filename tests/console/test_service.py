"""The console and its service: requests, errors, keys, the debug endpoint, other hosts."""

import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Error, Route, expect

from tests import bundles
from tests.conftest import service
from tests.console.browser import Console, opened
from tests.console.strokes import DIGITS
from tests.console.unusual import EVIL
from tests.end_to_end.test_access import new_key

pytestmark = pytest.mark.browser

REFUSED = "Failed to load resource: the server responded with a status of "


def test_the_curl_line_repeats_the_request(console: Console) -> None:
    console.press("Noise")
    answer = console.set(seed="")
    words = shlex.split(console.page.locator("#curl").input_value())
    assert console.request()["seed"] == answer["seed"]
    assert words[:3] == ["curl", "-H", "Content-Type: application/json"]
    again = httpx.post(words[-1], json=console.request()).json()
    assert again == answer
    console.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    console.page.get_by_role("button", name="Copy").click()
    expect(console.page.locator("#copied")).to_have_text("Copied.")
    copied = console.page.evaluate("navigator.clipboard.readText()")
    assert copied == console.page.locator("#curl").input_value()


def test_the_controls_begin_with_the_services_defaults(
    browser: Browser, client: httpx.Client, url: str
) -> None:
    told = client.get("/console/service").json()

    def differ(route: Route) -> None:
        defaults = {"passes": 30, "interval": 0.5, "masks": "stratified"}
        route.fulfill(json=told | {"defaults": defaults})

    with opened(browser, url) as console:
        request = console.request()
        assert {name: request[name] for name in told["defaults"]} == told["defaults"]
        console.page.route("**/console/service", differ)
        answer = console.answer_of(console.page.reload)
        assert (answer["passes"], answer["interval"]["level"]) == (30, 0.5)
        assert console.request()["masks"] == "stratified"
        assert console.errors == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("passes", "0", "passes: Input should be greater than or equal to 1 (422)"),
        ("passes", "many", "passes: Input should be a valid integer (422)"),
        ("passes", "10001", "passes: must be at most 10000, not 10001 (422)"),
        ("interval", "1", "interval: Input should be less than 1 (422)"),
        ("seed", "-1", "seed: Input should be greater than or equal to 0 (422)"),
    ],
)
def test_a_refusal_is_shown_in_the_services_words(
    browser: Browser, url: str, field: str, value: str, said: str
) -> None:
    with opened(browser, url) as console:
        console.choose("digits")
        console.set(**{field: value})
        alert = console.page.get_by_role("alert")
        expect(alert).to_have_text(said)
        assert not console.page.locator("#answers").is_visible()
        good = {"passes": "100", "interval": "0.9", "seed": "7"}[field]
        console.set(**{field: good})
        expect(alert).to_be_hidden()
        assert console.page.locator("#answers").is_visible()
        assert {error.partition("422")[0] for error in console.errors} == {REFUSED}


def test_a_service_that_is_gone_is_reported(browser: Browser, built: Path) -> None:
    with ExitStack() as stack:
        with service(built / "models") as client:
            console = stack.enter_context(opened(browser, str(client.base_url)))
            console.choose("digits")
        console.page.get_by_role("button", name="Run", exact=True).click()
        alert = console.page.get_by_role("alert")
        expect(alert).to_have_text("The service is not responding.")


def test_a_response_from_elsewhere_is_not_taken_for_the_services(
    browser: Browser, url: str
) -> None:
    with opened(browser, url) as console:
        console.choose("digits")
        console.page.route("**/debug/mc", lambda route: route.fulfill(body="<h1>Log in</h1>"))
        console.press_only("Run")
        expect(console.page.get_by_role("alert")).to_have_text(
            "The response is not from the service (200)."
        )
        console.answered()
        assert not console.page.locator("#answers").is_visible()


def hold(console: Console, pattern: str, act: Callable[[], object]) -> Route:
    """Act, and hold back the first request that matches the pattern."""
    held: list[Route] = []

    def handle(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    console.page.route(pattern, handle)
    with console.page.expect_request(pattern):
        act()
    while not held:
        console.page.wait_for_timeout(20)
    return held[0]


def test_a_late_answer_is_not_shown_for_a_newer_request(browser: Browser, url: str) -> None:
    with opened(browser, url) as console:
        console.choose("digits")
        held = hold(console, "**/debug/mc", lambda: console.press_only("Noise"))
        shown = console.choose("double")
        with suppress(Error):
            held.continue_()
        console.page.wait_for_timeout(300)
        assert shown["model"] == "double"
        assert console.text("#answered-by").startswith("double, version 1, ")
        assert console.errors == []


def test_until_a_model_has_answered_no_answer_is_shown_under_its_name(
    browser: Browser, url: str
) -> None:
    with opened(browser, url) as console:
        console.choose("digits")
        model = console.page.get_by_label("Model")
        held = hold(console, "**/debug/mc", lambda: model.select_option("diabetes 1"))
        expect(console.page.locator("#features")).to_be_visible()
        assert not console.page.locator("#answers").is_visible()
        held.continue_()
        console.answered()
        assert console.text("#headline").startswith("progression: ")


def test_an_error_of_a_model_that_is_no_longer_selected_is_not_shown(
    browser: Browser, url: str
) -> None:
    with opened(browser, url) as console:
        console.choose("digits")
        model = console.page.get_by_label("Model")
        held = hold(console, "**/models/diabetes/**", lambda: model.select_option("diabetes 1"))
        console.choose("double")
        with suppress(Error):
            held.fulfill(status=404, body='{"detail": "no model"}')
        console.page.wait_for_timeout(200)
        assert not console.page.get_by_role("alert").is_visible()
        assert console.text("#answered-by").startswith("double, ")


def test_a_model_that_is_gone_is_reported(browser: Browser, built: Path) -> None:
    with (
        service(built / "models") as client,
        opened(browser, str(client.base_url)) as console,
    ):
        console.choose("digits")
        assert client.post("/v2/repository/models/digits/unload").status_code == 200
        console.press_only("Run")
        alert = console.page.get_by_role("alert")
        expect(alert).to_contain_text("no model 'digits'; served are: diabetes, double (404)")
        expect(alert).to_contain_text("Reload the page")


def test_the_page_asks_for_a_key_once_the_service_needs_one(
    browser: Browser, built: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "predict", "debug")
    with ExitStack() as stack:
        with service(built / "models") as client:
            console = stack.enter_context(opened(browser, str(client.base_url)))
            console.choose("digits")
            port = str(client.base_url.port)
        stack.enter_context(
            service(built / "models", DROPSERVE_API_KEYS_FILE=str(file), DROPSERVE_PORT=port)
        )
        console.press_only("Run")
        box = console.page.get_by_label("API key")
        expect(box).to_be_visible()
        box.fill("ключ")
        console.press_only("Use key")
        expect(console.page.get_by_role("alert")).to_have_text(
            "Keys hold visible ASCII characters only."
        )
        box.fill(key)
        answer = console.answer_of(lambda: console.press_only("Use key"))
        assert answer["model"] == "digits"
        assert box.input_value() == ""


@pytest.mark.parametrize("seed", ["9007199254740993", "1e400", "1.5"])
def test_a_seed_that_javascript_cannot_hold_is_refused_and_not_changed(
    browser: Browser, url: str, seed: str
) -> None:
    with opened(browser, url) as console:
        console.choose("digits")
        console.set(seed=seed)
        expect(console.page.get_by_role("alert")).to_contain_text("seed: ")
        assert console.request()["seed"] == seed


def test_without_debug_the_page_omits_the_passes_and_says_so(browser: Browser, built: Path) -> None:
    with (
        service(built / "models", DROPSERVE_DEBUG="0") as client,
        opened(browser, str(client.base_url)) as console,
    ):
        page = console.page
        for name in ("diabetes", "digits"):
            answer = console.choose(name, "predict")
            expect(page.locator("#no-passes")).to_be_visible()
            assert page.locator(".strip").count() == 0
            assert page.locator(".mask").count() == 0
        assert page.locator(".classes tbody tr").count() == 10
        assert console.text("#gap").startswith("Class ")
        assert answer["probabilities"][0][0] > 0.5
        assert page.locator("#curl").input_value().endswith("/uncertainty")
        assert console.errors == []


def test_with_keys_it_asks_for_one_and_keeps_it_in_memory_only(
    browser: Browser, built: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "predict", "debug")
    with (
        service(built / "models", DROPSERVE_API_KEYS_FILE=str(file)) as client,
        opened(browser, str(client.base_url)) as console,
    ):
        page = console.page
        box = page.get_by_label("API key")
        expect(box).to_be_visible()
        assert not page.locator("#console").is_visible()
        box.fill("ds_wrong")
        page.get_by_role("button", name="Use key").click()
        expect(page.get_by_role("alert")).to_have_text("the API key is not known (401)")
        console.errors.clear()
        box.fill(key)
        answer = console.answer_of(page.get_by_role("button", name="Use key").click)
        assert len(answer["samples"]) == 100
        expect(page.get_by_role("alert")).to_be_hidden()
        curl = page.locator("#curl").input_value()
        assert key not in curl
        assert '-H "X-API-Key: $KEY"' in curl
        kept = page.evaluate(
            """async () => JSON.stringify([localStorage, sessionStorage, document.cookie,
                location.href, history.state, await indexedDB.databases(), await caches.keys()])"""
        )
        assert kept == json.dumps([{}, {}, "", str(client.base_url) + "/", None, [], []]).replace(
            " ", ""
        )
        page.reload()
        expect(box).to_be_visible()
        assert box.input_value() == ""
        assert not page.locator("#console").is_visible()
        assert console.errors == []


def test_a_key_that_is_not_for_the_passes_shows_the_rest(
    browser: Browser, built: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "predict")
    with (
        service(built / "models", DROPSERVE_API_KEYS_FILE=str(file)) as client,
        opened(browser, str(client.base_url)) as console,
    ):
        console.page.get_by_label("API key").fill(key)
        use = console.page.get_by_role("button", name="Use key")
        console.answer_of(use.click, "predict")
        expect(console.page.locator("#no-passes")).to_be_visible()
        assert console.errors == []


def test_names_of_others_are_text_and_never_html(
    browser: Browser, built: Path, unusual: Path, tmp_path: Path
) -> None:
    place = built / "models" / "digits" / "1"
    sites = json.loads((place / "manifest.json").read_text())["sites"]
    named = [site | {"name": f"{EVIL}{i}"} for i, site in enumerate(sites)]
    bundles.publish(place, tmp_path / "digits" / "1", sites=named)
    for name in ("many", "two"):
        bundles.publish(unusual / name / "1", tmp_path / name / "1")
    with (
        service(tmp_path) as client,
        opened(browser, str(client.base_url)) as console,
    ):
        for model, where in (
            *(("digits", "#sites"), ("many", "#features"), ("many", "#gaps"), ("two", "#answer")),
            *(("two", "#headline"), ("two", "#gaps")),
        ):
            console.choose(model)
            expect(console.page.locator(where)).to_contain_text(EVIL)
        assert console.page.locator("img").count() == 0
        assert console.page.title() == "dropserve console"
        assert console.errors == []


def test_nothing_is_asked_of_another_host(console: Console) -> None:
    for name in ("diabetes", "double", "digits"):
        console.choose(name)
    console.draw(DIGITS["5"])
    assert {f"http://{host}" for host in console.hosts} == {console.url}
