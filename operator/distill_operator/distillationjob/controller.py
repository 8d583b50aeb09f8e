"""The controller of DistillationJobs: it observes a job, plans, does the effects in order, and writes the status once.

What it observes is what the watches and its own writes have shown (cache.py). It may be old: a missed or late event
costs time and nothing else.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from distill_api import names
from distill_api.base import API_VERSION, KIND
from distill_api.job import DistillationJob, InvalidManifest, parse_job
from distill_api.spec.job_spec import Spec
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob.child_writer import ChildWriter
from distill_operator.distillationjob.job_observer import JobObserver
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.distillationjob.plan import Plan, invalid, over_quota, plan, refused
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind, kind_of
from distill_operator.kueue import admission
from distill_operator.kueue.observer import QueueObserver
from distill_operator.model import conditions
from distill_operator.model.observed import Observed
from distill_operator.model.status import read_status, status_patch
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.effects import Apply, Check, CreateSecret, Delete, Effect, Event, PatchStatus
from distill_operator.runtime.errors import ApiError, Conflict, NamespaceEnding, QuotaExceeded, Refused
from distill_operator.runtime.events import EventRecorder
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import Retry
from distill_operator.settings import Settings

logger = logging.getLogger(__name__)
Json = dict[str, Any]

HOLD = timedelta(seconds=2)
"""A change of status that is no transition is written when it is this old: most are followed by another."""
HOLD_STARTING = timedelta(seconds=5)
"""The same while one pod after the other gets ready, and nothing is wrong that an Event announces."""
HELD_PER_SECOND = 10
"""When more jobs than that many a second have such a change to be written, each waits longer."""
TELEMETRY_PER_SECOND = 5
"""Writes a second, of all jobs together, that only tell of the training's progress, which changes with each step."""
OURS = Spec.model_fields["managed_by"].default
"""spec.managedBy of the jobs that this operator reconciles."""


def managed_by(raw: Mapping[str, Any]) -> str:
    """Return which controller reconciles a job. Read from the raw object, as an invalid job may be another's too."""
    return str(raw.get("spec", {}).get("managedBy", OURS))


def _parse(raw: Json) -> DistillationJob:
    return parse_job({"apiVersion": API_VERSION, "kind": KIND, **raw})


