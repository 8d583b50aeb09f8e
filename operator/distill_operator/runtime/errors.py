"""What the API server refuses with, one class for each kind of answer that a caller acts on."""

QUOTA = "exceeded quota"
"""As the API server's quota admission says it."""


class ApiError(Exception):
    """The API server, or the way to it, failed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class NotServed(ApiError):
    """The API server does not know the kind."""


class Refused(ApiError):
    """The object as we sent it is not acceptable; sending it again is of no use."""


class QuotaExceeded(ApiError):
    """The namespace may not hold the object now; later it may."""


class NamespaceEnding(ApiError):
    """Nothing can be made in a namespace that is being deleted."""


class Conflict(ApiError):
    """What we decided rests on an old version; look again."""


class AlreadyExists(ApiError):
    """An object of this name was made before."""
