"""The slot scheduler: which request runs next, and on which engine.

Requests of evaluations go before those of training, and the next turn of a conversation before what has not begun;
otherwise the first to come is the first to be served, by the least busy engine. A next turn goes to the engine that had
the last one, and has the conversation in its cache, as long as that engine is there.

An engine is given no more requests than rollout.maxConcurrentRequests. The others wait here and not in the engine's own
queue, so that they start with whatever weights are newest then, and on whatever engine is free first. An engine whose
key-value cache holds fewer at once takes some back into its queue, which costs their prefill again.
"""

import asyncio
from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class EngineAffinity:
    """The engine that has the beginning of a conversation in its cache, by its number; None before the first turn."""

    engine: int | None = None


class SlotScheduler:
    """A scheduler of the request slots of all engines, which are known by their numbers."""

    def __init__(self, limit: int) -> None:
        """`limit` is the number of requests that one engine runs at once."""
        self._limit = limit
        self._in_flight: dict[int, int] = {}
        """Requests of each engine; also of engines that were removed, until their last request has ended."""
        self._urgent: deque[asyncio.Future[int]] = deque()
        self._turns: deque[tuple[asyncio.Future[int], int]] = deque()
        """Next turns of conversations, each with the engine of the last one."""
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
        self._assign()  # turns that waited for this engine go to others

    async def acquire(self, *, urgent: bool = False, affinity: EngineAffinity | None = None) -> int:
        """Return the number of an engine with a free slot, which the caller holds until `release`.

        An urgent request waits for urgent ones only. A turn of a conversation brings its `affinity`, which names the
        engine afterwards. Raises what `fail` was given.
        """
        slot: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if affinity is not None and affinity.engine is not None:
            self._turns.append((slot, affinity.engine))
        else:
            (self._urgent if urgent else self._waiting).append(slot)
        self._assign()
        try:
            number = await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled() and slot.exception() is None:
                self.release(slot.result())
            raise
        if affinity is not None:
            affinity.engine = number
        return number

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
        waiting = [*self._urgent, *(slot for slot, _ in self._turns), *self._waiting]
        for queue in (self._urgent, self._turns, self._waiting):
            queue.clear()
        for slot in waiting:
            if not slot.done():
                slot.set_exception(error)

    def _assign(self) -> None:
        while not self._draining:
            number = min(self.open, key=lambda n: self._in_flight.get(n, 0), default=None)
            if number is None or not self._has_slot(number):
                return
            slot: asyncio.Future[int]
            if self._urgent:
                slot = self._urgent.popleft()
            elif self._turns and (place := self._first_turn()) is not None:
                (slot, after) = self._turns[place]
                del self._turns[place]
                number = after if after in self.open else number
            elif self._waiting:
                slot = self._waiting.popleft()
            else:
                return
            if not slot.done():
                self._in_flight[number] = self._in_flight.get(number, 0) + 1
                self._idle.clear()
                slot.set_result(number)

    def _first_turn(self) -> int | None:
        """Return the place of the first turn whose engine has a slot, or is gone; None where all must wait."""
        return next((i for i, (_, n) in enumerate(self._turns) if n not in self.open or self._has_slot(n)), None)

    def _has_slot(self, number: int) -> bool:
        return self._in_flight.get(number, 0) < self._limit
