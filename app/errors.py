"""What can go wrong, as exceptions whose message is for a person.

``api.problems`` turns them into HTTP answers, ``__main__`` a ``StartError`` into an exit status.
"""


class InputError(Exception):
    """A request whose content is not allowed.

    Parameters
    ----------
    path
        Where in the body, like ``inputs.0.3``.
    message
        What is wrong there, and what is allowed.
    """

    def __init__(self, path: str, message: str) -> None:
        # As they came, so that it can be sent to another process.
        super().__init__(path, message)
        self.path = path
        self.message = message

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class UnknownModel(Exception):
    """A model or version that is not served."""


class LoadError(Exception):
    """A change of the models that are served, refused or made in part."""


class Overloaded(Exception):
    """More work than the queue may hold.

    Parameters
    ----------
    message
        What is full.
    seconds
        After which a client may try again.
    """

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class DeadlineExceeded(Exception):
    """A request whose time was up before its work was done."""


class StartError(Exception):
    """The service cannot start as it was told to."""


class DeviceUnavailable(StartError):
    """A device whose onnxruntime provider does not load."""


class Unauthorized(Exception):
    """A request without an API key that is known; the message never holds the key."""


class Forbidden(Exception):
    """A request whose API key is not for what it asks for."""
