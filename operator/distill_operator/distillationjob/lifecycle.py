"""The transitions of a job, as changes of its status.

Each transition is written to the status before anything is done about it, so a crash in between loses nothing: the
next reconcile finds it recorded, and does what belongs to it. A transition that was decided on an old status is
refused by its resourceVersion. That is why a failed attempt is counted once, and an attempt's number is never used
again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.protocol import ProgressReport
from distill_api.status import Condition, ConditionType, Progress, Reason, Result, RoleStatus, Status
from distill_operator.distillationjob.failure import Failure
from distill_operator.distillationjob.readiness import RoleState, at_fault
from distill_operator.model import conditions, publication
from distill_operator.model.conditions import FALSE, ROLE_CONDITIONS, TRUE, UNKNOWN, ConditionValue
from distill_operator.model.observed import Disruption, Observed
from distill_operator.model.queueing import Suspension
from distill_operator.model.times import format_time, parse_time, seconds_since

FIRST_DELAY_SECONDS = 10.0
LONGEST_DELAY_SECONDS = 300.0
JITTER = 0.2
UNDISTURBED_SECONDS = 3600.0
"""After an attempt that lasted so long, the delay of one that does not count begins anew: spot nodes come and go."""

NOT_STALLED = ConditionValue(FALSE, Reason.PROGRESSING)
NOT_SUSPENDED = ConditionValue(FALSE, Reason.PROGRESSING, "spec.suspend is false")
PREFLIGHT_AHEAD = ConditionValue(UNKNOWN, Reason.PENDING, "the trainer checks before its first step")
VALID = ConditionValue(TRUE, Reason.VALID)


def revised(
    job: DistillationJob, status: Status, now: datetime, values: Mapping[ConditionType, ConditionValue], **changes: Any
) -> Status:
    """Return the status with these conditions and fields instead of its own."""
    generation = job.metadata.generation
    found = conditions.merged(status.conditions, {ConditionType.SPEC_VALID: VALID, **values}, generation, now)
    return status.model_copy(update={"observed_generation": generation, "conditions": found, **changes})


def current_attempt(status: Status, observed: Observed) -> int:
    """Return the number of the current attempt; 0 before the first.

    The trainer Jobs tell it as well, should a status be lost.
    """
    return max([status.attempts, *(c.attempt for c in observed.trainer_jobs())])


def delay_seconds(uid: str, attempt: int, restarts: int) -> float:
    """Return the delay after an attempt that failed as the n-th: doubled each time, and spread by the job's uid.

    `restarts` counts failures that count against backoffLimit, or those in a row that do not, apart from each other.

    The spread is the same whoever computes it, and differs between jobs that failed together, and between attempts.
    """
    delay = min(FIRST_DELAY_SECONDS * 2.0 ** min(max(restarts, 1) - 1, 20), LONGEST_DELAY_SECONDS)
    digest = hashlib.sha256(f"{uid}/{attempt}".encode()).digest()
    return delay * (1 + JITTER * int.from_bytes(digest[:4]) / 2**32)


def with_roles(job: DistillationJob, status: Status, states: list[RoleState], now: datetime) -> Status:
    """Return the status with the conditions and counts of the roles."""
    values = {ROLE_CONDITIONS[s.role]: s.condition for s in states}
    not_ready = at_fault(states)
    values[ConditionType.READY] = (
        ConditionValue(FALSE, not_ready.condition.reason, f"{not_ready.role.value}: {not_ready.condition.message}")
        if not_ready
        else ConditionValue(TRUE, Reason.READY, "all roles are ready")
    )
    counts = [
        RoleStatus(
            name=s.role.value,
            desired=s.desired,
            ready=s.ready,
            reason="" if s.condition.status is TRUE else s.condition.reason.value,
            disruption=lasting.message[:512] if (lasting := _lasting_disruption(s, status)) else None,
            disruption_time=format_time(lasting.time) if lasting else None,
        )
        for s in states
    ]
    return revised(job, status, now, values, roles=counts)


def _lasting_disruption(state: RoleState, status: Status) -> Disruption | None:
    """Return the newest disruption of the attempt's pods, until the role is whole and a step has ended after it."""
    found = state.disruption
    before = next((r for r in status.roles if r.name == state.role.value), None)
    if before and before.disruption and (time := parse_time(before.disruption_time)):
        recorded = Disruption(time, before.disruption)
        found = recorded if found is None else max(found, recorded, key=lambda d: d.time)
    began = parse_time(status.attempt_start_time)
    if found is None or began is None or found.time < began:
        return None
    last_step = parse_time(status.progress.last_step_time) if status.progress else None
    over = state.condition.status is TRUE and last_step is not None and last_step > found.time
    return None if over else found


