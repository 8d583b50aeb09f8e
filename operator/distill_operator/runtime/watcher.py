"""Keeps kopf watching: begins all of it anew when it has ended, or lacks a watch that should be there.

In kopf an error that it takes for fatal, such as an ERROR event within a watch or a broken answer to its scan of the
API server's kinds, ends one task, and with that all others. It does not begin any of them again.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from distill_operator.kinds import Kind
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.health_server import Heart
from distill_operator.runtime.kopf_thread import KopfThread, watch_name
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import backoff_seconds
from distill_operator.settings import Settings

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.5
MISSING_SECONDS = 30.0
"""How long a watch may be missing while the API server answers: longer than kopf's scan of it takes."""
SILENT_SECONDS = 60.0
"""How long kopf's loop may not run."""
CALM_SECONDS = 60.0
"""After a life of so long, the next failure counts as the first."""
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 5.0
END_SECONDS = 10.0
"""How long kopf may take to end, when asked to and once more when cancelled, before it is left behind."""


class Watches:
    """The watches of owners and children, which feed the cache and wake the owner of what is new there."""

    def __init__(
        self,
        settings: Settings,
        cache: Cache,
        wake: Callable[[Key], None],
        *,
        heart: Heart,
        excused: Callable[[], bool],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.restarts = 0
        """How often kopf was begun anew."""
        self._settings = settings
        self._cache = cache
        self._wake = wake
        self._heart = heart
        self._excused = excused
        """Whether the API server is away, so that a watch may be missing."""
        self._jitter = jitter
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._doubt = ""
        """Why kopf is to begin anew although it seems well."""
        self._beat: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Watch until stop()."""
        self._beat, failures = self._heart("watches"), 0
        while not self._stopping.is_set():
            kopf = KopfThread(self._settings, self._cache.ownership, self._on_event, lambda: self._cache.namespaces)
            began = time.monotonic()
            kopf.start()
            why = await self._until_broken(kopf)
            await self._end(kopf)
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - began > CALM_SECONDS else failures + 1
            self.restarts += 1
            seconds = self.delay_seconds(failures)
            logger.error("all watches begin anew in %.1f s: %s", seconds, why)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)

    def stop(self) -> None:
        """End all watches."""
        self._stopping.set()

    def renew(self, why: str) -> None:
        """Begin all watches anew: what they go on from may not be true any more."""
        self._doubt = why

    def delay_seconds(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        return backoff_seconds(failures, FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS, self._jitter())

    async def _until_broken(self, kopf: KopfThread) -> str:
        """Wait until kopf must begin anew, or is to stop. Return why."""
        ended: asyncio.Future[Any] = asyncio.wrap_future(kopf.ended)
        stopping: asyncio.Future[Any] = asyncio.ensure_future(self._stopping.wait())
        self._doubt = ""
        complete_at = time.monotonic()
        try:
            while not stopping.done():
                await asyncio.wait({ended, stopping}, timeout=CHECK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    return str(ended.result())
                if self._doubt:
                    return self._doubt
                now, missing = time.monotonic(), self._expected() - kopf.watching
                if now - kopf.alive_at > SILENT_SECONDS:
                    return "kopf's loop hangs"
                if not missing or self._excused():
                    complete_at = now
                    self._beat()
                elif now - complete_at > MISSING_SECONDS:
                    return f"nothing watches {', '.join(sorted(missing))}"
            return "asked to"
        finally:
            stopping.cancel()

    def _expected(self) -> set[str]:
        """Return the names of the watches that should be there."""
        ownership = self._cache.ownership
        return {
            watch_name(kind, namespace)
            for kind in (*ownership.owner_labels, *ownership.watched)
            if kind not in self._cache.not_served
            for namespace in self._cache.namespaces
        }

    async def _end(self, kopf: KopfThread) -> None:
        for end in (kopf.stop, kopf.cancel):
            end()
            if (await asyncio.wait({asyncio.wrap_future(kopf.ended)}, timeout=END_SECONDS))[0]:
                return
        logger.error("kopf does not end, and is left behind")

    def _on_event(self, kind: Kind, raw: dict[str, Any], gone: bool, owner: Key) -> None:
        # At the very end the loop may be gone.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._handle, kind, raw, gone, owner)

    def _handle(self, kind: Kind, raw: dict[str, Any], gone: bool, owner: Key) -> None:
        if not {"", owner.namespace}.intersection(self._cache.namespaces):
            # Its watch ends in a moment.
            return
        # The echo of our own write tells nothing new.
        if self._cache.observe(kind, raw, gone=gone):
            self._wake(owner)
