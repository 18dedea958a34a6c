"""What the commands beside the service itself share."""

import argparse
from typing import NoReturn


# As in model.commandline, which is not there where only the service is installed.
class OneLineParser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Leave with one line on standard error."""
        # ``python -m app COMMAND``, also where a part of the command has found it.
        command = " ".join(self.prog.split()[:4])
        self.exit(2, f"{command}: error: {message}\n")
