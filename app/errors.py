"""Errors with a message for a person.

``http.problems`` turns them into HTTP responses, and a command turns a ``StartError`` into its exit
status.
"""


class InputError(Exception):
    """A request whose content is not allowed.

    Parameters
    ----------
    path
        The place in the body, such as ``inputs.0.3``.
    message
        What is wrong there, and what is allowed.
    """

    def __init__(self, path: str, message: str) -> None:
        # Unformatted, so that pickle can rebuild it in another process.
        super().__init__(path, message)
        self.path = path
        self.message = message

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class UnknownModel(Exception):
    """A model or version that is not served."""


class LoadError(Exception):
    """A change of the served models that was refused, or made only in part."""


class Overloaded(Exception):
    """More work than the service may hold.

    Parameters
    ----------
    message
        Names the limit.
    seconds
        Time after which the client may try again.
    """

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class DeadlineExceeded(Exception):
    """A request whose time limit passed before its work was done."""


class StartError(Exception):
    """A command or the service cannot start as it was told to."""


class DeviceUnavailable(StartError):
    """A device whose onnxruntime provider does not load."""


class Misdirected(Exception):
    """A request to a host that the service is not known by."""


class Unauthorized(Exception):
    """A request without a known API key; the message never contains the key."""


class Forbidden(Exception):
    """A request whose API key lacks the scope it needs."""
