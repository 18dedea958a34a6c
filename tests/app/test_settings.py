"""The README lists every setting."""

from pathlib import Path

from app.settings import Settings

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_names_every_option_and_variable_with_its_default() -> None:
    rows = [line for line in README.splitlines() if "DROPSERVE_" in line and line.startswith("|")]
    for name, field in Settings.model_fields.items():
        (row,) = [r for r in rows if f"`DROPSERVE_{name.upper()}`" in r]
        assert f"`--{name.replace('_', '-')}`" in row
        default = "off" if field.default is False else str(field.default)
        assert default in row
