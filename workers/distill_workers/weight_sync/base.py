"""The trainer's side of a weight push: new weights into every engine, and proof that they arrived.

`Sync` is common to every transport: generation pauses, the weights are transferred, the version is read back, and
generation goes on. An engine that fails is left out and named in EngineLost; all others then have the new weights. A
restarted engine gets them by a push to it alone. No transport holds more than two buckets of the weights (buckets.py):
each attempt is a new pass over the trainer's parameters. The transports are broadcast.py, disk.py and shared_memory.py.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from distill_workers.engine.engine import EngineHandle, EngineRefused, EngineUnavailable
from distill_workers.weight_sync.buckets import WeightSource

log = logging.getLogger(__name__)

Engines = Mapping[int, EngineHandle]
ATTEMPTS = 2
"""A push to engines that all seem healthy is tried so often."""


class EngineLost(Exception):
    """Raised when a push failed for the engines in `reasons`, by their numbers. All others have the weights."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"engine {n}: {why}" for n, why in reasons.items()))
        self.reasons = dict(reasons)


class PushIncomplete(Exception):
    """Raised when one attempt of a push failed: the engines in `reasons` are lost, the others may try again."""

    def __init__(self, reasons: Mapping[int, str], why: str = "") -> None:
        super().__init__(why or "; ".join(reasons.values()))
        self.reasons = dict(reasons)


async def on_each(engines: Engines, call: Callable[[EngineHandle], Awaitable[Any]]) -> None:
    """Await `call` on all engines at once.

    Raises PushIncomplete, once all have answered, with the engines that are unavailable.
    """
    results = await asyncio.gather(*(call(e) for e in engines.values()), return_exceptions=True)
    lost: dict[int, str] = {}
    refused: list[str] = []
    for number, result in zip(engines, results, strict=True):
        if isinstance(result, EngineUnavailable):
            lost[number] = str(result)
        elif isinstance(result, EngineRefused):
            refused.append(f"engine {number}: {result}")
        elif isinstance(result, BaseException):
            raise result
    if lost or refused:
        raise PushIncomplete(lost, "; ".join([*lost.values(), *refused]))


class Sync:
    """A push of weights: pause, transfer, proof, resume, without the engines that fail. Transports subclass it."""

    async def push(self, source: WeightSource, version: int, engines: Engines) -> None:
        """Push the weights `version` to `engines`. Raises EngineLost after all others have them."""
        left, lost, attempt = dict(engines), dict[int, str](), 1
        while left:
            try:
                await self._once(source, version, left)
                break
            except PushIncomplete as failed:
                reasons = failed.reasons
                if not reasons:
                    reasons = await self._unhealthy(left)
                if not reasons and attempt == ATTEMPTS:
                    # All answer, and it still fails: what is left to try is to restart the servers.
                    reasons = dict.fromkeys(left, str(failed))
                log.warning("push of weights %d, attempt %d: %s", version, attempt, failed)
                attempt += 1
                lost |= reasons
                await self._clean_up({n: e for n, e in left.items() if n not in reasons})
                left = {n: e for n, e in left.items() if n not in reasons}
        if lost:
            raise EngineLost(lost)

    @contextlib.asynccontextmanager
    async def catch_up_channel(self, engines: Engines) -> AsyncIterator["Sync"]:
        """Yield a Sync for restarted engines. If it fails or hangs, the next push to the others is not delayed.

        Raises PushIncomplete.
        """
        yield self

    async def _once(self, source: WeightSource, version: int, engines: Engines) -> None:
        """Make one attempt: the transfer, inside `_paused`. Raises PushIncomplete."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def _paused(self, version: int, engines: Engines) -> AsyncIterator[None]:
        """Pause the engines; after the transfer, prove the version and resume. After an error they stay paused."""
        await on_each(engines, lambda e: e.pause())
        yield
        for number, engine in engines.items():
            try:
                seen = await engine.weight_version()
            except (EngineUnavailable, EngineRefused) as error:
                raise PushIncomplete({number: str(error)}) from None
            if seen != version:
                raise PushIncomplete({number: f"has weights {seen} after a push of {version}"})
        await on_each(engines, lambda e: e.resume())

    async def _unhealthy(self, engines: Engines) -> dict[int, str]:
        try:
            await on_each(engines, lambda e: e.health())
        except PushIncomplete as failed:
            return failed.reasons
        return {}

    async def _clean_up(self, engines: Engines) -> None:
        """Bring engines out of a failed attempt; they stay paused until the next one."""

    async def close(self) -> None:
        """Free what the transport holds."""
