"""The console's view of dropout: sites, masks, eval mode versus the passes."""

import re

import httpx
import pytest

from tests.console.browser import Console

pytestmark = pytest.mark.browser


def test_passes_scatter_according_to_the_models_p(console: Console) -> None:
    spread = {}
    for name, p in (("digits", 0.5), ("double", 0.3)):
        console.choose(name)
        answer = console.press("Blank")
        console.all_shown(100)
        text = console.text("#sites")
        assert f"p = {p}, " in text
        kept = [float(each) for each in re.findall(r"Share kept, over all passes: ([\d.]+);", text)]
        assert kept == pytest.approx([1 - p] * 2, abs=0.02)
        first = re.findall(r"First pass: (\d+) of 256 units kept", text)
        assert [int(each) / 256 for each in first] == pytest.approx([1 - p] * 2, abs=0.15)
        spread[name] = (console.dots(), sum(answer["std"][0]))
    assert spread["digits"][0] != spread["double"][0]
    assert spread["digits"][1] > 1.2 * spread["double"][1]


def test_a_mask_is_drawn_unit_by_unit(console: Console, client: httpx.Client) -> None:
    fields = {"model": "digits", "version": 1, "passes": 100, "seed": 7, "masks": "independent"}
    sites = client.post("/console/masks", json=fields).json()["sites"]
    for number, site in enumerate(sites):
        alphas = (
            console.page.locator(".mask")
            .nth(number)
            .evaluate(
                """canvas => Array.from(canvas.getContext("2d").getImageData(
                    0, 0, canvas.width, canvas.height).data).filter((_, i) => i % 4 == 3)"""
            )
        )
        assert [int(alpha > 128) for alpha in alphas] == site["mask"]


def test_the_gap_of_a_double_model_is_shown_and_explained(console: Console) -> None:
    lengths = {}
    for name in ("digits", "double"):
        console.choose(name)
        answer = console.example("0")
        explained = console.page.locator("#why-double")
        assert explained.is_visible() == (name == "double")
        lengths[name] = console.page.locator(".between").first.evaluate("e => e.offsetWidth")
        (said,) = re.findall(r"([\d.]+) standard errors apart", console.text("#gap"))
        apart = [
            abs(a - b) for a, b in zip(answer["mean"][0], answer["deterministic"][0], strict=True)
        ]
        widest = apart.index(max(apart))
        assert float(said) == pytest.approx(abs(answer["expectation_gap"][0][widest]), rel=0.01)
        if name == "double":
            assert float(said) > 10
            assert answer["deterministic"][0][0] < answer["mean"][0][0]
    assert lengths["double"] > 5 * max(1, lengths["digits"])
