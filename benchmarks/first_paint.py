"""How soon does the console paint, and when can a visitor use it? ``make first-paint``.

The table compares it with Swagger UI, the page that every FastAPI service has under ``/docs``,
served here by the same process, assets included. Each visit is a first one: the browser's caches
are empty.
"""

import statistics

from playwright.sync_api import Browser, sync_playwright

from benchmarks import figures, network, timing
from benchmarks.startup_memory import OURS, SERVERS, served
from tests.console.browser import launch

VISITS = 20
# Path of each page, and a selector that matches once the page is usable.
PAGES = {"the console": ("", "#headline:not(:empty)"), "Swagger UI": ("docs", ".opblock")}


def main() -> None:
    args = figures.parser(__file__, __doc__).parse_args()
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
    rows: list[figures.Row] = [
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
    figures.report(args.result, f"{VISITS} first visits each ({timing.machine()})", rows)


def visit(browser: Browser, url: str, usable: str) -> dict[str, float]:
    """Open a page with empty caches; return its times in ms and its decoded size in kB."""
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
