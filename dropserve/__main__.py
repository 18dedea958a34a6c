"""``dropserve COMMAND``, or ``python -m dropserve COMMAND``."""

import sys

import dropserve
from dropserve.commandline import COMMANDS, run


def main() -> int:
    """Run the command line; return the exit status."""
    description = (dropserve.__doc__ or "").partition("\n")[0]
    return run("dropserve", description, COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
