"""What the README and the documentation measured is what was measured last."""

import json
import re
from pathlib import Path

from benchmarks import calibration_table, scaling_table, stratified, timing
from dropserve.app.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROWS = [line for line in README.splitlines() if line.startswith("|")]


def test_the_readme_names_every_option_and_variable_with_its_default() -> None:
    for name, field in Settings.model_fields.items():
        (row,) = [row for row in ROWS if f"`DROPSERVE_{name.upper()}`" in row]
        assert f"`--{name.replace('_', '-')}`" in row
        default = "off" if field.default is False else str(field.default)
        assert default in row


def test_the_readmes_table_of_scalings_is_the_one_last_measured() -> None:
    table = scaling_table.markdown(scaling_table.read())
    assert "\n".join(table) in README


def test_the_docs_say_of_stratified_masks_what_was_measured_last() -> None:
    documented = (ROOT / "docs" / "uncertainty.md").read_text()
    for part in ("variance", "cost"):
        assert "\n".join(timing.markdown(stratified.read(part))) in documented


def test_the_docs_say_of_the_console_what_was_measured_last() -> None:
    documented = (ROOT / "docs" / "console.md").read_text()
    measured = json.loads((ROOT / "benchmarks" / "first_paint.json").read_text())
    assert "\n".join(timing.markdown(measured)) in documented


def test_every_picture_that_is_shown_is_there() -> None:
    shown = {
        (page.parent / path).resolve()
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    }
    assert shown == set((ROOT / "docs" / "console").glob("*.png"))


def test_the_tables_of_calibration_are_those_last_measured() -> None:
    table = calibration_table.read()
    documented = (ROOT / "docs" / "training.md").read_text()
    for lines in (
        calibration_table.ways_markdown(table),
        calibration_table.differences_markdown(table),
        calibration_table.temperatures_markdown(table),
    ):
        assert "\n".join(lines) in documented


def test_the_readme_says_of_passes_what_was_measured() -> None:
    table = calibration_table.read()
    better = sum(difference.upper < 0 for difference in table.differences)
    worse = sum(difference.lower > 0 for difference in table.differences)
    assert (len(table.differences), worse, better) == (12, 1, 0)
    nll = [table.ways[way]["nll"] for way in ("100 passes", "eval mode")]
    assert abs(nll[0] - nll[1]) < 0.002
    for way, measure in (("100 passes", "mutual_information"), ("eval mode", "max_probability")):
        assert f"{table.ways[way][f'inverted {measure}']:.2f}" in README
