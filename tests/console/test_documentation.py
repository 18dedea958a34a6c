"""The documentation of the interface, behind a proxy that strips a prefix from its paths."""

import pytest
from playwright.sync_api import Browser, Route, expect

pytestmark = pytest.mark.browser

PREFIX = "/some/prefix"


def test_the_documentation_works_below_a_prefix_that_a_proxy_strips(
    browser: Browser, url: str
) -> None:
    outside: list[str] = []

    def proxy(route: Route) -> None:
        before, found, path = route.request.url.partition(f"{PREFIX}/")
        if not found:
            outside.append(route.request.url)
            route.abort()
            return
        route.fulfill(response=route.fetch(url=f"{before}/{path}"))

    page = browser.new_page()
    page.route("**/*", proxy)
    page.goto(f"{url}{PREFIX}/docs")
    page.get_by_text("/predict", exact=True).click()
    operation = page.locator("#operations-default-predict")
    operation.get_by_role("button", name="Try it out").click()
    body = f'{{"model": "digits", "inputs": [{[0] * 64}]}}'
    operation.locator("textarea").fill(body)
    with page.expect_response(lambda response: response.request.method == "POST") as answered:
        operation.get_by_role("button", name="Execute").click()
    assert answered.value.url == f"{url}{PREFIX}/predict"
    assert answered.value.status == 200
    expect(operation.get_by_text("probabilities").first).to_be_visible()
    assert outside == []
    page.close()
