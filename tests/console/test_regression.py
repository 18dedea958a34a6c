"""The console of a table and a regression: sliders, the predictive distribution, its parts."""

import pytest
from playwright.sync_api import Browser, expect

from tests.console.browser import Console, opened

pytestmark = pytest.mark.browser


def test_sliders_of_a_regression_move_its_distribution(console: Console) -> None:
    before = console.choose("diabetes")
    slider, box = (
        console.page.get_by_label("bmi, slider"),
        console.page.get_by_label("bmi", exact=True),
    )
    slider.focus()
    value = float(box.input_value())
    moved = console.answer_of(lambda: console.page.keyboard.press("PageUp"))
    assert float(box.input_value()) == float(slider.input_value()) > value
    assert console.request()["inputs"][0][2] == float(box.input_value())
    # It is no real example any more.
    assert console.page.get_by_label("Real example").input_value() == ""
    # More weight for the same height: the disease is expected to go on faster.
    assert moved["mean"][0][0] > before["mean"][0][0]
    assert console.text("#headline").startswith(f"progression: {moved['mean'][0][0]:.3g}, give or")


def test_a_density_shows_the_interval_and_both_parts_of_the_spread(console: Console) -> None:
    answer = console.choose("diabetes")
    console.all_shown(100)
    mean, total = answer["mean"][0][0], answer["total_std"][0][0]
    points = [
        tuple(map(float, point.split(",")))
        for point in (
            console.page.locator(".density polyline").get_attribute("points") or ""
        ).split()
    ]
    # As heights of a density, over the width that is shown, they have its mean and spread.
    heights = [1 - y for _, y in points]
    at = [mean + 7 * total * (x - 0.5) for x, _ in points]
    weight = sum(heights)
    found = sum(h * x for h, x in zip(heights, at, strict=True)) / weight
    variance = sum(h * (x - found) ** 2 for h, x in zip(heights, at, strict=True)) / weight
    assert found == pytest.approx(mean, abs=0.02 * total)
    assert variance**0.5 == pytest.approx(total, rel=0.02)
    area = (console.page.locator(".density polygon").get_attribute("points") or "").split()
    ends = [mean + 7 * total * (float(area[i].split(",")[0]) - 0.5) for i in (0, -1)]
    interval = [answer["interval"][end][0][0] for end in ("lower", "upper")]
    assert ends == pytest.approx(interval, abs=0.01 * total)
    widths = {
        part: console.page.locator(f".spread.{part}").evaluate(
            "e => e.offsetWidth / e.offsetParent.clientWidth"
        )
        for part in ("model", "data")
    }
    assert widths["model"] == pytest.approx(
        2 * answer["epistemic_std"][0][0] / (7 * total), abs=0.01
    )
    assert widths["data"] == pytest.approx(
        2 * answer["aleatoric_std"][0][0] / (7 * total), abs=0.01
    )


def test_beyond_what_it_was_trained_on_the_model_is_less_sure(console: Console) -> None:
    before = console.choose("diabetes")
    slider = console.page.get_by_label("bmi, slider")
    slider.focus()
    far = console.answer_of(lambda: console.page.keyboard.press("End"))
    assert far["epistemic_std"][0][0] > 2 * before["epistemic_std"][0][0]
    assert far["aleatoric_std"] == before["aleatoric_std"]


def test_a_feature_that_is_no_number_is_named(browser: Browser, url: str) -> None:
    with opened(browser, url) as console:
        console.choose("diabetes")
        box = console.page.get_by_label("age", exact=True)
        console.answer_of(lambda: box.fill("old"))
        expect(console.page.get_by_role("alert")).to_contain_text("inputs.0.0: ")
