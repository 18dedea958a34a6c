"""What the command lines of ``model`` and ``export`` share."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Leave with one line on standard error."""
        self.exit(2, f"{self.prog}: error: {message}\n")
