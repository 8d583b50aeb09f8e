"""The trainer's side of a weight push: new weights into every engine, and proof that they arrived.

`Sync` is what every way has in common: generation pauses, the weights are transferred, the version is read back, and
generation goes on. An engine that fails is left out and named in EngineLost; all others then have the new weights. A
restarted engine gets them by a push to it alone. No way holds more than two buckets of the weights (buckets.py): each
attempt is a fresh pass over the trainer's parameters. The ways have modules of their own: broadcast.py,
weight_files.py, shared_memory.py.
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
BUCKET_BYTES = 256 * 1024**2
"""Measured (bench/weight_sync.py): each bucket costs some milliseconds beside its bytes, and memory twice."""
ATTEMPTS = 2
"""Of one push to engines that all seem healthy."""


class EngineLost(Exception):
    """Engines that could not be given the weights, by number, with the reason. All others have them."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"engine {n}: {why}" for n, why in reasons.items()))
        self.reasons = dict(reasons)


class PushIncomplete(Exception):
    """A push that failed half-way: the engines in `reasons` are lost, the others may try again."""

    def __init__(self, reasons: Mapping[int, str], why: str = "") -> None:
        super().__init__(why or "; ".join(reasons.values()))
        self.reasons = dict(reasons)


async def on_each(engines: Engines, call: Callable[[EngineHandle], Awaitable[Any]]) -> None:
    """Awaits `call` on all engines at once. Raises Incomplete once all have answered, naming the unavailable."""
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
    """Pause, transfer, proof, resume; and going on without the engines that fail. A way adds the transfer."""

    async def push(self, source: WeightSource, version: int, engines: Engines) -> None:
        """Gives `engines` the weights `version`. Raises EngineLost after all others have them."""
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
                    # Everyone answers, and it still does not work: a fresh server is what is left to try.
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
        """A sync for engines that come back: whatever becomes of a push to them, the next one to others is not held up.
        Raises Incomplete."""
        yield self

    async def _once(self, source: WeightSource, version: int, engines: Engines) -> None:
        """One attempt: the transfer, inside `_paused`. Raises Incomplete."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def _paused(self, version: int, engines: Engines) -> AsyncIterator[None]:
        """Around a transfer; what fails in it leaves the engines paused, for the next attempt."""
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
        """Brings engines out of a push that failed half-way; they stay paused until the next one."""

    async def close(self) -> None: ...
