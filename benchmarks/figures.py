"""Figures of the benchmarks: where each run writes its own, and the committed ones that docs quote.

A run writes into ``build/benchmarks/results``, which git ignores. Only ``--record`` replaces a file
in ``benchmarks/results``, to which the tests hold the documentation.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import network

COMMITTED = Path(__file__).with_name("results")
MEASURED = network.FOLDER / "results"

Row = Mapping[str, str | float | int | None]


def parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """Return the command line of a benchmark; as ``result`` it gives the file to write."""
    name = Path(script).stem
    command = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    committed, measured = COMMITTED / f"{name}.json", MEASURED / f"{name}.json"
    command.add_argument(
        "--record",
        dest="result",
        action="store_const",
        const=committed,
        default=measured,
        help=f"replace the committed benchmarks/results/{name}.json in place of writing {measured}",
    )
    return command


def report(result: Path, title: str, rows: Sequence[Row]) -> None:
    """Write rows as JSON, and print them as a Markdown table."""
    write(result, rows)
    print(f"\n{title}\n")
    print("\n".join(markdown(rows)))


def write(result: Path, document: object) -> None:
    """Write a document as indented JSON."""
    save(result, json.dumps(document, indent=2))


def save(result: Path, text: str) -> None:
    """Write a text and a final newline, into a folder that need not exist yet."""
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(f"{text}\n")


def read(benchmark: str) -> Any:
    """Return the committed figures of a benchmark, as JSON has them."""
    return json.loads((COMMITTED / f"{benchmark}.json").read_text())


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table with a column for each key."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(column)) for column in columns) + " |")
    return lines


def cell(value: str | float | int | None) -> str:
    """Format a value: fractions to three digits, a dash where there is none."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
