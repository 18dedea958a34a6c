"""Take a picture of each state of the console: ``make screenshots``.

The pictures go to ``docs/console/``, the bundles that they show to ``build/screenshots/``.
"""

import csv
import io
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from functools import partial
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from sklearn.datasets import load_wine

from tests.conftest import ROOT, build, service
from tests.console.browser import PHONE, Console, launch, opened
from tests.console.strokes import DIGITS
from tests.end_to_end.test_access import new_key

FOLDER = ROOT / "build" / "screenshots"
PICTURES = ROOT / "docs" / "console"
WINE = FOLDER / "wine.csv"
# The models, and the options of their training.
MODELS = {
    "digits": ["--data", "digits"],
    "double": ["--data", "digits", "--scaling", "double"],
    "diabetes": ["--data", "diabetes"],
    "wine": ["--data", str(WINE), "--target", "cultivar"],
}
WIDE = {"viewport": {"width": 1080, "height": 860}}
# Flat areas and thin lines: more colours would not be visible, and cost twice the bytes.
COLOURS = 200


def main() -> None:
    """Train missing models, and take all pictures."""
    make_models()
    PICTURES.mkdir(exist_ok=True)
    with ExitStack() as stack:
        # Keeps the services' logs off the screen.
        stack.enter_context(redirect_stdout(io.StringIO()))
        browser = launch(stack.enter_context(sync_playwright()))
        client = stack.enter_context(service(FOLDER / "models"))
        url = str(client.base_url)
        for name, act in STATES.items():
            take(browser, url, name, act)
        take(browser, url, "dark", fooled, color_scheme="dark")
        take(browser, url, "phone", drawn, **PHONE | {"viewport": {"width": 360, "height": 860}})
        quiet = stack.enter_context(service(FOLDER / "models", DROPSERVE_DEBUG="0"))
        take(browser, str(quiet.base_url), "debug-off", without_debug)
        keys = FOLDER / "keys.json"
        keys.unlink(missing_ok=True)
        new_key(keys, "predict")
        locked = stack.enter_context(service(FOLDER / "models", DROPSERVE_API_KEYS_FILE=str(keys)))
        take(browser, str(locked.base_url), "key", lambda _: None)
    for path in sorted(PICTURES.glob("*.png")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def make_models() -> None:
    """Train and export the models that do not exist yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wine = load_wine()
    with WINE.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*wine.feature_names, "cultivar"])
        for x, y in zip(wine.data, wine.target, strict=True):
            rows.writerow([*x, f"cultivar {y + 1}"])
    for name, options in MODELS.items():
        if not (FOLDER / "models" / name).exists():
            build(FOLDER, name, options)


def drawn(console: Console) -> None:
    """A digit that was drawn."""
    console.choose("digits")
    console.draw(DIGITS["3"])


def fooled(console: Console) -> None:
    """Two digits over each other."""
    console.choose("digits")
    console.press("Two overlaid")


def regression(console: Console) -> None:
    """A value, and the parts of its spread."""
    console.choose("diabetes")


def beyond(console: Console) -> None:
    """A slider far beyond the training data."""
    console.choose("diabetes")
    console.page.get_by_label("bmi, slider").focus()
    console.answer_of(lambda: console.page.keyboard.press("End"))


def table(console: Console) -> None:
    """A wine between two cultivars."""
    console.choose("wine")
    wine = load_wine()
    between = sum(wine.data[wine.target == cultivar].mean(axis=0) for cultivar in (0, 1)) / 2
    for feature, value in zip(wine.feature_names, between, strict=True):
        box = console.page.get_by_label(feature, exact=True)
        console.answer_of(partial(box.fill, f"{value:.3g}"))


def double(console: Console) -> None:
    """Eval mode of a model that was scaled twice."""
    console.choose("double")
    console.example("8")


def error(console: Console) -> None:
    """A refused request."""
    console.choose("digits")
    console.set(passes="20000")


def without_debug(console: Console) -> None:
    """The debug endpoint is off."""
    console.choose("digits", "predict")


STATES: dict[str, Callable[[Console], Any]] = {
    "drawn": drawn,
    "fooled": fooled,
    "table": table,
    "regression": regression,
    "beyond": beyond,
    "double": double,
    "error": error,
}


def take(
    browser: Browser, url: str, name: str, act: Callable[[Console], Any], **options: Any
) -> None:
    """Bring the console into a state, and write its picture."""
    with opened(browser, url, reduced_motion="reduce", **WIDE | options) as console:
        act(console)
        top = {"double": "#dropout-title", "phone": "#answer-title"}.get(name, "body")
        console.page.locator(top).evaluate("e => e.scrollIntoView()")
        picture = Image.open(io.BytesIO(console.page.screenshot()))
        path = PICTURES / f"{name}.png"
        picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


if __name__ == "__main__":
    main()
