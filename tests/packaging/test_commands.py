"""``dropserve COMMAND``, with and without the packages of the extras."""

import json
import subprocess
import sys

import pytest

from dropserve.commandline import COMMANDS
from tests.conftest import run

# Prints what each command does with --help, as if the package in the first argument were missing.
WITHOUT = """
import contextlib, io, json, sys
from dropserve.__main__ import main

package, *names = sys.argv[1:]
sys.modules[package] = None
done = {}
for name in names:
    sys.argv = ["dropserve", name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            left = main()
        except SystemExit as error:
            left = error.code
    done[name] = [left, out.getvalue()]
print(json.dumps(done))
"""
TRAIN = "the extra 'train'"
SCORE = "the extra 'score'"
RUNTIME = "one of the extras 'cpu', 'gpu' and 'cuda'"


@pytest.mark.parametrize(
    ("package", "needed_by", "names"),
    [
        ("torch", {"train": TRAIN, "evaluate": TRAIN, "export": TRAIN}, tuple(COMMANDS)),
        (
            "onnxruntime",
            {"export": RUNTIME, "serve": RUNTIME, "score": RUNTIME},
            tuple(COMMANDS),
        ),
        ("pyarrow", {"score": SCORE}, ("serve", "score")),
    ],
)
def test_without_a_package_commands_that_need_it_name_its_extra_and_others_run(
    package: str, needed_by: dict[str, str], names: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *names],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    left = json.loads(done.stdout)
    assert tuple(left) == names
    for name, (status, out) in left.items():
        if name in needed_by:
            # The interpreter writes such a status as one line to standard error, and exits with 1.
            assert status == f"error: {name} needs {package}: install {needed_by[name]}"
            assert out == ""
        else:
            assert status == 0
            assert out.startswith(f"usage: dropserve {name} ")


def test_help_lists_every_command() -> None:
    done = run("dropserve", "--help")
    assert done.returncode == 0
    listed = [line.split() for line in done.stdout.splitlines()]
    for name, command in COMMANDS.items():
        assert [name, *command.help.split()] in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "argument COMMAND: invalid choice: 'nonsense' (choose from "),
    ],
)
def test_without_a_known_command_it_is_one_line_and_status_2(
    arguments: list[str], message: str
) -> None:
    done = run("dropserve", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"dropserve: error: {message}")
