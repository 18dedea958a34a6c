"""``python -m export``, the same as ``dropserve export``."""

import sys

from dropserve.commandline import start


def main() -> int:
    """Run the command line; return the exit status."""
    return start("export", "python -m export", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
