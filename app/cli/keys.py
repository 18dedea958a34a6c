"""``dropserve key new``: make an API key, print it once, store its hash."""

import argparse
import contextlib
import fcntl
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from dropserve.app.errors import StartError
from dropserve.app.security.api_keys import NAME, Entry, KeysFile, Scope, digest, parse
from dropserve.commandline import OneLineParser

FILE_VARIABLE = "DROPSERVE_API_KEYS_FILE"
# Secret scanners recognize a leaked key by this prefix.
PREFIX = "ds_"
SCOPES: tuple[Scope, ...] = get_args(Scope)


class NameTaken(Exception):
    """The file has a key of this name already."""


def command(arguments: Sequence[str], prog: str) -> int:
    """Run the command line after ``key``; return the exit status.

    Raises
    ------
    SystemExit
        After ``--help``, and with status 2 if an argument is wrong.
    """
    parser = build_parser(prog)
    options = parser.parse_args(arguments)
    file: Path | None = options.file
    scopes: tuple[Scope, ...] = tuple(dict.fromkeys(options.scope))
    key = PREFIX + secrets.token_urlsafe(32)
    sha256 = digest(key.encode()).hex()
    if file is None:
        entry = Entry(name=options.name or free_name(()), sha256=sha256, scopes=scopes)
        written = entry.model_dump_json()
    else:
        try:
            name = add(file, options.name, sha256, scopes)
        except NameTaken as error:
            parser.error(f"argument --name: {error}")
        except StartError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        written = f"wrote the hash of key {name!r} ({', '.join(scopes)}) to {str(file)!r}"
    print(key)
    print(written, file=sys.stderr)
    return 0


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = OneLineParser(prog, "Manage the keys of the service's clients.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = commands.add_parser(
        "new",
        command=prog,
        help="make a key",
        description="Make a key and print it, this once. A keys file gets its SHA-256; without "
        "one, the entry to put into it goes to standard error.",
    )
    new.add_argument(
        "--scope",
        type=read_scopes,
        action="extend",
        required=True,
        help=f"what the key is for: {', '.join(SCOPES)}; several by commas or by repetition",
    )
    new.add_argument(
        "--name", type=read_name, help="what to call the key; by default key-1, or the next free"
    )
    new.add_argument(
        "--file",
        type=Path,
        # An empty variable counts as unset.
        default=os.environ.get(FILE_VARIABLE) or None,
        help=f"the keys file, made if there is none; by default ${FILE_VARIABLE}",
    )
    return parser


def read_scopes(text: str) -> list[Scope]:
    """Read scopes separated by commas."""
    found: list[Scope] = []
    for word in text.split(","):
        scope = next((scope for scope in SCOPES if scope == word.strip()), None)
        if scope is None:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(SCOPES)}")
        found.append(scope)
    return found


def read_name(text: str) -> str:
    """Read the name of a key."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of 1 to 64 letters, digits, spaces and . _ : @ -"
        )
    return text


def free_name(taken: Sequence[str]) -> str:
    """Return the first of key-1, key-2, ... that is not taken."""
    number = 1
    while f"key-{number}" in taken:
        number += 1
    return f"key-{number}"


def add(file: Path, name: str | None, sha256: str, scopes: tuple[Scope, ...]) -> str:
    """Add a key to a file, which is created if missing; return the key's name.

    Raises
    ------
    NameTaken
        If the file has a key of this name.
    StartError
        If the file is malformed, or cannot be written; it is left unchanged.
    """
    # Replace the target of a link, not the link.
    place = Path(os.path.realpath(file))
    try:
        with locked(place.parent):
            entries = parse(place).keys if place.exists() else ()
            taken = [entry.name for entry in entries]
            if name in taken:
                raise NameTaken(f"{name!r} is in {str(file)!r} already")
            entry = Entry(name=name or free_name(taken), sha256=sha256, scopes=scopes)
            replace(place, KeysFile(keys=(*entries, entry)).model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise StartError(
            f"the keys file {str(file)!r} cannot be written: {error.strerror or error}"
        ) from None
    return entry.name


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other commands until the block ends.

    The lock is on the folder itself: a lock on the keys file would be lost when the file is
    replaced, and a separate lock file would be left behind.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        # A file's new name survives a crash only once its folder is synced.
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(file: Path, text: str) -> None:
    """Replace a file atomically: write a new one beside it, then rename.

    The new file gets the old one's mode and owner, so that the owner can still read it after
    another user adds a key. Without an old file, only its creator may read it.
    """
    descriptor, beside = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as new:
            new.write(text)
            if file.exists():
                old = file.stat()
                os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, old.st_mode & 0o7777)
            new.flush()
            os.fsync(descriptor)
        os.replace(beside, file)
    except BaseException:
        os.unlink(beside)
        raise
