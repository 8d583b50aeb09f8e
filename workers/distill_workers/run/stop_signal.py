"""SIGTERM, as the loop sees it: a wait that changes no state is cut short, everything else is done to its end."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from distill_workers.failures import Stopped
from distill_workers.run.run_state import RunState

T = TypeVar("T")


class StopSignal:
    """Whether the run is to end before its time, and the waits that end then."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._stopping = asyncio.Event()

    def set(self) -> None:
        """End the waits that are under way, and those that follow."""
        self._stopping.set()

    async def interrupting(self, work: Awaitable[T]) -> T:
        """Return the result of work that changes no state, or cancel it and raise Stopped as soon as `set` is
        called."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                step = self._state.step
                raise Stopped(f"stopped by SIGTERM after step {step}; the next attempt goes on from there")
            return task.result()
        finally:
            stop.cancel()
            task.cancel()
