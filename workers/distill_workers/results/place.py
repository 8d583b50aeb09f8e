"""What a place to which a model is published has to do, and which of its errors another try would not mend."""

import errno
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Protocol

from distill_workers.results.manifest import Manifest

TRY_AGAIN = frozenset({408, 409, 412, 423, 425, 429})
"""Codes of HTTP below 500 after which another try may do."""
FOREVER = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT})
SENTENCE_CHARACTERS = 240


class PlaceRefused(Exception):
    """Raised when another try would not help: the message says what is wrong there, and what to do."""


class Place(Protocol):
    """A repository or a folder."""

    def probe(self) -> None:
        """Write something and remove it again. Raises PlaceRefused, or what the client of the place raises."""

    def publish(self, manifest: Manifest, folder: Path, check: Callable[[], None] = lambda: None) -> str:
        """Copy the model in a folder there, as far as it is not there already, and check it. Returns what is there, as
        a phrase. Raises as `probe`, and what `check` raises, which is called before each change of what is there."""


def is_permanent(error: BaseException) -> bool:
    """Return whether another try would end the same: no right, no such bucket, no package, no credentials.

    The clients of object stores have no errors in common, so it goes by codes of HTTP, then by Python's own errors, and
    by the name where a client finds no credentials at all.
    """
    for each in _causes(error):
        if (code := _http_code(each)) is not None:
            return 400 <= code < 500 and code not in TRY_AGAIN
        if isinstance(each, OSError) and each.errno is not None:
            return each.errno in FOREVER
        if isinstance(each, JSONDecodeError):
            return False  # a page of something between us and the place
        if isinstance(each, PlaceRefused | PermissionError | FileNotFoundError | ImportError | ValueError):
            return True
        if any(word in type(each).__name__ for word in ("Credential", "Auth")):
            return True
    return False


def sentence(error: BaseException, secrets: tuple[str, ...] = ()) -> str:
    """Return what an error says, on one line, without any of the secrets."""
    text = " ".join(str(error).split())
    if isinstance(error, PermissionError) and text == "Forbidden":  # an answer to HEAD, which has no text
        text = "Forbidden: the store does not know the key, or the key has no right there"
    if not text or not isinstance(error, PlaceRefused | OSError):
        text = f"{type(error).__name__}: {text}"
    for secret in secrets:
        text = text.replace(" ".join(secret.split()), "***")
    return text if len(text) <= SENTENCE_CHARACTERS else f"{text[: SENTENCE_CHARACTERS - 1]}…"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from: the hub's client wraps what a thread of it raised."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _http_code(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    for holder, name in ((response, "status_code"), (error, "status_code"), (error, "code")):
        if isinstance(code := getattr(holder, name, None), int):
            return code
    return None
