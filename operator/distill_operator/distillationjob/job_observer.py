"""Observation of a job: what memory knows of it and, where a transition depends on that, what the API server says."""

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob import lifecycle
from distill_operator.distillationjob.failure import trainer_deleted
from distill_operator.distillationjob.progress_poller import ProgressPoller
from distill_operator.kinds import Kind
from distill_operator.kueue import workload
from distill_operator.kueue.observer import QueueObserver
from distill_operator.model import conditions, reading
from distill_operator.model.observed import Child, Claim, Observed, ObservedTeacher, Outcome, Pod, Raw
from distill_operator.model.pod_owners import earlier_trainers, pods_of
from distill_operator.resources import pod_group
from distill_operator.runtime.cache import Cache
from distill_operator.runtime.errors import ApiError, NotServed
from distill_operator.runtime.ownership import Key
from distill_operator.teacher.controller import observed_teacher

logger = logging.getLogger(__name__)
Json = dict[str, Any]

PATIENCE_SECONDS = 5.0
"""For so long the pods of a new trainer Job may be missing without a reason."""


class JobObserver:
    """Observes one job after another."""

    def __init__(
        self, cache: Cache, progress: ProgressPoller, queues: QueueObserver, clock: Callable[[], datetime]
    ) -> None:
        self._cache = cache
        self._queues = queues
        self._progress = progress
        self._clock = clock

    async def observe(self, key: Key, job: DistillationJob, status: Status) -> Observed:
        """Return everything that the plan of a job depends on."""
        uid = job.metadata.uid
        groups, gang_problem = await self._pod_groups(key.namespace, job)
        raws = [*groups, *await self._cache.children(key, uid)]
        children = tuple(reading.read_child(raw, uid) for raw in raws)
        known = await self._cache.pods(key, live=False)
        seen = Observed(children=children, pods=pods_of(known, uid, children))
        if _under_way(job, status):
            children = await self._with_trainer_job(key, job, status, seen)
        # Where a transition depends on them, the pods are read from the API server: one that has ended tells why its
        # Job has, and one that still runs must have ended before the next attempt begins.
        ended = any(c.kind is Kind.JOB and c.ours and c.outcome is not Outcome.ACTIVE for c in children)
        between = status.next_attempt_time is not None
        suspending = conditions.reason_of(status, ConditionType.SUSPENDED) == Reason.SUSPENDING
        # One group waits for no other pods, whose news would tell of older ones.
        first = not status.attempts and job.spec.scheduling.all_at_once
        live = not conditions.is_finished(status) and (ended or between or suspending or first)
        found_pods = await self._cache.pods(key, live=True) if live else known
        pods = pods_of(found_pods, uid, children)
        report, silent = self._report(key, pods)
        return Observed(
            children=children,
            pods=pods,
            earlier_trainers=earlier_trainers(found_pods, uid, children),
            claim=await self._claim(key.namespace, job, status),
            kuberay_installed=await self._cache.serves(Kind.RAY_CLUSTER),
            gang_problem=gang_problem,
            queueing=await self._queues.observe(job, seen.child(Kind.WORKLOAD, workload.name_of(job))),
            report=report,
            trainer_silent=silent,
            teachers=await self._teachers(key.namespace, job),
            unwatched=self._cache.unwatched or pod_group.dialect(job) is not None,
        )

    async def _with_trainer_job(
        self, key: Key, job: DistillationJob, status: Status, seen: Observed
    ) -> tuple[Child, ...]:
        """Return the children, with what the API server says of a trainer Job that is gone, or that lacks pods."""
        name = names.trainer_job(key.name, status.attempts)
        if trainer_deleted(job, status, seen, status.attempts):
            # Before an attempt is given up for it, the API server has the last word.
            found = await self._cache.cluster.list(Kind.JOB, key.namespace, name=name)
            others = (c for c in seen.children if (c.kind, c.name) != (Kind.JOB, name))
            return (*others, *(reading.read_child(raw, job.metadata.uid) for raw in found))
        child = seen.child(Kind.JOB, name)
        if child is None or not seen.lacks_pods(child) or child.made_at is None:
            return seen.children
        if (self._clock() - child.made_at).total_seconds() < PATIENCE_SECONDS:
            return seen.children
        why = replace(child, message=await self._why_no_pods(key.namespace, child.uid))
        return tuple(why if c is child else c for c in seen.children)

    async def _why_no_pods(self, namespace: str, job_uid: str) -> str:
        """Return why the API server refuses pods to a Job; empty where it does not. A Job says so in Events alone."""
        fields = f"regarding.uid={job_uid},reason=FailedCreate"
        try:
            found = await self._cache.cluster.list(Kind.EVENT, namespace, fields=fields)
        except ApiError as error:
            logger.info("Events of a Job were not read: %s", error)
            return ""
        return max(((_time_of(e), e.get("note", "")) for e in found), default=("", ""))[1]

    async def _teachers(self, namespace: str, job: DistillationJob) -> tuple[ObservedTeacher, ...]:
        """Return the Teachers that the job names, as their own statuses have them."""
        found = []
        for name in job.spec.shared_teachers:
            if teacher := await observed_teacher(self._cache, Key(Kind.TEACHER, namespace, name)):
                found.append(teacher)
        return tuple(found)

    async def _pod_groups(self, namespace: str, job: DistillationJob) -> tuple[list[Json], str]:
        """Return the job's group of pods, and why there can be none. Nothing is requested for a job without a gang."""
        dialect = pod_group.dialect(job)
        if dialect is None:
            return [], ""
        name = job.spec.scheduling.gang.value
        try:
            return await self._cache.cluster.list(dialect.kind, namespace, name=names.pod_group(job.metadata.name)), ""
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
        claim = await self._cache.claim(namespace, job.spec.output.volume.claim_name)
        storage_class = None
        if claim is not None and claim.get("status", {}).get("phase") != "Bound":
            class_name = claim.get("spec", {}).get("storageClassName")
            # A claim without a class waits for a volume made by hand, or for a default class.
            storage_class = await self._cache.storage_class(class_name) if class_name else {}
        return reading.read_claim(claim, storage_class)

    def _report(self, key: Key, pods: tuple[Pod, ...]) -> tuple[Any, bool]:
        """Return what rank 0 of the newest attempt reported last, and whether it does not answer."""
        ranks = [p for p in pods if p.role is Role.TRAINER and p.index == 0]
        if not ranks:
            self._progress.pause(key)
            return None, False
        newest = max(ranks, key=lambda p: (p.attempt, not p.deleting, p.running))
        if newest.running and newest.ip:
            self._progress.follow(key, newest.uid, newest.ip)
        else:
            self._progress.pause(key)
        # The termination message of a trainer holds its last numbers: no poll has to be in time for them.
        ended = reading.exit_report(newest.exit_message) if newest.exit_message else None
        report = ended.final if ended and ended.final else self._progress.latest(key, newest.uid)
        return reading.usable(report) if report else None, self._progress.is_silent(key, newest.uid)


def _under_way(job: DistillationJob, status: Status) -> bool:
    """Return whether an attempt has begun, and nothing has ended it."""
    stopped = status.next_attempt_time is not None or conditions.is_finished(status) or lifecycle.is_suspended(status)
    return status.attempts > 0 and not stopped and not job.spec.suspend


def _time_of(event: Raw) -> str:
    """Return when an Event was last seen, in a form that sorts."""
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("deprecatedLastTimestamp") or event.get("eventTime") or "")
