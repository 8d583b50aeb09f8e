"""Errors of the API server: one class for each kind of answer that a caller acts on."""

QUOTA = "exceeded quota"
"""Part of the message with which the API server's quota admission refuses."""


class ApiError(Exception):
    """Raised when the API server, or the connection to it, failed. Status 0: there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message

    @property
    def may_pass(self) -> bool:
        """Whether it may pass by itself, without new credentials, which a process reads at its start."""
        return self.status != 401


class NotServed(ApiError):
    """Raised when the API server does not know the kind."""


class Refused(ApiError):
    """Raised when the object as it was sent is not acceptable; sending it again is of no use."""


class QuotaExceeded(ApiError):
    """Raised when a quota forbids the object now; later it may not."""


class NamespaceEnding(ApiError):
    """Raised when the namespace is being deleted, so that nothing can be created in it."""


class Conflict(ApiError):
    """Raised when a decision rests on an old version of an object; reconcile again."""


class AlreadyExists(ApiError):
    """Raised when an object of this name exists."""
