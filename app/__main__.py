"""``python -m app``: serve a folder of bundles; with ``score`` or ``key``, that command."""

import sys

from dropserve.commandline import run, start


def main() -> int:
    """Run the command line; return the exit status."""
    # "python -m app" in a checkout, "python -m dropserve.app" in an image.
    prog, arguments = f"python -m {__package__}", sys.argv[1:]
    if arguments[:1] in (["score"], ["key"]):
        return run(prog, "Serve bundles.", ("score", "key"), arguments)
    return start("serve", prog, arguments)


if __name__ == "__main__":
    sys.exit(main())
