"""The README's tables are true."""

from pathlib import Path

from app.settings import Settings
from benchmarks import scaling_table

README = (Path(__file__).parents[1] / "README.md").read_text()
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
