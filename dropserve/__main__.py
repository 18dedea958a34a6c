"""``dropserve COMMAND``, or ``python -m dropserve COMMAND``."""

import sys

import dropserve
from dropserve.commandline import COMMANDS, run


def main() -> int:
    """Run the command line; return the exit status."""
    return run("dropserve", (dropserve.__doc__ or "").splitlines()[0], COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
