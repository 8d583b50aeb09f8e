"""A Lease that one of several operators holds: that one reconciles, the others wait for it to be free.

The rules are those of client-go's leaderelection, so `kubectl get lease` reads as for any other controller. Clocks of
two machines are never compared: a lease has run out when it was seen unchanged for its duration on our own clock.
What the holder writes meanwhile does not rest on the lease alone: every transition of an owner is refused by its
resourceVersion if another process wrote one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from distill_operator.kinds import Kind
from distill_operator.runtime.errors import AlreadyExists, ApiError, Conflict
from distill_operator.runtime.health_server import Heart, no_heart

logger = logging.getLogger(__name__)
Json = dict[str, Any]


class LeaseLost(Exception):
    """Raised when another process may lead by now: this one must end, and with an error."""


class LeaseNotRenewed(LeaseLost):
    """Raised when the API server was away for too long: this process may stand for election again."""


class LeaseStore(Protocol):
    """What the election asks of the API server."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """Return an object; None when it does not exist."""

    async def create(self, body: Mapping[str, Any]) -> None:
        """Create an object. Raises AlreadyExists."""

    async def replace(self, body: Mapping[str, Any]) -> None:
        """Write a whole object with the resourceVersion in it. Raises Conflict."""


@dataclass(frozen=True)
class Terms:
    """The times of an election; the defaults are client-go's."""

    duration_seconds: int = 15
    """A lease that is not renewed for so long is free."""
    renew_deadline_seconds: float = 10.0
    """A holder that could not renew for so long gives up: well before another may take over."""
    retry_seconds: float = 2.0
    """Between two renewals, and between two reads of a candidate that waits."""


@dataclass
class Election:
    """One candidate for the lease."""

    store: LeaseStore
    namespace: str
    name: str
    identity: str
    terms: Terms = field(default_factory=Terms)
    clock: Callable[[], float] = time.monotonic
    heart: Heart = no_heart
    _last_read: Json | None = None
    """The lease's spec as it was read last."""
    _read_at: float = 0.0
    """On our own clock, when it was first read like that."""

    @property
    def holder(self) -> str:
        """Identity of the holder as it was read last; empty when nobody holds the lease."""
        return str((self._last_read or {}).get("holderIdentity") or "")

    async def acquire(self) -> None:
        """Wait until the lease is ours."""
        reported, beat, failures = None, self.heart("lease"), 0
        while True:
            seconds = self.terms.retry_seconds
            try:
                if await self.attempt():
                    logger.info("leading: holds the lease %s/%s as %s", self.namespace, self.name, self.identity)
                    return
            except ApiError as error:
                failures += 1
                if failures.bit_count() == 1:  # at the first time, and then ever less often
                    what = "the lease %s/%s cannot be had, try %d: %s"
                    logger.warning(what, self.namespace, self.name, failures, error)
                if error.may_pass:
                    beat()
            else:
                failures, seconds = 0, min(seconds, max(self._left(), 0.1))
                beat()
            if reported != self.holder:
                reported = self.holder
                logger.info("standing by: %s leads", self.holder or "nobody")
            await asyncio.sleep(seconds)

    async def hold(self) -> None:
        """Renew the lease until that fails. Raises LeaseLost."""
        renewed, beat = self.clock(), self.heart("lease")
        while True:
            await asyncio.sleep(self.terms.retry_seconds)
            beat()
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
                raise LeaseNotRenewed(f"the lease {self.namespace}/{self.name} was not renewed for {seconds:.0f} s")

    async def attempt(self) -> bool:
        """Take the lease if it is free, or renew it if it is ours. Return whether it is ours. Raises ApiError."""
        found = await self.store.get(Kind.LEASE, self.namespace, self.name)
        if found is None:
            return await self._create()
        spec = found.get("spec") or {}
        if spec != self._last_read:
            self._last_read, self._read_at = spec, self.clock()
        if self.holder not in ("", self.identity) and self._left() > 0:
            return False
        return await self._replace(found, self._claim(spec))

    async def release(self) -> None:
        """Give the lease up, so that another leads at once. Without effect where it is not ours."""
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
        """Return the seconds for which the lease as read last holds."""
        seconds = (self._last_read or {}).get("leaseDurationSeconds") or self.terms.duration_seconds
        return self._read_at + float(seconds) - self.clock() if self._last_read else 0.0

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
        self._last_read, self._read_at = spec, self.clock()
        return True

    async def _replace(self, found: Json, spec: Json) -> bool:
        """Write the lease; return False when another process was faster."""
        began = self.clock()
        try:
            await self.store.replace({**TYPES, "metadata": found["metadata"], "spec": spec})
        except Conflict:
            return False
        self._last_read, self._read_at = spec, began
        return True


TYPES = {"apiVersion": Kind.LEASE.value.api_version, "kind": Kind.LEASE.value.kind}


def _now() -> str:
    """Return the time for people; no decision rests on it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
