"""How soon does the console paint, and show its first answer? ``make first-paint``.

Beside it the page that every FastAPI service has: Swagger UI under ``/docs``, here from the same
service, files and all. Each visit is a first one, with nothing in the browser's caches.
"""

import statistics

from playwright.sync_api import Browser, sync_playwright

from benchmarks import network, timing
from benchmarks.startup_memory import OURS, SERVERS, served
from tests.console.browser import launch

VISITS = 20
# Each page, and what is there once it can be used.
PAGES = {"the console": ("", "#headline:not(:empty)"), "Swagger UI": ("docs", ".opblock")}


def main() -> None:
    command = (*SERVERS[OURS], str(network.models()), "--debug")
    found: dict[str, list[dict[str, float]]] = {page: [] for page in PAGES}
    with sync_playwright() as playwright, served(command) as (_, connection):
        browser = launch(playwright)
        for _ in range(VISITS):
            for page, (path, usable) in PAGES.items():
                url = f"http://127.0.0.1:{connection.port}/{path}"
                found[page].append(visit(browser, url, usable))
        browser.close()
    ours = found["the console"]
    rows: list[timing.Row] = [
        {
            "page": page,
            "what": what,
            "median": statistics.median(each[what] for each in visits),
            "least": min(each[what] for each in visits),
            "most": max(each[what] for each in visits),
            "x console": statistics.median(each[what] for each in visits)
            / statistics.median(each[what] for each in ours),
        }
        for what in ours[0]
        for page, visits in found.items()
    ]
    timing.report(__file__, f"{VISITS} first visits each ({timing.machine()})", rows)


def visit(browser: Browser, url: str, usable: str) -> dict[str, float]:
    """Open a page as if for the first time; return when what was there, and what it weighs."""
    context = browser.new_context(reduced_motion="reduce")
    try:
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector(usable)
        shown: float = page.evaluate("performance.now()")
        paint: float = page.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        )
        size: float = page.evaluate(
            """performance.getEntriesByType("resource").concat(
                performance.getEntriesByType("navigation")
            ).reduce((sum, each) => sum + each.decodedBodySize, 0)"""
        )
        return {"ms to first paint": paint, "ms to use": shown, "kB": size / 1000}
    finally:
        context.close()


if __name__ == "__main__":
    main()
