"""The console in a real browser, and what a person does there."""

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
    """Start the browser of this machine; it finds no host but this one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "there is no Chromium; `make browser` installs it"
    return playwright.chromium.launch(
        executable_path=found, args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    )


class Console:
    """The console in a tab, and all that went on in it."""

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
        """Wait until all that was put in is answered."""
        expect(self.page.locator("#console")).to_have_attribute("aria-busy", "false")

    def answer_of(self, act: Callable[[], object], path: str = "debug/mc") -> dict[str, Any]:
        """Do something, and return the answer that it leads to once it is shown."""
        with self.page.expect_response(lambda answer: answer.url.endswith(f"/{path}")) as found:
            act()
        self.answered()
        answer: dict[str, Any] = found.value.json()
        return answer

    def choose(self, name: str, path: str = "debug/mc") -> dict[str, Any]:
        """Choose a model."""
        model = self.page.get_by_label("Model")
        # The first that is served is chosen already.
        model.evaluate("select => { select.value = ''; }")
        return self.answer_of(lambda: model.select_option(f"{name} 1"), path)

    def press_only(self, button: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=button, exact=True).click()

    def press(self, button: str) -> dict[str, Any]:
        """Press a button that asks."""
        return self.answer_of(lambda: self.press_only(button))

    def example(self, truth: str) -> dict[str, Any]:
        """Take the first real example of a class."""
        name = re.compile(rf"^Example \d+: {truth}$")
        return self.answer_of(self.page.get_by_role("button", name=name).first.click)

    def set(self, **fields: str) -> dict[str, Any]:
        """Fill in controls and ask."""
        for name, value in fields.items():
            box = self.page.locator(f"[name={name}]")
            box.fill(value)
            # Who leaves a field has changed it, which asks, too.
            box.blur()
        self.answered()
        return self.press("Ask")

    def area(self) -> Callable[[Point], Point]:
        """Bring the drawing area into view; return where on the screen its points are."""
        area = self.page.locator("#drawing")
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        assert box
        left, top, width, height = (box[side] for side in ("x", "y", "width", "height"))
        return lambda point: (left + point[0] * width, top + point[1] * height)

    def draw(self, strokes: Sequence[Sequence[Point]]) -> dict[str, Any]:
        """Draw with the mouse, on a blank area."""
        self.press("Blank")
        on_screen = self.area()
        mouse = self.page.mouse
        for first, *others in strokes:
            mouse.move(*on_screen(first))
            mouse.down()
            for point in others:
                mouse.move(*on_screen(point), steps=4)
            mouse.up()
        # Parts of it may have been asked about, too; what counts is the last answer.
        self.answered()
        return self.press("Ask")

    def touch(self, *fingers: Sequence[Point]) -> dict[str, Any]:
        """Draw with fingers at a time, on a blank area: each goes through as many points."""
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
        return self.press("Ask")

    def request(self) -> dict[str, Any]:
        """Return the body of the request that the curl line makes."""
        words = shlex.split(self.page.locator("#curl").input_value())
        body: dict[str, Any] = json.loads(words[words.index("-d") + 1])
        return body

    def dots(self) -> list[str]:
        """Return the pixels of all strips of dots."""
        strips = self.page.locator(".strip").all()
        return [strip.evaluate("canvas => canvas.toDataURL()") for strip in strips]

    def text(self, selector: str) -> str:
        """Return what is to be read at a place."""
        return self.page.locator(selector).inner_text()

    def all_shown(self, passes: int) -> None:
        """Wait until so many passes have appeared."""
        expect(self.page.locator(".counter")).to_have_text(f"(pass {passes} of {passes})")


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Console]:
    """Open the console in a browser of its own settings."""
    context = browser.new_context(**options)
    try:
        yield Console(context.new_page(), url)
    finally:
        context.close()
