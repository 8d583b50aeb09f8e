"""The teacher's replicas: every address behind its name, how much each has to do, and which to leave alone."""

import asyncio
import logging
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 30.0
"""Age at which the addresses are looked up again; at once after a failed connection."""
BREAK_AFTER = 3
"""Failures in a row after which a replica is left alone."""
BREAK_SECONDS = (1.0, 30.0)
"""For how long: doubled each time, from and to."""


class NotAnswered(Exception):
    """A failure of transport or server, which another try may not have."""


@dataclass(eq=False)
class Replica:
    """One address, and what is known of it."""

    address: str
    slots: asyncio.Semaphore
    outstanding_tokens: int = 0
    answered_tokens: int = 0
    """Of all requests so far: what has gone through its cache."""
    failures: int = 0
    open_until: float = 0.0
    """time.monotonic until which it is left alone."""
    admitted: bool = True
    """It scores as the others do. One that joins later is left alone until it is."""
    rejected: bool = False
    """It does not."""

    def failed(self, now: float) -> None:
        self.failures += 1
        if self.failures >= BREAK_AFTER:
            pause = min(BREAK_SECONDS[1], BREAK_SECONDS[0] * 2 ** (self.failures - BREAK_AFTER))
            self.open_until = now + pause

    def succeeded(self) -> None:
        self.failures, self.open_until = 0, 0.0


class Replicas:
    """Those of `names`, each HOST:PORT; an address joins when HOST resolves to it, and goes when it no longer does."""

    def __init__(self, names: list[str], slots: int) -> None:
        """`slots`: requests in flight of one replica."""
        self._names, self._slots = names, slots
        self._known: dict[str, Replica] = {}
        self._resolved_at = -RESOLVE_SECONDS
        self._resolving = asyncio.Lock()

    def usable(self, replica: Replica) -> bool:
        """It is still there, and not left alone."""
        known = self._known.get(replica.address) is replica
        return known and replica.admitted and replica.open_until <= time.monotonic()

    def pending(self) -> list[Replica]:
        """Those that have yet to prove themselves."""
        now = time.monotonic()
        return [r for r in self._known.values() if not r.admitted and not r.rejected and r.open_until <= now]

    def all(self) -> list[Replica]:
        """Also those that are left alone for now."""
        return list(self._known.values())

    def least_loaded(self, but: Replica | None = None) -> Replica | None:
        """By outstanding tokens; `but` only if there is no other."""
        usable = [r for r in self._known.values() if self.usable(r)]
        others = [r for r in usable if r is not but]
        return min(others or usable, key=lambda r: r.outstanding_tokens, default=None)

    async def resolve(self, again: bool = False) -> None:
        """Looks the addresses up: new ones join, vanished ones get no more requests."""
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
                    # Nothing is known: what was known stays.
                    infos = []
                    found.update(self._known)
                for _, _, _, _, where in infos:
                    ip, to = str(where[0]), int(where[1])
                    address = f"[{ip}]:{to}" if ":" in ip else f"{ip}:{to}"
                    # The first are compared by the preflight.
                    new = Replica(address, asyncio.Semaphore(self._slots), admitted=not self._known)
                    found[address] = self._known.get(address) or new
            if found.keys() != self._known.keys():
                log.info("teacher replicas: %s", ", ".join(sorted(found)) or "none")
            self._known = found
            self._resolved_at = time.monotonic()
