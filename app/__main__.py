"""``python -m app``: serve a folder of bundles; with ``score`` or ``key``, that command."""

import sys

from dropserve.commandline import run, start


def main() -> int:
    """Run the command line; return the exit status."""
    prog, arguments = "python -m app", sys.argv[1:]
    if arguments[:1] in (["score"], ["key"]):
        return run(prog, "Serve bundles.", ("score", "key"), arguments)
    return start("serve", prog, arguments)


if __name__ == "__main__":
    sys.exit(main())
