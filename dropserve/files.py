"""Read a file that others may have put there: at once, and with a bound on memory."""

import errno
import os
import stat
from pathlib import Path


class FileRefused(Exception):
    """A file that cannot be read; the message says why, without its name."""


def read_regular(path: str | Path, limit: int, folder: int | None = None) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    The file is opened once, and everything is checked on what was opened: whoever swaps it for
    another in the meantime gains nothing. Opening a named pipe does not wait for its writer.

    Parameters
    ----------
    path
        The file.
    limit
        Bytes.
    folder
        Descriptor of the folder that holds the file, which then must not be a link. None: links are
        followed.

    Raises
    ------
    FileRefused
        If it is not a regular file, larger, or cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    if folder is not None:
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, dir_fd=folder)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise FileRefused("is not a regular file")
            if found.st_size > limit:
                raise FileRefused(f"is larger than {limit} bytes")
            with open(descriptor, "rb", closefd=False) as file:
                # No more than it had when it was opened, so that a file that grows is noticed.
                content = file.read(found.st_size + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        if folder is not None and error.errno == errno.ELOOP:
            raise FileRefused("is a link, not a file") from None
        raise FileRefused(f"cannot be read: {error.strerror or error}") from None
    if len(content) != found.st_size:
        raise FileRefused("changed while it was read")
    return content