def begun(job: DistillationJob, status: Status, attempt: int, now: datetime) -> Status:
    """Return the status of a job whose attempt begins."""
    # What the last attempt's trainer had for its teachers to do is done by nobody now.
    progress = status.progress and status.progress.model_copy(update={"teachers": []})
    return revised(
        job,
        status,
        now,
        {
            ConditionType.SUCCEEDED: ConditionValue(UNKNOWN, Reason.STARTING, f"attempt {attempt} has begun"),
            ConditionType.SUSPENDED: NOT_SUSPENDED,
            ConditionType.PREFLIGHT: PREFLIGHT_AHEAD,
            ConditionType.STALLED: NOT_STALLED,
            **publication.published(job, status, None),
        },
        attempts=attempt,
        trainer_job_uid=None,
        next_attempt_time=None,
        progress=progress,
        start_time=status.start_time or format_time(now),
        attempt_start_time=format_time(now),
    )


def failed(job: DistillationJob, status: Status, attempt: int, failure: Failure, now: datetime) -> Status:
    """Return the status after an attempt that failed: the next one after a delay, or the end."""
    if not failure.retry:
        return _ended_by(job, status, failure, failure.message, status.restarts, now)
    restarts = status.restarts + failure.counts
    limit = job.spec.backoff_limit
    if failure.counts and restarts > limit:
        text = f"attempt {attempt} failed, and backoffLimit {limit} allows no more: {failure.message}"
        return _ended_by(job, status, failure, text, restarts, now)
    disruptions = _disruptions(status, failure, now)
    delay = timedelta(seconds=delay_seconds(job.metadata.uid, attempt, restarts if failure.counts else disruptions))
    counted = f"{restarts} of {limit} allowed" if failure.counts else f"not counted, as {failure.uncounted}"
    text = f"attempt {attempt} failed ({counted}): {failure.message}"
    down = ConditionValue(FALSE, Reason.NOT_READY, "stopped until the next attempt")
    return revised(
        job,
        status,
        now,
        {
            ConditionType.SUCCEEDED: ConditionValue(UNKNOWN, Reason.RESTARTING, text),
            ConditionType.READY: down,
            ConditionType.TEACHER_READY: down,
            ConditionType.ROLLOUT_READY: down,
            ConditionType.TRAINER_READY: ConditionValue(FALSE, failure.trainer, failure.message),
            ConditionType.STALLED: NOT_STALLED,
        },
        attempts=attempt,
        restarts=restarts,
        disruptions=disruptions,
        next_attempt_time=format_time(now + delay),
        roles=_released(Reason.NOT_READY),
    )


def _disruptions(status: Status, failure: Failure, now: datetime) -> int:
    """Return how many attempts in a row have now ended soon and for no fault of the job."""
    if failure.counts:
        return 0
    return 1 if seconds_since(status.attempt_start_time, now) > UNDISTURBED_SECONDS else status.disruptions + 1


def succeeded(job: DistillationJob, status: Status, report: ProgressReport | None, now: datetime) -> Status:
    """Return the status of a job whose trainer has completed; `report` is its last, if any was received."""
    progress = report.progress if report else status.progress
    steps = job.spec.schedule.steps
    result = report.result if report and report.result else None
    status = revised(job, status, now, publication.published(job, status, report, complete=True))
    text = f"{steps} steps are done"
    if result and result.stopped_by:
        text = f"guard {result.stopped_by} ended the run before its {steps} steps; step {result.step} is exported"
    return _finished(
        job,
        status,
        ConditionValue(TRUE, Reason.COMPLETED, text),
        now,
        progress=progress or status.progress or Progress(step=steps, total_steps=steps, percent=100),
        result=result or Result(model_path=model_path(job), step=steps),
    )


def past_deadline(job: DistillationJob, status: Status, now: datetime) -> Status:
    """Return the status of a job that ends because activeDeadlineSeconds have passed."""
    text = f"the job was active for more than {job.spec.active_deadline_seconds} s (activeDeadlineSeconds)"
    return _finished(job, status, ConditionValue(FALSE, Reason.DEADLINE_EXCEEDED, text), now)


