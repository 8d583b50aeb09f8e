"""The work queue: each key by one worker at a time, once however often it was added, again later when it failed.

What controller-runtime gives Go controllers, on asyncio. Keys are added from the loop's own thread.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from distill_operator.runtime.ownership import Key

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 60.0

Handler = Callable[[Key], Awaitable[float | None]]
"""Reconciles a key, and returns in how many seconds it is to be reconciled again, if at all."""


class Retry(Exception):
    """Raised when nothing is wrong, but the key must be reconciled again from fresh observations."""


@dataclass
class _Entry:
    waiting: bool = False
    running: bool = False
    failures: int = 0
    conflicts: int = 0
    began: float = 0.0
    """When it was handed to the handler last."""
    ended: float = float("-inf")
    """When the handler was done with it last."""
    timer: asyncio.TimerHandle | None = None
    due: float = field(default=float("inf"))


class WorkQueue:
    """Hands keys to the handler until it is stopped."""

    def __init__(
        self,
        handler: Handler,
        *,
        concurrency: int,
        spacing_seconds: float = 0.2,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._handler = handler
        self._concurrency = concurrency
        self._spacing = spacing_seconds
        """Least time between the end of a reconcile and the next one for an event."""
        self._jitter = jitter
        self._entries: dict[Key, _Entry] = {}
        self._ready: asyncio.Queue[Key | None] = asyncio.Queue()
        """Keys for the next free worker; None ends one."""
        self.retries = 0
        """How often a key was put back after an error."""
        self.conflicts = 0
        """How often a key was put back by Retry."""
        self.stopped = False

    @property
    def depth(self) -> int:
        """Number of keys that wait for a worker."""
        return sum(entry.waiting for entry in self._entries.values())

    @property
    def busy_seconds(self) -> float:
        """For how long the key has been with the handler that has been there longest."""
        now = time.monotonic()
        return max((now - entry.began for entry in self._entries.values() if entry.running), default=0.0)

    def keys(self) -> set[Key]:
        """Return the keys that wait, are being reconciled, or are due later."""
        return {k for k, e in self._entries.items() if e.waiting or e.running or e.due < float("inf")}

    def add(self, key: Key) -> None:
        """Have a key reconciled as soon as a worker is free; once more, if it is being reconciled now.

        One that was reconciled within the spacing waits for its end, so that a burst of events is one reconcile more.
        """
        entry = self._entries.setdefault(key, _Entry())
        left = entry.ended + self._spacing - time.monotonic()
        if left > 0.0 and not entry.running:
            self.add_after(key, left)
        else:
            self._put(key)

    def _put(self, key: Key) -> None:
        if self.stopped:
            return
        entry = self._entries.setdefault(key, _Entry())
        self._cancel_timer(entry)
        if not entry.waiting:
            entry.waiting = True
            if not entry.running:
                self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Have a key reconciled later. The earlier of two times counts."""
        if self.stopped:
            return
        entry = self._entries.setdefault(key, _Entry())
        due = time.monotonic() + seconds
        if entry.waiting or due >= entry.due:
            return
        self._cancel_timer(entry)
        entry.due = due
        entry.timer = asyncio.get_running_loop().call_later(seconds, self._put, key)

    async def run(self) -> None:
        """Work until stop()."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(self._concurrency):
                workers.create_task(self._work())

    def stop(self) -> None:
        """Let workers end after what they are doing."""
        self.stopped = True
        for entry in self._entries.values():
            self._cancel_timer(entry)
        for _ in range(self._concurrency):
            self._ready.put_nowait(None)

    async def _work(self) -> None:
        while not self.stopped:
            key = await self._ready.get()
            if self.stopped or key is None:
                return
            await self._handle(key)

    async def _handle(self, key: Key) -> None:
        entry = self._entries[key]
        entry.waiting, entry.running, entry.began = False, True, time.monotonic()
        again: float | None = None
        try:
            again = await self._handler(key)
            entry.failures = entry.conflicts = 0
        except Retry:
            entry.conflicts += 1
            self.conflicts += 1
            # What is read anew is right as a rule; where it is not, it must not be read five times a second.
            again = self._spacing if entry.conflicts == 1 else self.retry_seconds(entry.conflicts - 1)
        except Exception:
            entry.failures += 1
            self.retries += 1
            again = self.retry_seconds(entry.failures)
            logger.exception("%s failed %d times, next in %.1f s", key, entry.failures, again)
        finally:
            entry.running, entry.ended = False, time.monotonic()
        if entry.waiting:
            # Events that came meanwhile are one reconcile, after the spacing.
            entry.waiting = False
            again = self._spacing if again is None else min(again, self._spacing)
        if again is not None:
            self.add_after(key, max(again, 0.0))
        elif entry.timer is None:
            # The end of the reconcile is remembered for as long as it counts.
            entry.timer = asyncio.get_running_loop().call_later(self._spacing, self._entries.pop, key, None)

    def retry_seconds(self, failures: int) -> float:
        """Return how long a key waits after so many failures in a row."""
        return backoff_seconds(failures, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, self._jitter())

    @staticmethod
    def _cancel_timer(entry: _Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
        entry.timer, entry.due = None, float("inf")


def backoff_seconds(failures: int, first: float, longest: float, jitter: float) -> float:
    """Return the delay after so many failures in a row, from 1: it doubles from `first` to `longest`, in seconds.

    A jitter between 0 and 1 spreads it over its upper half, so that what failed together is not tried again together.
    """
    return min(first * 2.0 ** min(failures - 1, 20), longest) * (0.5 + 0.5 * jitter)
