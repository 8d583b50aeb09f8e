"""Which engine a request goes to: evaluation before training, else first come, first served; to the least busy engine.

An engine is given no more requests than it can run at once. The others wait here and not in the engine's own queue, so
that they start with whatever weights are newest then, and on whatever engine is free first.
"""

import asyncio
from collections import deque


class SlotScheduler:
    """Requests in flight of each engine, by number."""

    def __init__(self, limit: int) -> None:
        """`limit`: requests that one engine has at once."""
        self._limit = limit
        self._load: dict[int, int] = {}
        """Also of engines that were closed, until their last request has ended."""
        self._urgent: deque[asyncio.Future[int]] = deque()
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._held = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.open: set[int] = set()
        """Engines that are given requests."""

    def add(self, number: int) -> None:
        self.open.add(number)
        self._hand_out()

    def remove(self, number: int) -> None:
        self.open.discard(number)

    async def acquire(self, *, urgent: bool = False) -> int:
        """An engine with a free slot, which is the caller's until `free`. An urgent one waits for urgent ones only."""
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        (self._urgent if urgent else self._waiting).append(turn)
        self._hand_out()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(turn.result())
            raise

    def release(self, number: int) -> None:
        self._load[number] -= 1
        if not any(self._load.values()):
            self._idle.set()
        self._hand_out()

    async def drain(self) -> None:
        """Hands out no more until `release`, and returns when nothing is in flight."""
        self._held = True
        await self._idle.wait()

    def resume(self) -> None:
        self._held = False
        self._hand_out()

    def fail(self, error: Exception) -> None:
        """Ends everybody's waiting."""
        for line in (self._urgent, self._waiting):
            while line:
                if not (turn := line.popleft()).done():
                    turn.set_exception(error)

    def _hand_out(self) -> None:
        while (line := self._urgent or self._waiting) and not self._held:
            number = min(self.open, key=lambda n: self._load.get(n, 0), default=None)
            if number is None or self._load.get(number, 0) >= self._limit:
                return
            turn = line.popleft()
            if not turn.done():
                self._load[number] = self._load.get(number, 0) + 1
                self._idle.clear()
                turn.set_result(number)
