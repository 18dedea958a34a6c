"""The network under test: the default one on digits, trained and exported by the commands.

The benchmarks time it and score none of its answers, so one epoch of training is enough.
"""

import subprocess
import sys
from pathlib import Path

# Ignored by git; kept from one benchmark to the next.
FOLDER = Path("build/benchmarks")


def models(width: int = 256) -> Path:
    """Return a models folder with one bundle, ``digits``: an MLP of two layers of this width."""
    folder = FOLDER / f"models-{width}"
    if not (folder / "digits" / "1").exists():
        options = ["--hidden", f"{width},{width}", "--epochs", "1"]
        command("model", "train", "--data", "digits", *options, "--out", str(run(width)))
        command("export", str(run(width)), "--models", str(folder))
    return folder


def run(width: int = 256) -> Path:
    """Return the folder of that network's checkpoint, which ``models`` creates."""
    return FOLDER / f"runs-{width}" / "digits"


def command(*arguments: str) -> None:
    """Run a command of the project."""
    subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.DEVNULL)
