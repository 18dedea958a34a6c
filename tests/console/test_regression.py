"""The console's tables and regressions: sliders, the predictive distribution, its parts."""

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from tests.console.browser import Console, opened

pytestmark = pytest.mark.browser


def coordinates(console: Console, shape: str, figure: int = 0) -> list[tuple[float, float]]:
    """Return the points of a density's curve or area, as shares of its width and height."""
    found = console.page.locator(f".density {shape}").nth(figure).get_attribute("points") or ""
    pairs = [point.split(",") for point in found.split()]
    return [(float(x), float(y)) for x, y in pairs]


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
    # The row is no longer a real example.
    assert console.page.get_by_label("Real example").input_value() == ""
    # The disease is expected to progress faster with a greater body mass index.
    assert moved["mean"][0][0] > before["mean"][0][0]
    # To three digits of the spread, which is some 50.
    assert console.text("#headline").startswith(f"progression: {moved['mean'][0][0]:.1f}, give or")


def test_a_density_shows_the_interval_and_both_parts_of_the_spread(console: Console) -> None:
    answer = console.choose("diabetes")
    console.all_shown(100)
    mean, total = answer["mean"][0][0], answer["total_std"][0][0]
    points = coordinates(console, "polyline")
    # A normal of the noise around each pass.
    samples = np.array(answer["samples"])[:, 0, 0]
    at = mean + 7 * total * (np.array([x for x, _ in points]) - 0.5)
    normals = np.exp(-0.5 * ((at[:, None] - samples) / answer["aleatoric_std"][0][0]) ** 2)
    expected = normals.sum(axis=1) / normals.sum(axis=1).max()
    np.testing.assert_allclose([1 - y for _, y in points], expected, atol=1e-3)
    area = coordinates(console, "polygon")
    ends = [mean + 7 * total * (area[i][0] - 0.5) for i in (0, -1)]
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


def test_beyond_its_training_data_the_model_is_less_sure(console: Console) -> None:
    before = console.choose("diabetes")
    slider = console.page.get_by_label("bmi, slider")
    slider.focus()
    far = console.answer_of(lambda: console.page.keyboard.press("End"))
    assert far["epistemic_std"][0][0] > 2 * before["epistemic_std"][0][0]
    assert far["aleatoric_std"] == before["aleatoric_std"]


def test_a_feature_that_is_no_number_is_reported(browser: Browser, url: str) -> None:
    with opened(browser, url) as console:
        console.choose("diabetes")
        box = console.page.get_by_label("age", exact=True)
        console.answer_of(lambda: box.fill("old"))
        expect(console.page.get_by_role("alert")).to_contain_text("inputs.0.0: ")


def test_values_are_written_to_the_precision_of_their_spread(
    browser: Browser, unusual_url: str
) -> None:
    with opened(browser, unusual_url) as console:
        answer = console.choose("two")
        figures = console.page.locator("#answer figure")
        assert figures.count() == 2
        for c in range(2):
            texts = figures.nth(c).locator("dd").all_inner_texts()
            mean, total = answer["mean"][0][c], answer["total_std"][0][c]
            assert float(texts[0].split(" ± ")[0]) == pytest.approx(mean, abs=0.01 * total)
            ends = [float(end) for end in texts[1].split(" to ")]
            interval = [answer["interval"][end][0][c] for end in ("lower", "upper")]
            assert ends == pytest.approx(interval, abs=0.01 * total)
            parts = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts[2:]]
            names = ("epistemic_std", "aleatoric_std", "total_std")
            assert parts == pytest.approx([answer[name][0][c] for name in names], rel=0.06)
        assert console.errors == []


def test_noise_too_narrow_to_draw_leaves_a_smooth_curve(
    console: Console,
) -> None:
    console.choose("diabetes")
    box = console.page.get_by_label("bmi", exact=True)
    answer = console.answer_of(lambda: box.fill("3000"))
    assert answer["epistemic_std"][0][0] > 20 * answer["aleatoric_std"][0][0]
    heights = [y for _, y in coordinates(console, "polyline")]
    turns = sum(
        (b - a) * (c - b) < 0 for a, b, c in zip(heights, heights[1:], heights[2:], strict=False)
    )
    assert turns < 40
