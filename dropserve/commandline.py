"""The table of commands, how to start one, and the format of usage errors."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A command, whose module is imported only when the command runs.

    No command then needs the packages of another: serving works without torch.

    Parameters
    ----------
    module, function
        The function takes the arguments after the command's name, and the name by which usage
        messages call the command; it returns the exit status.
    extra
        The extra of the distribution that installs the command's packages.
    help
        One line for the list of commands.
    """

    module: str
    function: str
    extra: str
    help: str


COMMANDS = {
    "train": Command(
        "dropserve.model.cli", "train", "train", "train a network and report on held-out rows"
    ),
    "evaluate": Command(
        "dropserve.model.cli", "evaluate", "train", "evaluate a trained network on held-out rows"
    ),
    "export": Command(
        "dropserve.export.cli", "command", "train", "turn a trained network into a verified bundle"
    ),
    "serve": Command("dropserve.app.cli.serve", "command", "cpu", "serve bundles over HTTP"),
    "score": Command(
        "dropserve.app.cli.score", "command", "score", "add its uncertainty to each row of a file"
    ),
    "key": Command("dropserve.app.cli.keys", "command", "cpu", "make API keys for the service"),
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose usage errors are one line on standard error, with exit status 2.

    Parameters
    ----------
    prog, description, formatter_class, add_help
        As in argparse.
    command
        The first words of an error message; by default ``prog``.
    """

    def __init__(
        self,
        prog: str,
        description: str | None = None,
        *,
        formatter_class: type[argparse.HelpFormatter] = argparse.HelpFormatter,
        add_help: bool = True,
        command: str | None = None,
    ) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=formatter_class, add_help=add_help
        )
        self.command = command or prog

    def error(self, message: str) -> NoReturn:
        """Exit with one line on standard error."""
        self.exit(2, f"{self.command}: error: {message}\n")


def run(prog: str, description: str, names: Iterable[str], arguments: Sequence[str]) -> int:
    """Run the command named by the first argument, one of ``names``; return the exit status.

    Raises
    ------
    SystemExit
        After ``--help``, and with status 2 if there is no such command.
    """
    parser = OneLineParser(prog, description)
    choices = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for name in names:
        choices.add_parser(name, help=COMMANDS[name].help, add_help=False)
    name = parser.parse_args(arguments[:1]).name
    return start(name, f"{prog} {name}", arguments[1:])


def start(name: str, prog: str, arguments: Sequence[str]) -> int:
    """Import a command and run it; return the exit status.

    Raises
    ------
    SystemExit
        With status 1 and one line naming the extra to install, if a package is missing.
    """
    command = COMMANDS[name]
    try:
        function: Callable[[Sequence[str], str], int] = getattr(
            import_module(command.module), command.function
        )
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "dropserve"):
            raise
        raise SystemExit(
            f"error: {name} needs {missing}: install {extra_with(missing, command)}"
        ) from None
    return function(arguments, prog)


def extra_with(package: str, command: Command) -> str:
    """Name the extra that installs a package for a command."""
    if package == "onnxruntime":
        # Commands of several extras need it; the machine decides which extra fits.
        return "one of the extras 'cpu', 'gpu' and 'cuda'"
    return f"the extra '{command.extra}'"
