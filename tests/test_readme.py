"""The README and the documentation show the defaults and the committed figures."""

import re
from pathlib import Path

from benchmarks import calibration_table, figures, scaling_table, stratified
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


def test_the_readmes_table_of_scalings_shows_the_committed_figures() -> None:
    table = scaling_table.markdown(scaling_table.read())
    assert "\n".join(table) in README


def test_the_docs_tables_of_stratified_masks_show_the_committed_figures() -> None:
    documented = (ROOT / "docs" / "uncertainty.md").read_text()
    for part in ("variance", "cost"):
        assert "\n".join(figures.markdown(stratified.read(part))) in documented


def test_the_docs_table_of_the_console_shows_the_committed_figures() -> None:
    documented = (ROOT / "docs" / "console.md").read_text()
    assert "\n".join(figures.markdown(figures.read("first_paint"))) in documented


def test_every_picture_that_is_shown_is_there() -> None:
    shown = {
        (page.parent / path).resolve()
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    }
    assert shown == set((ROOT / "docs" / "console").glob("*.png"))


def test_the_docs_tables_of_calibration_show_the_committed_figures() -> None:
    table = calibration_table.read()
    documented = (ROOT / "docs" / "training.md").read_text()
    for lines in (
        calibration_table.ways_markdown(table),
        calibration_table.differences_markdown(table),
        calibration_table.temperatures_markdown(table),
    ):
        assert "\n".join(lines) in documented


def test_the_readmes_claims_about_passes_hold_for_the_committed_figures() -> None:
    table = calibration_table.read()
    better = sum(difference.upper < 0 for difference in table.differences)
    worse = sum(difference.lower > 0 for difference in table.differences)
    assert (len(table.differences), worse, better) == (12, 1, 0)
    nll = [table.ways[way]["nll"] for way in ("100 passes", "eval mode")]
    assert abs(nll[0] - nll[1]) < 0.002
    for way, measure in (("100 passes", "mutual_information"), ("eval mode", "max_probability")):
        assert f"{table.ways[way][f'inverted {measure}']:.2f}" in README
