"""What can go wrong, as exceptions whose message is for a person.

``api.problems`` turns the first two into HTTP answers, ``__main__`` the others into an exit
status.
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
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


class UnknownModel(Exception):
    """A model or version that is not served."""


class StartError(Exception):
    """The service cannot start as it was told to."""


class DeviceUnavailable(StartError):
    """A device whose onnxruntime provider does not load."""
