"""The controller of Teachers: it observes a Teacher, plans, does the effects, writes the status, and wakes its jobs."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from distill_api.base import API_VERSION
from distill_api.job import InvalidManifest, Metadata
from distill_api.status import Reason
from distill_api.teacher.kind import KIND, Teacher, TeacherStatus, parse_teacher
from distill_operator.kinds import Kind
from distill_operator.kueue import admission, workload
from distill_operator.kueue.observer import QueueObserver
from distill_operator.model import reading
from distill_operator.model.conditions import FALSE, ConditionValue
from distill_operator.model.observed import Observed, ObservedTeacher
from distill_operator.model.pod_owners import servers_of
from distill_operator.model.status import read_status, status_patch
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.effects import Apply, CreateSecret, Delete, Effect, Event, PatchStatus
from distill_operator.runtime.errors import ApiError, Conflict, NamespaceEnding, QuotaExceeded, Refused
from distill_operator.runtime.events import EventRecorder
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import Retry
from distill_operator.settings import Settings
from distill_operator.teacher.plan import TeacherPlan, plan_teacher, refused
from distill_operator.teacher.teacher_registry import TeacherRegistry, TeacherSnapshot
from distill_operator.teacher.view import view

logger = logging.getLogger(__name__)
REQUESTS_SECONDS = 10.0
"""Between two reconciles of a Teacher that jobs learn from: their progress tells how many requests they have for it."""


class Learners(Protocol):
    """The jobs that learn from Teachers."""

    def of_teacher(self, teacher: Key) -> list[Key]:
        """Return the jobs that name a Teacher, running or not."""

    def requests_of(self, teacher: Key) -> list[int]:
        """Return for each running job how many requests to a Teacher wait or are under way."""


async def observed_teacher(cache: Cache, key: Key) -> ObservedTeacher | None:
    """Return a Teacher with its pods; None if it does not exist."""
    raw = cache.owner(key)
    if raw is None:
        return None
    pods = servers_of(await cache.pods(key, live=False), raw["metadata"]["uid"])
    deleting = "deletionTimestamp" in raw["metadata"]
    return ObservedTeacher(raw["metadata"]["name"], deleting, read_status(raw, TeacherStatus), pods)


@dataclass
class TeacherController:
    """Brings one Teacher after another to where its spec wants it."""

    cache: Cache
    settings: Settings
    events: EventRecorder
    jobs: Learners
    teachers: TeacherRegistry
    wake: Callable[[Key], None]
    """Has a job reconciled."""
    clock: Callable[[], datetime]

    def __post_init__(self) -> None:
        self._queues = QueueObserver(self.cache, self.settings, self.clock)

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile one Teacher. Return the seconds until time alone changes something.

        Raises Retry at a conflict, and ApiError; one that concerns the Workload alone, after the status is written.
        """
        raw = self.cache.owner(key)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # The garbage collector takes the children, by their owner references.
            self._forget(key)
            return None
        status, meta = read_status(raw, TeacherStatus), _metadata(raw)
        observed = await self._observe(key, raw)
        decided = self._decide(key, raw, status, observed)
        failed: ApiError | None = None
        for effect in decided.effects:
            try:
                await self._do(key, meta, effect)
            except NamespaceEnding:
                return None
            except ApiError as error:
                if admission.may_fail(effect, error):
                    failed = error
                    continue
                if not isinstance(error, Refused | QuotaExceeded):
                    raise
                over = isinstance(error, QuotaExceeded)
                reason = Reason.QUOTA_EXCEEDED if over else Reason.INVALID_SPEC
                text = error.message if over else f"the API server refused it: {error.message}"
                decided = refused(meta, status, observed, ConditionValue(FALSE, reason, text), self.clock())
                for event in decided.effects:
                    await self._do(key, meta, event)
                break
        if (patch := status_patch(raw, decided.status)) is not None:
            await self._checked(self.cache.patch_status(key, patch))
        seen_by_jobs = view(meta.name, ObservedTeacher(meta.name, status=decided.status, pods=observed.pods))
        if self.teachers.put(key, TeacherSnapshot(meta.uid, decided.status, seen_by_jobs), decided.scaled):
            self._wake_jobs(key)
        if failed is not None:
            raise failed
        return decided.requeue_after

    def _decide(self, key: Key, raw: Mapping[str, Any], status: TeacherStatus, observed: Observed) -> TeacherPlan:
        try:
            teacher = parse_teacher({"apiVersion": API_VERSION, "kind": KIND, **raw})
        except InvalidManifest as error:
            condition = ConditionValue(FALSE, Reason.INVALID_SPEC, "; ".join(error.problems))
            return refused(_metadata(raw), status, observed, condition, self.clock())
        requests = self.jobs.requests_of(key)
        decided = plan_teacher(teacher, status, observed, requests, self.settings, self.clock())
        if not requests:
            return decided
        return replace(decided, requeue_after=min(REQUESTS_SECONDS, decided.requeue_after or REQUESTS_SECONDS))

    async def _observe(self, key: Key, raw: Mapping[str, Any]) -> Observed:
        uid = raw["metadata"]["uid"]
        children = tuple(reading.read_child(child, uid) for child in await self.cache.children(key, uid))
        seen = Observed(children=children, pods=servers_of(await self.cache.pods(key, live=False), uid))
        teacher = self._parsed(raw)
        if teacher is None:
            return seen
        own = seen.child(Kind.WORKLOAD, workload.name_of(teacher))
        return replace(seen, queueing=await self._queues.observe(teacher, own))

    @staticmethod
    def _parsed(raw: Mapping[str, Any]) -> Teacher | None:
        try:
            return parse_teacher({"apiVersion": API_VERSION, "kind": KIND, **raw})
        except InvalidManifest:
            return None

    async def _do(self, key: Key, meta: Metadata, effect: Effect) -> None:
        match effect:
            case Apply(body):
                logger.info("%s: apply %s %s", key, body["kind"], body["metadata"]["name"])
                await self._checked(self.cache.apply(body))
            case CreateSecret(body, entry):
                await self.cache.create_secret(body, entry)
            case PatchStatus(kind, name, patch):
                await self._checked(self.cache.patch_status(key, patch, (kind, name)))
            case Delete(kind, name, uid):
                await self.cache.delete(kind, key.namespace, name, uid)
            case Event():
                await self.events.record(key, meta.uid, effect)

    def _forget(self, key: Key) -> None:
        self.cache.forget(key)
        if uid := self.teachers.remove(key):
            self.events.forget(uid)
            self._queues.forget(uid)
            self._wake_jobs(key)

    def _wake_jobs(self, key: Key) -> None:
        for job in self.jobs.of_teacher(key):
            self.wake(job)

    @staticmethod
    async def _checked(work: Any) -> None:
        try:
            await work
        except Conflict:
            raise Retry from None


def _metadata(raw: Mapping[str, Any]) -> Metadata:
    """Return the metadata, which the API server itself writes, whatever the rest is like."""
    meta = raw["metadata"]
    return Metadata.model_construct(
        name=meta["name"], namespace=meta["namespace"], uid=meta["uid"], generation=meta.get("generation", 0)
    )
