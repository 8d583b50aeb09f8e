"""Where the time of a conversation goes: to the engines, or to its environment."""

import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class ConversationClock:
    """Seconds of one conversation, from when it holds a slot to its end; also of one that failed.

    Before, it waits for other conversations, of which most may wait for engines: that is no time of its environment.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._engines = 0.0
        self._open, self._since = 0, 0.0
        self._is_stopped = False
        self.seconds = 0.0
        """Of the whole conversation, once it is stopped; 0 for one that never began."""

    def begin(self) -> None:
        """Begin the conversation, which holds a slot by now."""
        self._began = time.monotonic()

    async def generating(self, work: Awaitable[T]) -> T:
        """Return the result of `work`, a turn of the student. An agent may have several at once."""
        if not self._open:
            self._since = time.monotonic()
        self._open += 1
        try:
            return await work
        finally:
            self._open -= 1
            if not self._open and not self._is_stopped:
                self._engines += time.monotonic() - self._since

    def stop(self) -> None:
        """End the conversation. Turns that are still generated count up to now."""
        now, self._is_stopped = time.monotonic(), True
        if self._open:
            self._engines += now - self._since
        if self._began is not None:
            self.seconds = now - self._began

    @property
    def environment_share(self) -> float:
        """Share of the conversation that was no turn of the student, 0 to 1: its environment's calls."""
        return 1 - self._engines / self.seconds if self.seconds > 0 else 0.0