def is_suspended(status: Status) -> bool:
    """Return whether the suspension of the job is recorded, be its pods gone or not."""
    return conditions.reason_of(status, ConditionType.SUSPENDED) in (Reason.SUSPENDED, Reason.SUSPENDING)


def suspended(job: DistillationJob, status: Status, now: datetime, why: Suspension, *, released: bool) -> Status:
    """Return the status of a job that is suspended; `released` says that no pod of it is left."""
    condition = ConditionValue(FALSE, Reason.SUSPENDED, why.message)
    suspending = ConditionValue(FALSE, Reason.SUSPENDING, why.releasing)
    return revised(
        job,
        status,
        now,
        {
            ConditionType.SUCCEEDED: ConditionValue(UNKNOWN, why.reason, why.message),
            ConditionType.SUSPENDED: ConditionValue(TRUE, Reason.SUSPENDED, why.message) if released else suspending,
            ConditionType.READY: condition,
            **{c: condition for c in ROLE_CONDITIONS.values()},
            ConditionType.STALLED: NOT_STALLED,
            **_preflight_unless_known(status),
        },
        next_attempt_time=None,
        roles=_released(Reason.SUSPENDED),
    )


def resumed(job: DistillationJob, status: Status, now: datetime) -> Status:
    """Return the status of a job that is resumed: the next attempt is due once what the last one left is gone."""
    since = conditions.find(status, ConditionType.SUSPENDED)
    # While its pods end, a job is active.
    suspended = since is not None and since.status is TRUE and status.start_time
    away = int(seconds_since(since.last_transition_time, now)) if since and suspended else 0
    resuming = ConditionValue(FALSE, Reason.NOT_READY, "resumed: it starts with the next attempt")
    return revised(
        job,
        status,
        now,
        {
            ConditionType.SUCCEEDED: ConditionValue(UNKNOWN, Reason.PENDING, "resumed"),
            ConditionType.SUSPENDED: NOT_SUSPENDED,
            ConditionType.READY: resuming,
            **{c: resuming for c in ROLE_CONDITIONS.values()},
        },
        suspended_seconds=status.suspended_seconds + max(0, away),
        next_attempt_time=format_time(now) if status.attempts else None,
        roles=_released(Reason.NOT_READY),
    )


def model_path(job: DistillationJob) -> str:
    """Return where on the output volume the exported model is."""
    return f"{job.spec.output.path.rstrip('/')}/{job.metadata.name}/model"


def _ended_by(
    job: DistillationJob, status: Status, failure: Failure, message: str, restarts: int, now: datetime
) -> Status:
    found = _finished(job, status, ConditionValue(FALSE, failure.summary, message), now, restarts=restarts)
    values = {ConditionType.TRAINER_READY: ConditionValue(FALSE, failure.trainer, failure.message)}
    if failure.summary is Reason.PREFLIGHT_FAILED:
        values[ConditionType.PREFLIGHT] = ConditionValue(FALSE, Reason.PREFLIGHT_FAILED, failure.message)
    return revised(job, found, now, values)


def _finished(job: DistillationJob, status: Status, summary: ConditionValue, now: datetime, **changes: Any) -> Status:
    released = ConditionValue(FALSE, Reason.RELEASED_AFTER_FINISH, "the job has finished")
    complete = summary.status is TRUE
    end = ConditionType.COMPLETE if complete else ConditionType.FAILED
    return revised(
        job,
        status,
        now,
        {
            ConditionType.SUCCEEDED: summary,
            end: replace(summary, status=TRUE),
            ConditionType.SUSPENDED: NOT_SUSPENDED,
            # To tools that know no kind of ours (kstatus: Flux, Argo), Ready False is "in progress", for ever.
            ConditionType.READY: summary if complete else released,
            **{c: released for c in ROLE_CONDITIONS.values()},
            ConditionType.STALLED: NOT_STALLED,
            **_preflight_unless_known(status),
        },
        completion_time=format_time(now),
        next_attempt_time=None,
        roles=_released(Reason.RELEASED_AFTER_FINISH),
        **changes,
    )


def _released(reason: Reason) -> list[RoleStatus]:
    return [RoleStatus(name=role.value, desired=0, ready=0, reason=reason.value) for role in Role]


def _preflight_unless_known(status: Status) -> dict[ConditionType, ConditionValue]:
    known: Condition | None = conditions.find(status, ConditionType.PREFLIGHT)
    return {} if known else {ConditionType.PREFLIGHT: PREFLIGHT_AHEAD}
