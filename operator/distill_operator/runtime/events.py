"""Posts Events (events.k8s.io/v1) on jobs and Teachers: one object per thing, counted when it happens again.

The name follows from the key, so a restarted operator does not post twice. A job that flaps cannot flood the
namespace: each Event is counted again once a minute at most, and each posts so many an hour.
"""

import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from distill_api.base import API_VERSION, KIND
from distill_operator.runtime.client import Cluster
from distill_operator.runtime.effects import Event
from distill_operator.runtime.errors import AlreadyExists, ApiError

logger = logging.getLogger(__name__)

REPORTER = "distillation-operator.io/operator"
MAX_NOTE = 1024
"""Of the API."""
COUNT_AGAIN_AFTER = timedelta(minutes=1)
PER_HOUR = 60


def now_utc() -> datetime:
    return datetime.now(UTC)


@dataclass
class _Seen:
    count: int
    last: datetime


@dataclass
class EventRecorder:
    """Remembers what it posted, by uid."""

    cluster: Cluster
    instance: str
    clock: Callable[[], datetime] = now_utc
    _seen: dict[str, dict[str, _Seen]] = field(default_factory=dict)
    _posted: dict[str, deque[datetime]] = field(default_factory=dict)

    async def record(self, namespace: str, about: str, uid: str, event: Event, kind: str = KIND) -> None:
        """`about` is the name of the job, or of an object of another `kind`. Never raises for the API server's sake: an
        Event is a courtesy."""
        name = f"{about}.{hashlib.sha256(event.key.encode()).hexdigest()[:16]}"
        regarding = {"apiVersion": API_VERSION, "kind": kind, "name": about, "namespace": namespace, "uid": uid}
        try:
            await self._record(name, regarding, event)
        except ApiError as error:
            logger.warning("event %s of %s/%s was not posted: %s", event.reason, namespace, about, error)

    def forget(self, uid: str) -> None:
        self._seen.pop(uid, None)
        self._posted.pop(uid, None)

    async def _record(self, name: str, regarding: dict[str, str], event: Event) -> None:
        now, uid, namespace = self.clock(), regarding["uid"], regarding["namespace"]
        seen = self._seen.setdefault(uid, {})
        known = seen.get(name)
        if known is not None:
            if now - known.last >= COUNT_AGAIN_AFTER and self._may_post(uid, now):
                known.count, known.last = known.count + 1, now
                series = {"count": known.count, "lastObservedTime": _micro(now)}
                await self.cluster.patch_event(namespace, name, {"series": series})
            return
        if not self._may_post(uid, now):
            return
        with contextlib.suppress(AlreadyExists):
            await self.cluster.create_event(_body(name, regarding, event, self.instance, now))
        seen[name] = _Seen(1, now)

    def _may_post(self, uid: str, now: datetime) -> bool:
        posted = self._posted.setdefault(uid, deque())
        while posted and now - posted[0] > timedelta(hours=1):
            posted.popleft()
        if len(posted) >= PER_HOUR:
            return False
        posted.append(now)
        return True


def _body(name: str, regarding: dict[str, str], event: Event, instance: str, now: datetime) -> dict[str, Any]:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": regarding["namespace"]},
        "eventTime": _micro(now),
        "reportingController": REPORTER,
        "reportingInstance": instance[:128],
        "action": "Reconcile",
        "reason": event.reason,
        "note": event.message[:MAX_NOTE],
        "type": "Warning" if event.warning else "Normal",
        "regarding": regarding,
    }


def _micro(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
