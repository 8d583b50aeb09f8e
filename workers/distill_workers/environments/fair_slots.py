"""Slots that two kinds of work share: training's conversations and those of evaluations.

While both wait, a free slot goes to the kind that holds fewer (of two that hold as many, to the one that was not served
last), so each has half of them in the end; alone, a kind has them all. Within a kind, the first to come is the first to
be served.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum


class Kind(Enum):
    """Whose a conversation is."""

    TRAINING = "training"
    EVALUATION = "evaluation"


class FairSlots:
    """So many slots for all kinds together."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._held: Counter[Kind] = Counter()
        self._last: Kind | None = None
        """The kind that was served last."""
        self._waiting: dict[Kind, deque[asyncio.Future[None]]] = {kind: deque() for kind in Kind}

    @asynccontextmanager
    async def one(self, kind: Kind) -> AsyncIterator[None]:
        """Hold a slot, once it is this kind's turn."""
        await self._take(kind)
        try:
            yield
        finally:
            self._held[kind] -= 1
            self._free += 1
            self._assign()

    async def _take(self, kind: Kind) -> None:
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[kind].append(slot)
        self._assign()
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():  # it was given, and is not needed any more
                self._held[kind] -= 1
                self._free += 1
                self._assign()
            raise

    def _assign(self) -> None:
        while self._free and (waiting := [kind for kind in Kind if self._next(kind) is not None]):
            kind = min(waiting, key=lambda one: (self._held[one], one is self._last))
            self._waiting[kind].popleft().set_result(None)
            self._held[kind] += 1
            self._free -= 1
            self._last = kind

    def _next(self, kind: Kind) -> asyncio.Future[None] | None:
        """Return the first of a kind that waits, without those that were cancelled."""
        queue = self._waiting[kind]
        while queue and queue[0].done():
            queue.popleft()
        return queue[0] if queue else None
