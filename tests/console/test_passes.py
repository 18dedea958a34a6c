"""The console's view of a classification: its passes as dots, and their statistics."""

import re

import pytest
from playwright.sync_api import Browser

from tests.console.browser import Console, opened

pytestmark = pytest.mark.browser


def means(console: Console) -> list[str]:
    """Return the means as the class table shows them."""
    return console.page.locator(".classes strong").all_inner_texts()


def test_passes_appear_one_after_the_other(console: Console) -> None:
    console.all_shown(100)
    console.page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const text = document.querySelector(".counter")?.textContent;
                if (text && text !== window.seen.at(-1)) window.seen.push(text);
            }).observe(document.querySelector("#answer"), {
                subtree: true, childList: true, characterData: true });
        }"""
    )
    console.press("Run with a new seed")
    console.all_shown(100)
    texts = console.page.evaluate("window.seen")
    shown = [int(at) for text in texts for at in re.findall(r"pass (\d+) of 100", text)]
    assert len(set(shown)) > 2
    assert shown == sorted(shown)


def test_with_reduced_motion_all_passes_appear_at_once(browser: Browser, url: str) -> None:
    with opened(browser, url, reduced_motion="reduce") as console:
        console.choose("digits")
        assert console.text(".counter") == "(pass 100 of 100)"


def test_each_dot_is_where_its_pass_is_and_nowhere_else(browser: Browser, url: str) -> None:
    with opened(browser, url, reduced_motion="reduce") as console:
        console.choose("digits")
        answer = console.press("Two overlaid")
        for c in range(10):
            columns = (
                console.page.locator(".strip")
                .nth(c)
                .evaluate(
                    """canvas => {
                    const {width, height} = canvas;
                    const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
                    return Array.from({length: width}, (_, x) => Array.from({length: height},
                        (_, y) => data[4 * (y * width + x) + 3]).some(alpha => alpha > 20));
                }"""
                )
            )
            radius = 2
            places = [
                radius + sample[0][c] * (len(columns) - 2 * radius) for sample in answer["samples"]
            ]
            for x, there in enumerate(columns):
                apart = min(abs(x + 0.5 - place) for place in places)
                if there:
                    assert apart < radius + 1
                elif apart < 0.5 * radius:
                    raise AssertionError(f"class {c}: no dot in column {x}")


def test_bars_and_whiskers_show_the_mean_and_its_confidence_interval(console: Console) -> None:
    answer = console.press("Two overlaid")
    whiskers = 0
    for c in range(10):
        bar, whisker, band = (
            console.page.locator(f".classes .{part}")
            .nth(c)
            .evaluate("e => [e.offsetLeft, e.offsetWidth, e.offsetParent.clientWidth]")
            for part in ("bar", "whisker", "band")
        )
        mean, error = answer["mean"][0][c], answer["standard_error"][0][c]
        width = bar[2]
        assert bar[1] / width == pytest.approx(mean, abs=2 / width)
        reach = 2 * 1.6449 * error  # 90 % of a normal lie within
        # Only whiskers that end within the chart.
        if reach / 2 < mean < 1 - reach / 2 and reach * width > 3:
            whiskers += 1
            assert whisker[0] / width == pytest.approx(mean - reach / 2, abs=4 / width)
            assert whisker[1] / width == pytest.approx(reach, abs=4 / width)
        lower, upper = (answer["interval"][end][0][c] for end in ("lower", "upper"))
        assert band[0] / width == pytest.approx(lower, abs=2 / width)
        assert (band[0] + band[1]) / width == pytest.approx(upper, abs=4 / width)
    assert whiskers > 0
    assert means(console) == [
        "< 0.001" if 0 < mean < 0.0005 else f"{mean:.3f}" for mean in answer["mean"][0]
    ]


def test_of_many_classes_the_likeliest_are_shown(browser: Browser, unusual_url: str) -> None:
    with opened(browser, unusual_url) as console:
        answer = console.choose("many")
        mean = answer["mean"][0]
        assert console.page.locator(".classes tbody tr").count() == 20
        assert means(console)[0] == f"{max(mean):.3f}"
        assert f"{len(mean) - 20} less likely classes are left out." in console.text("#answer")
        # Passes that do not favour the class of the greatest mean.
        for seed in map(str, range(8)):
            answer = console.set(seed=seed)
            best = answer["mean"][0].index(max(answer["mean"][0]))
            against = sum(max(sample[0]) > sample[0][best] for sample in answer["samples"])
            said = f"; {against} of them say otherwise." if against else "; all agree."
            assert console.text("#headline").endswith(f" over 100 passes{said}")
        assert console.errors == []


def test_a_single_pass_is_described_as_one(console: Console) -> None:
    answer = console.set(passes="1")
    assert answer["standard_error"] is None
    assert console.text("#headline").endswith(" on average over 1 pass.")
    assert "±" not in console.text(".classes tbody")
    assert console.text("#gap").endswith(" on average.")


def test_a_level_below_one_is_never_100_percent(console: Console) -> None:
    console.set(interval="0.9999")
    assert "99.99 %" in console.text("#answer")
    assert "100 %" not in console.text("#answer")


def test_the_same_seed_shows_the_same_passes(console: Console) -> None:
    shown = []
    for seed in ("11", "12", "11"):
        console.set(seed=seed)
        console.all_shown(100)
        assert f"seed {seed}," in console.text("#answered-by")
        shown.append((console.dots(), means(console), console.text("#sites")))
    assert shown[0] == shown[2]
    assert shown[0] != shown[1]


def test_without_a_seed_one_is_drawn_and_shown(console: Console) -> None:
    answer = console.set(seed="")
    assert f"seed {answer['seed']}," in console.text("#answered-by")
    again = console.set(seed=str(answer["seed"]))
    assert again["mean"] == answer["mean"]
    assert console.press("Run with a new seed")["seed"] != answer["seed"]


def test_requests_follow_the_controls(console: Console) -> None:
    console.page.get_by_label("Masks").select_option("stratified")
    console.answered()
    answer = console.set(passes="40", interval="0.5")
    assert (answer["passes"], answer["interval"]["level"]) == (40, 0.5)
    assert console.request()["masks"] == "stratified"
    console.all_shown(40)
    said = console.text("#answered-by")
    assert re.fullmatch(
        r"digits, version 1, on cpu: 40 passes, seed 7, answered in [\d.]+ ms\.", said
    )
