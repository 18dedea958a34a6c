"""The README and the documentation show the defaults and the committed figures."""

import re
from pathlib import Path

from benchmarks import calibration_table, figures, scaling_table, stratified
from dropserve.app.settings import Settings

ROOT = Path(__file__).parents[1]
# Without line breaks.
CLAIMS = " ".join((ROOT / "README.md").read_text().split())


def page(name: str) -> str:
    """Read a page of the documentation."""
    return (ROOT / "docs" / name).read_text()


def shown(default: object) -> str:
    """Return how the table of settings shows a default."""
    if default is False:
        return "off"
    return "none" if default in (None, "") else str(default)


def test_the_docs_list_every_setting_with_its_option_variable_and_default() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page("settings.md").splitlines()
        if line.startswith("| `--")
    ]
    documented = {option: (variable, default) for option, variable, default, _ in rows}
    assert len(documented) == len(rows)
    assert documented == {
        f"`--{name.replace('_', '-')}`": (f"`DROPSERVE_{name.upper()}`", shown(field.default))
        for name, field in Settings.model_fields.items()
    }


def test_the_docs_table_of_scalings_shows_the_committed_figures() -> None:
    assert "\n".join(scaling_table.markdown(scaling_table.read())) in page("scalings.md")


def test_the_docs_tables_of_stratified_masks_show_the_committed_figures() -> None:
    documented = page("uncertainty.md")
    for part in ("variance", "cost"):
        assert "\n".join(figures.markdown(stratified.read(part))) in documented


def test_the_docs_claim_about_stratified_masks_holds_for_the_committed_figures() -> None:
    equal = [
        round(float(str(row["independent passes as precise"])))
        for row in stratified.read("variance")
        if row["masks"] == "stratified"
    ]
    claim = (
        "the mean of 50 passes as precise as that of "
        f"{min(equal):,} to {max(equal):,} independent ones"
    )
    assert claim in page("http.md")


def test_the_docs_table_of_the_console_shows_the_committed_figures() -> None:
    assert "\n".join(figures.markdown(figures.read("first_paint"))) in page("console.md")


def test_every_picture_that_is_shown_is_there() -> None:
    found = {
        (document.parent / path).resolve()
        for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", document.read_text())
    }
    assert found == set((ROOT / "docs" / "console").glob("*.png"))


def test_the_docs_tables_of_calibration_show_the_committed_figures() -> None:
    table = calibration_table.read()
    documented = page("training.md")
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
    passes = table.ways["100 passes"]["inverted mutual_information"]
    eval_mode = table.ways["eval mode"]["inverted max_probability"]
    assert f"an AUROC of {passes:.2f}, against {eval_mode:.2f} for" in CLAIMS


def test_the_readmes_claims_about_speed_hold_for_the_committed_figures() -> None:
    rates = {
        row["what"]: row["requests/s"]
        for row in figures.read("predict_http")
        if (row["rows"], row.get("connections")) == (1, 32)
    }
    ours = rates["dropserve"]
    assert f"answers {round(ours, -2):,.0f} single-row predictions a second" in CLAIMS
    assert f"{ours / rates['FastAPI tutorial']:.1f} times as many as FastAPI's" in CLAIMS
    assert f"{ours / rates['Triton, python backend']:.1f} times as many as Triton's" in CLAIMS
    others = [ours / rates[name] for name in ("MLServer", "LitServe", "BentoML")]
    assert f"{min(others):.1f} to {max(others):.1f} times as many as MLServer" in CLAIMS

    passes = figures.read("mc_passes")
    floor = [row["x the floor"] for row in passes if row["what"] == "dropserve"]
    assert f"{min(floor):.1f} to {max(floor):.1f} times as long as their matrix" in CLAIMS
    fastest: dict[tuple[int, int], float] = {}
    for row in passes:
        if row["what"].startswith("baal"):
            size = row["width"], row["rows"]
            fastest[size] = min(row["x dropserve"], fastest.get(size, row["x dropserve"]))
    baal = fastest.values()
    assert f"baal takes {min(baal):.1f} to {max(baal):.1f} times as long" in CLAIMS
