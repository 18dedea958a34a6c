"""The console's image input: drawings by mouse, finger or keyboard, examples, presets."""

import re
from itertools import pairwise

import pytest
from playwright.sync_api import Browser

from tests.console.browser import PHONE, Console, opened
from tests.console.strokes import DIGITS

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("digit", DIGITS)
def test_a_drawn_digit_is_recognised(console: Console, digit: str) -> None:
    answer = console.draw(DIGITS[digit])
    assert answer["labels"] == [digit]
    assert console.text("#headline").startswith(f"{digit}, with ")
    assert console.text(".classes .top th") == digit


def test_a_digit_drawn_small_and_in_a_corner_is_recognised(console: Console) -> None:
    small = [[(0.1 + 0.3 * x, 0.6 + 0.3 * y) for x, y in stroke] for stroke in DIGITS["3"]]
    assert console.draw(small)["labels"] == ["3"]


def test_a_digit_can_be_drawn_with_a_finger(browser: Browser, url: str) -> None:
    (corners,) = DIGITS["7"]
    way = [
        (x + (to_x - x) * part / 8, y + (to_y - y) * part / 8)
        for (x, y), (to_x, to_y) in pairwise(corners)
        for part in range(9)
    ]
    with opened(browser, url, **PHONE) as console:
        console.choose("digits")
        assert console.touch(way)["labels"] == ["7"]
        assert console.errors == []


def test_a_digit_can_be_drawn_with_the_keyboard_alone(console: Console) -> None:
    console.press("Blank")
    page = console.page
    page.locator("#drawing").focus()
    slope = (("ArrowDown", 2), ("ArrowLeft", 1)) * 9
    for key, times in (
        *(("ArrowLeft", 7), ("ArrowUp", 10), (" ", 1), ("ArrowRight", 14), *slope, (" ", 1)),
    ):
        for _ in range(times):
            page.keyboard.press(key)
    assert re.fullmatch(r"Pen up, \d+ % from the left, \d+ % from the top", console.text("#pen"))
    console.answered()
    assert console.press("Run")["labels"] == ["7"]


def test_the_row_that_is_sent_is_the_image_that_is_shown(console: Console) -> None:
    console.draw(DIGITS["0"])
    seen = console.page.locator("#seen").evaluate(
        """canvas => Array.from(canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data)"""
    )
    (row,) = console.request()["inputs"]
    assert [round(255 * (1 - value / 16)) for value in row] == pytest.approx(seen[::4], abs=1)


def test_real_examples_come_with_their_true_answer(console: Console) -> None:
    answer = console.example("4")
    assert answer["labels"] == ["4"]
    assert console.text("#truth").startswith("True answer: 4.")


def test_drawing_on_an_example_changes_it(console: Console) -> None:
    before = console.example("1")
    on_screen = console.area()
    console.page.mouse.move(*on_screen((0.1, 0.5)))
    console.page.mouse.down()
    console.page.mouse.move(*on_screen((0.9, 0.7)), steps=5)
    console.page.mouse.up()
    console.answered()
    after = console.press("Run")
    assert console.text("#truth") == "Drawn on."
    assert after["predictive_entropy"][0] > 3 * before["predictive_entropy"][0]


def test_two_fingers_draw_two_lines(browser: Browser, url: str) -> None:
    left, right = ([(x, 0.1 * step) for step in range(1, 10)] for x in (0.15, 0.85))
    with opened(browser, url, **PHONE) as console:
        console.choose("digits")
        console.touch(left, right)
        (row,) = console.request()["inputs"]
        rows = [row[8 * y : 8 * y + 8] for y in range(8)]
        assert all(line[0] + line[1] > 8 and line[6] + line[7] > 8 for line in rows)
        assert all(line[3] == line[4] == 0 for line in rows)
        assert console.errors == []


def test_a_preset_ends_the_stroke_under_way(console: Console) -> None:
    area = console.page.locator("#drawing")
    area.hover()
    console.page.mouse.down()
    noise = console.page.get_by_role("button", name="Noise")
    noise.dispatch_event("click")
    console.page.mouse.move(300, 300, steps=3)
    console.page.mouse.up()
    console.answered()
    assert console.text("#truth") == "Every pixel at random."


def test_images_of_three_channels_are_shown_in_colour(browser: Browser, unusual_url: str) -> None:
    with opened(browser, unusual_url) as console:
        console.choose("coloured")
        for place, label in enumerate(("red", "green", "blue")):
            assert console.example(label)["labels"] == [label]
            seen = console.page.locator("#seen").evaluate(
                """canvas => [canvas.width, canvas.height, ...canvas.getContext("2d")
                    .getImageData(4, 3, 1, 1).data]"""
            )
            assert seen[:2] == [9, 6]
            assert seen[2 + place] == max(seen[2:5]) > 150
        console.draw(DIGITS["0"])
        assert len(console.request()["inputs"][0]) == 3 * 6 * 9
        assert console.errors == []


@pytest.mark.parametrize("preset", ["Blank", "Noise", "Two overlaid", "A letter"])
def test_presets_leave_the_network_less_sure_than_its_examples(
    console: Console, preset: str
) -> None:
    sure = [console.example(f"{label}") for label in ("0", "4", "7")]
    answer = console.press(preset)
    for measure in ("predictive_entropy", "mutual_information"):
        assert answer[measure][0] > 2 * max(each[measure][0] for each in sure)
    parts = console.page.locator("#entropy dd").all_inner_texts()
    assert float(parts[0].split()[0]) == pytest.approx(answer["predictive_entropy"][0], rel=0.01)
    assert float(parts[1]) == pytest.approx(answer["expected_entropy"][0], rel=0.01)
    assert float(parts[2]) == pytest.approx(answer["mutual_information"][0], rel=0.01)
    widths = [
        console.page.locator(f"#entropy .parts .{part}").evaluate("e => e.offsetWidth")
        for part in ("data", "model")
    ]
    ratio = answer["expected_entropy"][0] / answer["mutual_information"][0]
    assert widths[0] / widths[1] == pytest.approx(ratio, rel=0.1)
