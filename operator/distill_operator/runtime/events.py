"""Posts Events (events.k8s.io/v1) on the owners: one object for each occurrence, counted when it is repeated.

The name follows from the Event's key, so a restarted operator does not post twice. An owner that flaps cannot flood
the namespace: each Event is counted again once a minute at most, and each owner posts PER_HOUR an hour.
"""

import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from distill_operator.runtime.client import Cluster
from distill_operator.runtime.effects import Event
from distill_operator.runtime.errors import AlreadyExists, ApiError
from distill_operator.runtime.ownership import Key

logger = logging.getLogger(__name__)

MAX_NOTE = 1024
"""Longest note of an Event that the API takes, in characters."""
COUNT_AGAIN_AFTER = timedelta(minutes=1)
PER_HOUR = 60


def now_utc() -> datetime:
    return datetime.now(UTC)


@dataclass
class _Series:
    count: int
    last: datetime


@dataclass
class EventRecorder:
    """Posts Events, and remembers by the owner's uid what it posted."""

    cluster: Cluster
    reporter: str
    """The controller that reports, such as example.com/operator."""
    instance: str
    """The process that reports."""
    clock: Callable[[], datetime] = now_utc
    _series: dict[str, dict[str, _Series]] = field(default_factory=dict)
    """Events of an owner, by name."""
    _posted: dict[str, deque[datetime]] = field(default_factory=dict)
    """When an owner's Events were posted within the last hour."""

    async def record(self, owner: Key, uid: str, event: Event) -> None:
        """Post an Event on the owner of this uid. An Event is a courtesy: failures of the API server are logged."""
        name = f"{owner.name}.{hashlib.sha256(event.key.encode()).hexdigest()[:16]}"
        kind = owner.kind.value
        regarding = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "name": owner.name,
            "namespace": owner.namespace,
            "uid": uid,
        }
        try:
            await self._record(name, regarding, event)
        except ApiError as error:
            logger.warning("event %s of %s was not posted: %s", event.reason, owner, error)

    def forget(self, uid: str) -> None:
        """Forget the Events of an owner that is gone."""
        self._series.pop(uid, None)
        self._posted.pop(uid, None)

    async def _record(self, name: str, regarding: dict[str, str], event: Event) -> None:
        now, uid, namespace = self.clock(), regarding["uid"], regarding["namespace"]
        posted = self._series.setdefault(uid, {})
        known = posted.get(name)
        if known is not None:
            if now - known.last >= COUNT_AGAIN_AFTER and self._may_post(uid, now):
                known.count, known.last = known.count + 1, now
                series = {"count": known.count, "lastObservedTime": _micro(now)}
                try:
                    await self.cluster.patch_event(namespace, name, {"series": series})
                except ApiError as error:
                    if error.status != 404:
                        raise
                    # The API server keeps Events for an hour as a rule: this one is posted anew, as the first.
                    await self._create(posted, name, regarding, event, now)
            return
        if not self._may_post(uid, now):
            return
        await self._create(posted, name, regarding, event, now)

    async def _create(
        self, posted: dict[str, _Series], name: str, regarding: dict[str, str], event: Event, now: datetime
    ) -> None:
        with contextlib.suppress(AlreadyExists):
            await self.cluster.create_event(self._body(name, regarding, event, now))
        posted[name] = _Series(1, now)

    def _may_post(self, uid: str, now: datetime) -> bool:
        posted = self._posted.setdefault(uid, deque())
        while posted and now - posted[0] > timedelta(hours=1):
            posted.popleft()
        if len(posted) >= PER_HOUR:
            return False
        posted.append(now)
        return True

    def _body(self, name: str, regarding: dict[str, str], event: Event, now: datetime) -> dict[str, Any]:
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": regarding["namespace"]},
            "eventTime": _micro(now),
            "reportingController": self.reporter,
            "reportingInstance": self.instance[:128],
            "action": "Reconcile",
            "reason": event.reason,
            "note": event.message[:MAX_NOTE],
            "type": "Warning" if event.warning else "Normal",
            "regarding": regarding,
        }


def _micro(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
