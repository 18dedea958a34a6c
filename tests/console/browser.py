"""The console in a real browser, and the actions of a person there."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, Playwright, expect

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True}
Point = tuple[float, float]  # shares of a drawing area's width and height

expect.set_options(timeout=20_000)


def launch(playwright: Playwright) -> Browser:
    """Start this machine's browser, which can reach no host but 127.0.0.1."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "there is no Chromium; `make browser` installs it"
    return playwright.chromium.launch(
        executable_path=found, args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    )


class Console:
    """The console in a tab, with the errors and requests of the page."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda message: self.note(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.goto(url)
        page.wait_for_function(
            """() => !document.querySelector("#key-form").hidden
                || document.querySelector("#console").ariaBusy === "false" """
        )

    def note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(text)

    def answered(self) -> None:
        """Wait for the answer to the current input."""
        expect(self.page.locator("#console")).to_have_attribute("aria-busy", "false")

    def answer_of(self, act: Callable[[], object], path: str = "debug/mc") -> dict[str, Any]:
        """Act, and return the answer that follows, once it is shown."""
        with self.page.expect_response(lambda answer: answer.url.endswith(f"/{path}")) as found:
            act()
        self.answered()
        answer: dict[str, Any] = found.value.json()
        return answer

    def choose(self, name: str, path: str = "debug/mc") -> dict[str, Any]:
        """Choose a model."""
        model = self.page.get_by_label("Model")
        # Selecting the current model again would change nothing.
        model.evaluate("select => { select.value = ''; }")
        return self.answer_of(lambda: model.select_option(f"{name} 1"), path)

    def press_only(self, button: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=button, exact=True).click()

    def press(self, button: str) -> dict[str, Any]:
        """Press a button that sends a request; return the answer."""
        return self.answer_of(lambda: self.press_only(button))

    def example(self, truth: str) -> dict[str, Any]:
        """Take the first real example of a class; return the answer."""
        name = re.compile(rf"^Example \d+: {truth}$")
        return self.answer_of(self.page.get_by_role("button", name=name).first.click)

    def set(self, **fields: str) -> dict[str, Any]:
        """Fill in controls and run; return the answer."""
        for name, value in fields.items():
            box = self.page.locator(f"[name={name}]")
            box.fill(value)
            # Leaving a changed field sends a request, too.
            box.blur()
        self.answered()
        return self.press("Run")

    def area(self) -> Callable[[Point], Point]:
        """Bring the drawing area into view; return a map of its points to the screen's."""
        area = self.page.locator("#drawing")
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        assert box
        left, top, width, height = (box[side] for side in ("x", "y", "width", "height"))
        return lambda point: (left + point[0] * width, top + point[1] * height)

    def draw(self, strokes: Sequence[Sequence[Point]]) -> dict[str, Any]:
        """Draw with the mouse on a blank area; return the answer."""
        self.press("Blank")
        on_screen = self.area()
        mouse = self.page.mouse
        for first, *others in strokes:
            mouse.move(*on_screen(first))
            mouse.down()
            for point in others:
                mouse.move(*on_screen(point), steps=4)
            mouse.up()
        # Requests for parts of the drawing may have gone out, too; the last answer counts.
        self.answered()
        return self.press("Run")

    def touch(self, *fingers: Sequence[Point]) -> dict[str, Any]:
        """Draw with fingers at once on a blank area, each through the same number of points."""
        self.press("Blank")
        on_screen = self.area()
        session = self.page.context.new_cdp_session(self.page)
        for number, points in enumerate(zip(*fingers, strict=True)):
            places = [on_screen(point) for point in points]
            event = {
                "type": "touchMove" if number else "touchStart",
                "touchPoints": [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)],
            }
            session.send("Input.dispatchTouchEvent", event)
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        self.answered()
        return self.press("Run")

    def request(self) -> dict[str, Any]:
        """Return the body of the curl line's request."""
        words = shlex.split(self.page.locator("#curl").input_value())
        body: dict[str, Any] = json.loads(words[words.index("-d") + 1])
        return body

    def dots(self) -> list[str]:
        """Return the pixels of all strips of dots."""
        strips = self.page.locator(".strip").all()
        return [strip.evaluate("canvas => canvas.toDataURL()") for strip in strips]

    def text(self, selector: str) -> str:
        """Return the text at a place."""
        return self.page.locator(selector).inner_text()

    def all_shown(self, passes: int) -> None:
        """Wait until all of so many passes have appeared."""
        expect(self.page.locator(".counter")).to_have_text(f"(pass {passes} of {passes})")


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Console]:
    """Open the console in a browser context with these options."""
    context = browser.new_context(**options)
    try:
        yield Console(context.new_page(), url)
    finally:
        context.close()
