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
from distill_api.names import Role
from distill_api.spec.job_spec import Spec
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob import lifecycle
from distill_operator.distillationjob.child_writer import ChildWriter
from distill_operator.distillationjob.failure import trainer_deleted
from distill_operator.distillationjob.job_registry import JobRegistry
from distill_operator.distillationjob.plan import Plan, invalid, over_quota, plan, refused
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind
from distill_operator.model import conditions, reading
from distill_operator.model.observed import Claim, Observed, ObservedTeacher, Outcome, Pod
from distill_operator.model.pod_owners import earlier_trainers, pods_of
from distill_operator.model.status import read_status, status_patch
from distill_operator.resources import pod_group
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.effects import Apply, Check, CreateSecret, Delete, Effect, Event
from distill_operator.runtime.errors import ApiError, Conflict, NamespaceEnding, NotServed, QuotaExceeded, Refused
from distill_operator.runtime.events import EventRecorder
from distill_operator.runtime.ownership import Key
from distill_operator.runtime.work_queue import Retry
from distill_operator.settings import Settings
from distill_operator.teacher.controller import observed_teacher

logger = logging.getLogger(__name__)
Json = dict[str, Any]

HOLD = timedelta(seconds=2)
"""A change of status that is no transition is written when it is this old: most are followed by another."""
HOLD_STARTING = timedelta(seconds=5)
"""The same while one pod after the other gets ready, and nothing is wrong that an Event announces."""
HELD_PER_SECOND = 10
"""When more jobs than that many a second have such a change to be written, each waits longer."""
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
    _settled: dict[Key, int] = field(default_factory=dict)
    """Fingerprint of the children that a plan found as they should be, until it finds otherwise."""

    def __post_init__(self) -> None:
        self._writer = ChildWriter(self.cache)

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile one job. Return the seconds until time alone changes something. Raises Retry at a conflict."""
        raw = self.cache.owner(key)
        if raw is None or "deletionTimestamp" in raw["metadata"]:
            # The garbage collector takes the children, by their owner references.
            self._forget(key)
            return None
        if managed_by(raw) != OURS:
            # Not even an Event, or a metric: another controller reports on it.
            self._forget(key)
            return None
        status = read_status(raw, Status)
        decided, observed = await self._decide(key, raw, status)
        for effect in decided.effects:
            try:
                await self._do(key, raw, effect)
            except Conflict:
                raise Retry from None
            except NamespaceEnding:
                logger.info("%s: its namespace is being deleted", key)
                return None
            except (Refused, QuotaExceeded) as error:
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
        return min((s for s in (held, decided.requeue_after) if s is not None), default=None)

    async def _decide(self, key: Key, raw: Json, status: Status) -> tuple[Plan, Observed]:
        meta = raw["metadata"]
        try:
            job = _parse(raw)
        except InvalidManifest as error:
            found = invalid(meta["uid"], status, error.problems, meta.get("generation", 0), self.clock())
            return found, Observed()
        observed = await self._observe(key, job, status)
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
        if isinstance(error, QuotaExceeded) and not isinstance(effect, Delete | Event):
            # With a check that failed, no attempt has begun.
            known = status if isinstance(effect, Check) else decided.status
            return over_quota(job, known, observed, effect.body, error.message, self.clock())
        return refused(job, status, f"the API server refused it: {error.message}", self.clock())

    async def _observe(self, key: Key, job: DistillationJob, status: Status) -> Observed:
        uid = job.metadata.uid
        groups, gang_problem = await self._pod_groups(key.namespace, job)
        raws = [*groups, *await self.cache.children(key, uid)]
        children = tuple(reading.read_child(raw, uid) for raw in raws)
        known = await self.cache.pods(key, live=False)
        seen = Observed(children=children, pods=pods_of(known, uid, children))
        if _under_way(job, status) and trainer_deleted(job, status, seen, status.attempts):
            # Before an attempt is given up for it, the API server has the last word.
            name = names.trainer_job(key.name, status.attempts)
            found = await self.cache.cluster.list(Kind.JOB, key.namespace, name=name)
            others = (c for c in children if (c.kind, c.name) != (Kind.JOB, name))
            children = (*others, *(reading.read_child(raw, uid) for raw in found))
        # Where a transition depends on them, the pods are read from the API server: one that has ended tells why its
        # Job has, and one that still runs must have ended before the next attempt begins.
        ended = any(c.kind is Kind.JOB and c.ours and c.outcome is not Outcome.ACTIVE for c in children)
        between = status.next_attempt_time is not None
        suspending = conditions.reason_of(status, ConditionType.SUSPENDED) == Reason.SUSPENDING
        # One group waits for no other pods, whose news would tell of older ones.
        first = not status.attempts and job.spec.scheduling.all_at_once
        live = not conditions.is_finished(status) and (ended or between or suspending or first)
        found_pods = await self.cache.pods(key, live=True) if live else known
        pods = pods_of(found_pods, uid, children)
        return Observed(
            children=children,
            pods=pods,
            earlier_trainers=earlier_trainers(found_pods, uid, children),
            claim=await self._claim(key.namespace, job, status),
            kuberay_installed=await self.cache.serves(Kind.RAY_CLUSTER),
            gang_problem=gang_problem,
            report=self._report(key, pods),
            teachers=await self._teachers(key.namespace, job),
            unwatched=self.cache.unwatched or pod_group.dialect(job) is not None,
        )

    async def _teachers(self, namespace: str, job: DistillationJob) -> tuple[ObservedTeacher, ...]:
        """Return the Teachers that the job names, as their own statuses have them."""
        found = []
        for name in job.spec.shared_teachers:
            if teacher := await observed_teacher(self.cache, Key(Kind.TEACHER, namespace, name)):
                found.append(teacher)
        return tuple(found)

    async def _pod_groups(self, namespace: str, job: DistillationJob) -> tuple[list[Json], str]:
        """Return the job's group of pods, and why there can be none. Nothing is requested for a job without a gang."""
        dialect = pod_group.dialect(job)
        if dialect is None:
            return [], ""
        name = job.spec.scheduling.gang.value
        try:
            return await self.cache.cluster.list(dialect.kind, namespace, name=names.pod_group(job.metadata.name)), ""
        except NotServed:
            kind = f"{dialect.kind.value.kind} ({dialect.kind.value.api_version})"
            return [], f"the API server knows no {kind}; install {name}, and the job starts by itself"
        except ApiError as error:
            if error.status != 403:
                raise
            return [], f"the operator may not use the groups of {name}; its Role lacks them: {error.message}"

    async def _claim(self, namespace: str, job: DistillationJob, status: Status) -> Claim:
        """Return the state of the output volume's claim, which is read only where an attempt may begin."""
        begins = not status.attempts or status.next_attempt_time is not None
        if job.spec.output.volume is None or not begins:
            return Claim.ABSENT
        claim = await self.cache.claim(namespace, job.spec.output.volume.claim_name)
        storage_class = None
        if claim is not None and claim.get("status", {}).get("phase") != "Bound":
            class_name = claim.get("spec", {}).get("storageClassName")
            # A claim without a class waits for a volume made by hand, or for a default class.
            storage_class = await self.cache.storage_class(class_name) if class_name else {}
        return reading.read_claim(claim, storage_class)

    def _report(self, key: Key, pods: tuple[Pod, ...]) -> Any:
        """Return what rank 0 of the newest attempt reported last."""
        ranks = [p for p in pods if p.role is Role.TRAINER and p.index == 0]
        if not ranks:
            self.progress.pause(key)
            return None
        newest = max(ranks, key=lambda p: (p.attempt, not p.deleting, p.running))
        if newest.running and newest.ip:
            self.progress.follow(key, newest.uid, newest.ip)
        else:
            self.progress.pause(key)
        # The termination message of a trainer holds its last numbers: no poll has to be in time for them.
        ended = reading.exit_report(newest.exit_message) if newest.exit_message else None
        report = ended.final if ended and ended.final else self.progress.latest(key, newest.uid)
        return reading.usable(report) if report else None

    async def _do(self, key: Key, raw: Mapping[str, Any], effect: Effect) -> None:
        uid = raw["metadata"]["uid"]
        match effect:
            case Check(body):
                await self.cache.check(body)
            case Apply(body):
                await self._writer.apply(key, body)
            case CreateSecret(body, entry):
                await self.cache.create_secret(body, entry)
            case Delete(kind, name, child_uid):
                logger.info("%s: delete %s %s", key, kind.value.kind, name)
                await self.cache.delete(kind, key.namespace, name, child_uid)
            case Event():
                await self.events.record(key, uid, effect)

    async def _write(self, key: Key, raw: Json, before: Status, after: Status, *, announced: bool) -> float | None:
        """Write the status, or return in how many seconds to. `announced` says that an Event tells of the change."""
        patch = status_patch(raw, after)
        if patch is None:
            self._held.pop(key, None)
            return None
        since, hold = self._held.setdefault(key, self.clock()), HOLD
        if not announced and conditions.reason_of(after, ConditionType.SUCCEEDED) == Reason.STARTING:
            hold = max(HOLD_STARTING, timedelta(seconds=len(self._held) / HELD_PER_SECOND))
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
        self._writer.forget(key)
        uid = self.jobs.remove(key)
        self.progress.forget(key)
        if uid:
            self.events.forget(uid)


def _under_way(job: DistillationJob, status: Status) -> bool:
    """Return whether an attempt has begun, and nothing has ended it."""
    stopped = status.next_attempt_time is not None or conditions.is_finished(status) or lifecycle.is_suspended(status)
    return status.attempts > 0 and not stopped and not job.spec.suspend


def _fingerprint(job: DistillationJob, status: Status, observed: Observed) -> int:
    """Return what stays the same while what Plan.settled rests on does: spec, attempt, and the children's content."""
    children = [
        (c.kind, c.name, c.uid, c.version, c.spec_hash, c.fixed_hash, c.ours, c.deleting) for c in observed.children
    ]
    meta = job.metadata
    return hash((meta.uid, meta.generation, status.attempts, observed.kuberay_installed, frozenset(children)))
