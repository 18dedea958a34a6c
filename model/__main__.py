"""``python -m model COMMAND``, the same as ``dropserve train`` and ``dropserve evaluate``."""

import sys

from dropserve.commandline import run


def main() -> int:
    """Run the command line; return the exit status."""
    return run(
        "python -m model",
        "Train a network with dropout, or evaluate it.",
        ("train", "evaluate"),
        sys.argv[1:],
    )


if __name__ == "__main__":
    sys.exit(main())
