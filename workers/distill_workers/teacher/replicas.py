"""The replicas of a teacher: every address behind its name, the load of each, and which of them to skip for now."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 30.0
"""Age at which the addresses are looked up again; after a failed connection they are looked up at once."""
BREAK_AFTER = 3
"""Failures in a row after which a replica is skipped."""
BREAK_SECONDS = (1.0, 30.0)
"""A replica is skipped for so long at first, twice as long after each further failure, and at most for so long."""


class NotAnswered(Exception):
    """Raised for a failure of transport or server: another try may succeed."""


class NotReached(NotAnswered):
    """Raised where a server did not get to a request, which says nothing about it: no connection was made, or the
    server lacks the weights that it should have."""


def not_answered(error: Exception) -> NotAnswered:
    """Return the error of a request that ended in `error`, of aiohttp or of the system."""
    kind = NotReached if isinstance(error, aiohttp.ClientConnectorError) else NotAnswered
    return kind(f"{type(error).__name__}: {error}")


@dataclass(eq=False)
class Replica:
    """One address of a teacher, its load and its state."""

    address: str
    slots: asyncio.Semaphore
    """Requests that it may still be sent at once."""
    outstanding_tokens: int = 0
    answered_tokens: int = 0
    """Tokens of all requests so far: what has passed through its cache."""
    failures: int = 0
    open_until: float = 0.0
    """time.monotonic until which it is skipped."""
    skipped_at: float = 0.0
    """time.monotonic at which it was skipped last."""
    admitted: bool = True
    """Whether it scores as the others do; one that joins later gets no requests before (replica_admission.py)."""
    rejected: bool = False
    """Whether it was found to score otherwise than the others."""

    def failed(self, sent: float) -> None:
        """Count the failure of a request that was sent at a time of time.monotonic; skip the replica after several.

        What was under way when it was skipped tells nothing new: else one overload that refuses all requests at once
        would count as many failures in a row, and cost the longest pause.
        """
        if sent <= self.skipped_at:
            return
        self.failures += 1
        if self.failures >= BREAK_AFTER:
            pause = min(BREAK_SECONDS[1], BREAK_SECONDS[0] * 2 ** (self.failures - BREAK_AFTER))
            self.skipped_at = time.monotonic()
            self.open_until = self.skipped_at + pause

    @asynccontextmanager
    async def slot(self, waiting: Callable[[int], None]) -> AsyncIterator[None]:
        """Hold one of its request slots, once one is free; `waiting` is told 1 when the wait begins, -1 at its end."""
        waiting(1)
        try:
            await self.slots.acquire()
        finally:
            waiting(-1)
        try:
            yield
        finally:
            self.slots.release()

    def succeeded(self) -> None:
        """Forget earlier failures."""
        self.failures, self.open_until = 0, 0.0


class Replicas:
    """The replicas behind `names`, each HOST:PORT: every address that a HOST resolves to, as long as it does."""

    def __init__(self, names: list[str], slots: int) -> None:
        """`slots` is the number of requests that one replica is sent at once."""
        self._names, self._slots = names, slots
        self._known: dict[str, Replica] = {}
        self._resolved_at = -RESOLVE_SECONDS
        self._resolving = asyncio.Lock()

    def usable(self, replica: Replica) -> bool:
        """Return whether a replica is still known, admitted and not skipped."""
        known = self._known.get(replica.address) is replica
        return known and replica.admitted and replica.open_until <= time.monotonic()

    def pending_admission(self) -> list[Replica]:
        """Return the replicas that are yet to be compared with the others."""
        now = time.monotonic()
        return [r for r in self._known.values() if not r.admitted and not r.rejected and r.open_until <= now]

    def all(self) -> list[Replica]:
        """Return all replicas, also those that are skipped for now."""
        return list(self._known.values())

    def least_loaded(self, but: Replica | None = None) -> Replica | None:
        """Return the usable replica with the fewest outstanding tokens; `but` only if there is no other."""
        usable = [r for r in self._known.values() if self.usable(r)]
        others = [r for r in usable if r is not but]
        return min(others or usable, key=lambda r: r.outstanding_tokens, default=None)

    async def resolve(self, again: bool = False) -> None:
        """Look the addresses up, if that was long ago or `again`: new ones join, vanished ones leave."""
        age = RESOLVE_SECONDS if self._known and not again else 1.0
        if time.monotonic() - self._resolved_at < age:
            return
        async with self._resolving:
            if time.monotonic() - self._resolved_at < age:
                return
            found: dict[str, Replica] = {}
            for name in self._names:
                host, _, port = name.rpartition(":")
                try:
                    infos = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=1)
                except OSError:
                    # A failed look-up says nothing: the known addresses stay.
                    infos = []
                    found.update(self._known)
                for _, _, _, _, where in infos:
                    ip, to = str(where[0]), int(where[1])
                    address = f"[{ip}]:{to}" if ":" in ip else f"{ip}:{to}"
                    # The preflight compares the first replicas with each other.
                    new = Replica(address, asyncio.Semaphore(self._slots), admitted=not self._known)
                    found[address] = self._known.get(address) or new
            if found.keys() != self._known.keys():
                log.info("teacher replicas: %s", ", ".join(sorted(found)) or "none")
            self._known = found
            self._resolved_at = time.monotonic()
