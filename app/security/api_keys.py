"""API keys and their scopes.

A keys file holds names, hashes and scopes, never a key. ``dropserve key new`` makes keys.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from dropserve.app.errors import Forbidden, StartError, Unauthorized
from dropserve.files import FileRefused, read_regular

Scope = Literal["predict", "debug", "admin"]

# A name may be logged, so it holds no character that could break a line.
NAME = re.compile(r"[A-Za-z0-9 ._:@-]{1,64}")
# Bytes of a keys file: about 5,000 keys.
MAX_FILE_BYTES = 2**20
# Bytes of a header's value; no key is that long.
LONGEST = 512
# Field names that an error message repeats; any other may be a key in the wrong place.
SAFE_FIELD = re.compile(r"\w{1,20}")


class Entry(BaseModel):
    """One key in a keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{64}$", to_lower=True)]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]


class KeysFile(BaseModel):
    """The content of a keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Entry, ...]


class Keys:
    """The accepted keys and their scopes.

    Scopes are independent: ``admin`` does not imply ``predict``.

    A key is recognized by its SHA-256. Passwords need a slow hash, as they can be guessed. A key is
    256 random bits from ``secrets``, which nobody can guess, and a fast hash keeps requests fast.

    Parameters
    ----------
    entries
        The SHA-256 (32 bytes) and the scopes of each key.
    """

    def __init__(self, entries: Iterable[tuple[bytes, Set[Scope]]]) -> None:
        self.entries = tuple(entries)

    @classmethod
    def read(cls, file: Path) -> "Keys":
        """Read a keys file, which may hold no keys.

        Raises
        ------
        StartError
            If it cannot be read or is malformed.
        """
        entries = parse(file).keys
        return cls((bytes.fromhex(entry.sha256), frozenset(entry.scopes)) for entry in entries)

    def check(self, headers: Mapping[bytes, bytes], scope: Scope | None) -> None:
        """Check the key of a request.

        Parameters
        ----------
        headers
            Headers of the request, by lower-case name.
        scope
            Scope that the key must have; None: any key will do.

        Raises
        ------
        Unauthorized
            If the request has no key, or an unknown or malformed one.
        Forbidden
            If the key lacks the scope.
        """
        given = digest(sent(headers))
        found: Set[Scope] | None = None
        # No break after a match: the time must not reveal which key it was.
        for known, scopes in self.entries:
            if hmac.compare_digest(known, given):
                found = scopes
        if found is None:
            raise Unauthorized("the API key is not known")
        if scope is not None and scope not in found:
            raise Forbidden(f"the API key is not for the scope {scope!r}")


def digest(key: bytes) -> bytes:
    """Return the SHA-256 of a key."""
    return hashlib.sha256(key).digest()


def sent(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the key of a request, known or not.

    Raises
    ------
    Unauthorized
        If the request has no key, a malformed one, or two different ones.
    """
    authorization = headers.get(b"authorization")
    key = headers.get(b"x-api-key")
    if authorization is not None:
        if len(authorization) > LONGEST:
            raise Unauthorized(f"Authorization is longer than {LONGEST} bytes")
        scheme, _, bearer = authorization.partition(b" ")
        bearer = bearer.strip(b" ")
        if scheme.lower() != b"bearer" or not bearer:
            raise Unauthorized("Authorization is not of the form 'Bearer KEY'")
        # Both come from the client, so the time of the comparison reveals nothing.
        if key is not None and key != bearer:
            raise Unauthorized("Authorization and X-API-Key hold different API keys")
        return bearer
    if key is None:
        raise Unauthorized("an API key is needed: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
    if not key:
        raise Unauthorized("X-API-Key is empty")
    if len(key) > LONGEST:
        raise Unauthorized(f"X-API-Key is longer than {LONGEST} bytes")
    return key


def parse(file: Path) -> KeysFile:
    """Read a keys file, which may hold no keys, or nothing at all.

    Raises
    ------
    StartError
        If it is not a regular file, cannot be read or is malformed.
    """
    start = f"the keys file {str(file)!r}"
    try:
        text = read_regular(file, MAX_FILE_BYTES)
    except FileRefused as error:
        raise StartError(f"{start} {error}") from None
    if not text.strip():
        return KeysFile(keys=())
    try:
        content = KeysFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        fields = [str(field) for field in first["loc"]]
        where = ".".join(field if SAFE_FIELD.fullmatch(field) else "..." for field in fields)
        # Without the cause, which quotes the file's content.
        raise StartError(": ".join(filter(None, (start, where, first["msg"])))) from None
    check_unique(f"{start}: keys", "name", [entry.name for entry in content.keys])
    check_unique(f"{start}: keys", "sha256", [entry.sha256 for entry in content.keys])
    return content


def check_unique(where: str, field: str, values: Sequence[str]) -> None:
    """Raise StartError if two entries have the same value of a field."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if first.setdefault(value, index) != index:
            raise StartError(f"{where}.{index}.{field}: the same as in keys.{first[value]}")