@dataclass
class JobController:
    """Brings one job after another to where its spec wants it."""

    cache: Cache
    settings: Settings
    events: EventRecorder
    progress: ProgressPoller
    jobs: JobRegistry
    clock: Callable[[], datetime]
    _held: dict[Key, datetime] = field(default_factory=dict)
    """Jobs whose status differs from what is written, and since when."""
    _trainer_jobs: dict[Key, tuple[str, str, str]] = field(default_factory=dict)
    """Uid of the owner, name and uid of the trainer Job that was applied last."""
    _settled: dict[Key, int] = field(default_factory=dict)
    """Fingerprint of the children that a plan found as they should be, until it finds otherwise."""

    def __post_init__(self) -> None:
        self._writer = ChildWriter(self.cache)
        self._queues = QueueObserver(self.cache, self.settings, self.clock)
        self._observer = JobObserver(self.cache, self.progress, self._queues, self.clock)

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile one job. Return the seconds until time alone changes something.

        Raises Retry at a conflict, and ApiError; one that concerns the Workload alone, after the status is written.
        """
        raw = self.cache.owner(key)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # The garbage collector takes the children, by their owner references.
            self._forget(key)
            return None
        if managed_by(raw) != OURS:
            # Not even an Event, or a metric: another controller reports on it.
            self._forget(key)
            return None
        status = self._with_trainer_job(key, raw, read_status(raw, Status))
        decided, observed = await self._decide(key, raw, status)
        failed: ApiError | None = None
        for effect in decided.effects:
            try:
                await self._do(key, raw, effect)
            except Conflict:
                raise Retry from None
            except NamespaceEnding:
                logger.info("%s: its namespace is being deleted", key)
                return None
            except ApiError as error:
                if admission.may_fail(effect, error):
                    failed = error
                    continue
                if not isinstance(error, Refused | QuotaExceeded):
                    raise
                decided = self._denied(raw, status, decided, observed, effect, error)
                for event in decided.effects:
                    await self._do(key, raw, event)
                break
        if self.cache.owner(key) is None:
            # Deleted by ourselves (ttlSecondsAfterFinished), of which no watch tells anything new.
            self._forget(key)
            return None
        announced = any(isinstance(effect, Event) for effect in decided.effects)
        held = await self._write(key, raw, status, decided.status, announced=announced)
        self.jobs.put(key, raw, decided.status, self.clock())
        if failed is not None:
            raise failed
        return min((s for s in (held, decided.requeue_after) if s is not None), default=None)

    def _with_trainer_job(self, key: Key, raw: Json, status: Status) -> Status:
        """Return the status with the uid of the attempt's trainer Job, if this process made it: somebody may have
        deleted it before it was observed."""
        owner, name, uid = self._trainer_jobs.get(key, ("", "", ""))
        current = (raw["metadata"]["uid"], names.trainer_job(key.name, status.attempts))
        if status.trainer_job_uid or status.next_attempt_time or (owner, name) != current:
            return status
        return status.model_copy(update={"trainer_job_uid": uid})

    async def _decide(self, key: Key, raw: Json, status: Status) -> tuple[Plan, Observed]:
        meta = raw["metadata"]
        try:
            job = _parse(raw)
        except InvalidManifest as error:
            found = invalid(meta["uid"], status, error.problems, meta.get("generation", 0), self.clock())
            return found, Observed()
        observed = await self._observer.observe(key, job, status)
        fingerprint = _fingerprint(job, status, observed)
        observed = replace(observed, settled=self._settled.get(key) == fingerprint)
        decided = plan(job, status, observed, self.settings, self.clock())
        if decided.settled:
            self._settled[key] = fingerprint
        else:
            self._settled.pop(key, None)
        return decided, observed

    def _denied(
        self,
        raw: Json,
        status: Status,
        decided: Plan,
        observed: Observed,
        effect: Effect,
        error: Refused | QuotaExceeded,
    ) -> Plan:
        """Return the plan instead of the one that was decided, as the API server forbids a part of that."""
        job = _parse(raw)
        if isinstance(error, QuotaExceeded) and not isinstance(effect, Delete | PatchStatus | Event):
            # With a check that failed, no attempt has begun.
            known = status if isinstance(effect, Check) else decided.status
            return over_quota(job, known, observed, effect.body, error.message, self.clock())
        return refused(job, status, f"the API server refused it: {error.message}", self.clock())

    async def _do(self, key: Key, raw: Mapping[str, Any], effect: Effect) -> None:
        uid = raw["metadata"]["uid"]
        match effect:
            case Check(body):
                await self.cache.check(body)
            case Apply(body):
                await self._writer.apply(key, body)
                if kind_of(body) is Kind.JOB:
                    name = body["metadata"]["name"]
                    self._trainer_jobs[key] = uid, name, self.cache.store.uid(Kind.JOB, key.namespace, name)
            case CreateSecret(body, entry):
                await self.cache.create_secret(body, entry)
            case Delete(kind, name, child_uid):
                logger.info("%s: delete %s %s", key, kind.value.kind, name)
                await self.cache.delete(kind, key.namespace, name, child_uid)
            case PatchStatus(kind, name, patch):
                logger.info("%s: write the status of %s %s", key, kind.value.kind, name)
                await self.cache.patch_status(key, patch, (kind, name))
            case Event():
                await self.events.record(key, uid, effect)

    async def _write(self, key: Key, raw: Json, before: Status, after: Status, *, announced: bool) -> float | None:
        """Write the status, or return in how many seconds to. `announced` says that an Event tells of the change."""
        patch = status_patch(raw, after)
        if patch is None or _only_requests(patch["status"]):
            self._held.pop(key, None)
            return None
        since, hold = self._held.setdefault(key, self.clock()), HOLD
        if not announced and conditions.reason_of(after, ConditionType.SUCCEEDED) == Reason.STARTING:
            hold = max(HOLD_STARTING, timedelta(seconds=len(self._held) / HELD_PER_SECOND))
        elif not announced and patch["status"].keys() == {"progress"}:
            hold = max(HOLD, timedelta(seconds=len(self._held) / TELEMETRY_PER_SECOND))
        left = since + hold - self.clock()
        if not conditions.is_transition(before, after) and left > timedelta():
            return left.total_seconds()
        try:
            await self.cache.patch_status(key, patch)
        except Conflict:
            raise Retry from None
        del self._held[key]
        return None

    def _forget(self, key: Key) -> None:
        self.cache.forget(key)
        self._held.pop(key, None)
        self._settled.pop(key, None)
        self._trainer_jobs.pop(key, None)
        self._writer.forget(key)
        uid = self.jobs.remove(key)
        self.progress.forget(key)
        if uid:
            self.events.forget(uid)
            self._queues.forget(uid)


def _only_requests(change: Json) -> bool:
    """Return whether only the requests to teachers differ, which they do at each poll: autoscaling reads memory."""
    return change.keys() == {"progress"} and (change["progress"] or {}).keys() == {"teachers"}


def _fingerprint(job: DistillationJob, status: Status, observed: Observed) -> int:
    """Return what stays the same while what Plan.settled rests on does: spec, attempt, and the children's content."""
    children = [
        (c.kind, c.name, c.uid, c.version, c.spec_hash, c.fixed_hash, c.ours, c.deleting) for c in observed.children
    ]
    meta = job.metadata
    return hash((meta.uid, meta.generation, status.attempts, observed.kuberay_installed, frozenset(children)))
