"""A Lease that one of several operators holds: that one reconciles, the others wait for it to be free.

The rules are those of client-go's leaderelection, so `kubectl get lease` reads as for any other controller. Clocks of
two machines are never compared: a lease has run out when it was seen unchanged for its duration on our own clock.
What the holder writes meanwhile does not rest on the lease alone: every turn of a job is refused by its
resourceVersion if somebody else took one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from distill_operator.runtime.errors import AlreadyExists, ApiError, Conflict
from distill_operator.runtime.kinds import Kind

logger = logging.getLogger(__name__)
Json = dict[str, Any]


class LeaseLost(Exception):
    """Somebody else may lead by now: the process must end, and with an error."""


class LeaseStore(Protocol):
    """What the election asks of the API server."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """None when it does not exist."""

    async def create(self, body: Mapping[str, Any]) -> None:
        """Raises AlreadyExists."""

    async def replace(self, body: Mapping[str, Any]) -> None:
        """Of the resourceVersion in it. Raises Conflict."""


@dataclass(frozen=True)
class Terms:
    """client-go's defaults."""

    duration_seconds: int = 15
    """Unrenewed for so long, the lease is free."""
    renew_deadline_seconds: float = 10.0
    """A holder that could not renew for so long gives up: well before another may take over."""
    retry_seconds: float = 2.0
    """Between two renewals, and between two looks of those who wait."""


@dataclass
class Election:
    """One candidate."""

    store: LeaseStore
    namespace: str
    name: str
    identity: str
    terms: Terms = field(default_factory=Terms)
    clock: Callable[[], float] = time.monotonic
    _seen: Json | None = None
    """The lease's spec at the last look."""
    _seen_at: float = 0.0
    """On our clock, when it was first seen like that."""

    @property
    def holder(self) -> str:
        """At the last look; empty when nobody holds it."""
        return str((self._seen or {}).get("holderIdentity") or "")

    async def acquire(self, contact: Callable[[], None]) -> None:
        """Waits until the lease is ours. `contact` is told of every answer of the API server."""
        told = None
        while True:
            try:
                if await self.attempt():
                    logger.info("leading: holds the lease %s/%s as %s", self.namespace, self.name, self.identity)
                    return
                contact()
            except ApiError as error:
                logger.warning("the lease %s/%s cannot be had: %s", self.namespace, self.name, error)
            if told != self.holder:
                told = self.holder
                logger.info("standing by: %s leads", self.holder or "nobody")
            await asyncio.sleep(min(self.terms.retry_seconds, max(self._left(), 0.1)))

    async def hold(self) -> None:
        """Renews until it cannot. Raises LeaseLost."""
        renewed = self.clock()
        while True:
            await asyncio.sleep(self.terms.retry_seconds)
            began = self.clock()
            left = renewed + self.terms.renew_deadline_seconds - began
            try:
                async with asyncio.timeout(max(left, 0.05)):
                    if await self.attempt():
                        renewed = began
                        continue
            except (ApiError, TimeoutError) as error:
                logger.warning("the lease %s/%s was not renewed: %s", self.namespace, self.name, error or "no answer")
            if self.holder not in ("", self.identity):
                raise LeaseLost(f"{self.holder} took the lease {self.namespace}/{self.name} over")
            if self.clock() - renewed >= self.terms.renew_deadline_seconds:
                seconds = self.terms.renew_deadline_seconds
                raise LeaseLost(f"the lease {self.namespace}/{self.name} was not renewed for {seconds:.0f} s")

    async def attempt(self) -> bool:
        """Takes the lease if it is free, or renews it if it is ours. Raises ApiError."""
        found = await self.store.get(Kind.LEASE, self.namespace, self.name)
        if found is None:
            return await self._create()
        spec = found.get("spec") or {}
        if spec != self._seen:
            self._seen, self._seen_at = spec, self.clock()
        if self.holder not in ("", self.identity) and self._left() > 0:
            return False
        return await self._replace(found, self._claim(spec))

    async def release(self) -> None:
        """Lets another lead at once. Without effect where the lease is not ours."""
        try:
            found = await self.store.get(Kind.LEASE, self.namespace, self.name)
            if found is None or found["spec"].get("holderIdentity") != self.identity:
                return
            spec = {key: value for key, value in found["spec"].items() if key != "holderIdentity"}
            # As client-go: what is left of it runs out at once.
            await self._replace(found, {**spec, "leaseDurationSeconds": 1, "renewTime": _now()})
        except ApiError as error:
            logger.warning("the lease %s/%s was not released: %s", self.namespace, self.name, error)

    def _left(self) -> float:
        """Seconds for which what was seen last holds."""
        seconds = (self._seen or {}).get("leaseDurationSeconds") or self.terms.duration_seconds
        return self._seen_at + float(seconds) - self.clock() if self._seen else 0.0

    def _claim(self, before: Mapping[str, Any]) -> Json:
        now = _now()
        ours = before.get("holderIdentity") == self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self.terms.duration_seconds,
            "acquireTime": before.get("acquireTime", now) if ours else now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (not ours and bool(before)),
        }

    async def _create(self) -> bool:
        meta = {"name": self.name, "namespace": self.namespace}
        spec = self._claim({})
        try:
            await self.store.create({**TYPES, "metadata": meta, "spec": spec})
        except AlreadyExists:
            return False
        self._seen, self._seen_at = spec, self.clock()
        return True

    async def _replace(self, found: Json, spec: Json) -> bool:
        """False when somebody was faster."""
        began = self.clock()
        try:
            await self.store.replace({**TYPES, "metadata": found["metadata"], "spec": spec})
        except Conflict:
            return False
        self._seen, self._seen_at = spec, began
        return True


TYPES = {"apiVersion": Kind.LEASE.value.api_version, "kind": Kind.LEASE.value.kind}


def _now() -> str:
    """For people: no decision rests on it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
