"""The console by axe-core, in light and dark, wide and on a phone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.conftest import ROOT, service
from tests.console.browser import PHONE, Console, opened
from tests.console.strokes import DIGITS
from tests.end_to_end.test_access import new_key

pytestmark = pytest.mark.browser

AXE = ROOT / "build" / "npm" / "node_modules" / "axe-core" / "axe.min.js"


def finding(console: Console) -> list[str]:
    """Return the violations that axe-core finds in the page's current state."""
    console.page.evaluate(AXE.read_text())
    found = console.page.evaluate("axe.run()")
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found["violations"]]


def check(console: Console, state: str) -> None:
    """Check that there are no violations, and that everything fits in its place."""
    assert (state, finding(console)) == (state, [])
    outside = console.page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(each => {
            const panel = each.closest(".panel");
            return panel && each.checkVisibility() && !each.closest(".hidden, #features, svg")
                && each.getBoundingClientRect().right > panel.getBoundingClientRect().right + 1;
        }).map(each => each.outerHTML.slice(0, 100))"""
    )
    assert (state, outside) == (state, [])
    width = console.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert (state, width[0]) == (state, width[1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "phone"])
def test_axe_finds_nothing_wrong_in_any_state(
    browser: Browser, url: str, unusual_url: str, scheme: str, size: str
) -> None:
    options: dict[str, Any] = dict(PHONE) if size == "phone" else {}
    options |= {"color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, unusual_url, **options) as console:
        for name in ("many", "two", "coloured"):
            console.choose(name)
            check(console, name)
    with opened(browser, url, **options) as console:
        states: dict[str, Callable[[], object]] = {
            "digits": lambda: console.choose("digits"),
            "drawn": lambda: console.draw(DIGITS["2"]),
            "fooled": lambda: console.press("Two overlaid"),
            "double": lambda: console.choose("double"),
            "diabetes": lambda: console.choose("diabetes"),
            "error": lambda: console.set(passes="0"),
        }
        for name, enter in states.items():
            enter()
            check(console, name)


def test_axe_finds_nothing_wrong_with_the_form_for_a_key(
    browser: Browser, built: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    new_key(file, "predict")
    with (
        service(built / "models", DROPSERVE_API_KEYS_FILE=str(file)) as client,
        opened(browser, str(client.base_url)) as console,
    ):
        expect(console.page.get_by_label("API key")).to_be_visible()
        assert finding(console) == []
