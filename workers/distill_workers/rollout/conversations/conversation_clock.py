"""Where the time of a conversation goes: to the engines, or to its environment."""

import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class ConversationClock:
    """Seconds of one conversation, from when it could have begun; also of one that failed."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._engines = 0.0
        self._open, self._since = 0, 0.0
        self.seconds = 0.0
        """Of the whole conversation, once it is stopped."""

    async def generating(self, work: Awaitable[T]) -> T:
        """Return the result of `work`, a turn of the student. An agent may have several at once."""
        if not self._open:
            self._since = time.monotonic()
        self._open += 1
        try:
            return await work
        finally:
            self._open -= 1
            if not self._open:
                self._engines += time.monotonic() - self._since

    def stop(self) -> None:
        """End the conversation."""
        self.seconds = time.monotonic() - self._begin

    @property
    def environment_share(self) -> float:
        """Share of the conversation that was no turn of the student, 0 to 1: its environment's calls, and the wait for
        a process to run it in."""
        return 1 - self._engines / self.seconds if self.seconds > 0 else 0.0
