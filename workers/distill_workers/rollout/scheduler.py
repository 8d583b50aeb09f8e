"""The slot scheduler: which request runs next, and on which engine.

Requests of evaluations go before those of training; otherwise the first to come is the first to be served, by the least
busy engine. An engine is given no more requests than rollout.maxConcurrentRequests. The others wait here and not in the
engine's own queue, so that they start with whatever weights are newest then, and on whatever engine is free first. An
engine whose key-value cache holds fewer at once takes some back into its queue, which costs their prefill again.
"""

import asyncio
from collections import deque


class SlotScheduler:
    """A scheduler of the request slots of all engines, which are known by their numbers."""

    def __init__(self, limit: int) -> None:
        """`limit` is the number of requests that one engine runs at once."""
        self._limit = limit
        self._in_flight: dict[int, int] = {}
        """Requests of each engine; also of engines that were removed, until their last request has ended."""
        self._urgent: deque[asyncio.Future[int]] = deque()
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.open: set[int] = set()
        """Engines that are given requests."""

    def add(self, number: int) -> None:
        """Open an engine for requests."""
        self.open.add(number)
        self._assign()

    def remove(self, number: int) -> None:
        """Give an engine no more requests; those in flight end as they may."""
        self.open.discard(number)

    async def acquire(self, *, urgent: bool = False) -> int:
        """Return the number of an engine with a free slot, which the caller holds until `release`.

        An urgent request waits for urgent ones only. Raises what `fail` was given.
        """
        slot: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        (self._urgent if urgent else self._waiting).append(slot)
        self._assign()
        try:
            return await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled() and slot.exception() is None:
                self.release(slot.result())
            raise

    def release(self, number: int) -> None:
        """Free one slot of an engine."""
        self._in_flight[number] -= 1
        if not any(self._in_flight.values()):
            self._idle.set()
        self._assign()

    async def drain(self) -> None:
        """Start no more requests until `resume`, and return when none is in flight."""
        self._draining = True
        await self._idle.wait()

    def resume(self) -> None:
        """Start requests again after `drain`."""
        self._draining = False
        self._assign()

    def fail(self, error: Exception) -> None:
        """Raise `error` in every `acquire` that waits."""
        for queue in (self._urgent, self._waiting):
            while queue:
                if not (slot := queue.popleft()).done():
                    slot.set_exception(error)

    def _assign(self) -> None:
        while (queue := self._urgent or self._waiting) and not self._draining:
            number = min(self.open, key=lambda n: self._in_flight.get(n, 0), default=None)
            if number is None or self._in_flight.get(number, 0) >= self._limit:
                return
            slot = queue.popleft()
            if not slot.done():
                self._in_flight[number] = self._in_flight.get(number, 0) + 1
                self._idle.clear()
                slot.set_result(number)
