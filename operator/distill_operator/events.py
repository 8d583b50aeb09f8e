"""Posts Events (events.k8s.io/v1) on jobs: one object per thing that happened, counted when it happens again.

The name follows from the key, so a restarted operator does not post twice. A job that flaps cannot flood the
namespace: each Event is counted again once a minute at most, and each job posts so many an hour.
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
from distill_operator.cluster import AlreadyExists, ApiError, Cluster
from distill_operator.effects import Event

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
    """Remembers what it posted, by job."""

    cluster: Cluster
    instance: str
    clock: Callable[[], datetime] = now_utc
    _seen: dict[str, dict[str, _Seen]] = field(default_factory=dict)
    _posted: dict[str, deque[datetime]] = field(default_factory=dict)

    async def record(self, namespace: str, job: str, uid: str, event: Event) -> None:
        """Never raises for the API server's sake: an Event is a courtesy."""
        name = f"{job}.{hashlib.sha256(event.key.encode()).hexdigest()[:16]}"
        try:
            await self._record(namespace, job, uid, name, event)
        except ApiError as error:
            logger.warning("event %s of %s/%s was not posted: %s", event.reason, namespace, job, error)

    def forget(self, uid: str) -> None:
        self._seen.pop(uid, None)
        self._posted.pop(uid, None)

    async def _record(self, namespace: str, job: str, uid: str, name: str, event: Event) -> None:
        now = self.clock()
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
            await self.cluster.create_event(_body(namespace, job, uid, name, event, self.instance, now))
        seen[name] = _Seen(1, now)

    def _may_post(self, uid: str, now: datetime) -> bool:
        posted = self._posted.setdefault(uid, deque())
        while posted and now - posted[0] > timedelta(hours=1):
            posted.popleft()
        if len(posted) >= PER_HOUR:
            return False
        posted.append(now)
        return True


def _body(namespace: str, job: str, uid: str, name: str, event: Event, instance: str, now: datetime) -> dict[str, Any]:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "eventTime": _micro(now),
        "reportingController": REPORTER,
        "reportingInstance": instance[:128],
        "action": "Reconcile",
        "reason": event.reason,
        "note": event.message[:MAX_NOTE],
        "type": "Warning" if event.warning else "Normal",
        "regarding": {"apiVersion": API_VERSION, "kind": KIND, "name": job, "namespace": namespace, "uid": uid},
    }


def _micro(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
