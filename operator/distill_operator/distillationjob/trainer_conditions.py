"""The conditions Preflight, Stalled and Published, which rest on what the trainer of an attempt reports. Pure."""

import math
from datetime import datetime

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.protocol import ProgressReport
from distill_api.status import ConditionType, Progress, Reason, Status
from distill_operator.distillationjob import lifecycle
from distill_operator.distillationjob.failure import restart_seconds_left
from distill_operator.distillationjob.readiness import RoleState
from distill_operator.model import conditions, deadlines, publication
from distill_operator.model.conditions import TRUE, ConditionValue
from distill_operator.model.observed import Observed
from distill_operator.model.times import parse_time

POLL_SECONDS = 10.0
"""Between two reconciles while something outside the watches may change: a claim, KubeRay, an object of a deleted
job."""

MOST_CHARACTERS = 2000
"""Of the notes in a condition; the trainer's log has them whole."""


def reported(
    job: DistillationJob, status: Status, observed: Observed, states: list[RoleState], now: datetime
) -> dict[ConditionType, ConditionValue]:
    """Return Preflight and Stalled, and Published where the job publishes its model."""
    preflight = conditions.value_of(status, ConditionType.PREFLIGHT, lifecycle.PREFLIGHT_AHEAD)
    if observed.report is not None and observed.report.preflight_passed:
        notes = "; ".join(observed.report.notes)
        preflight = ConditionValue(TRUE, Reason.PASSED, notes[:MOST_CHARACTERS])
    stalled = lifecycle.NOT_STALLED
    trainer = next(s for s in states if s.role is Role.TRAINER)
    silent = _seconds_without_step(status, observed, now)
    if trainer.condition.status is TRUE and silent >= job.spec.stall_timeout_seconds:
        text = f"no step has ended for {job.spec.stall_timeout_seconds} s (stallTimeoutSeconds)"
        stalled = ConditionValue(TRUE, Reason.NO_STEP, text)
    published = publication.published(job, status, observed.report)
    return {ConditionType.PREFLIGHT: preflight, ConditionType.STALLED: stalled, **published}


def progress(status: Status, report: ProgressReport) -> Progress:
    """Return the progress of the job.

    A trainer that goes on from a checkpoint answers before its first step, with step 0: the job stays where it was.
    """
    before, told = status.progress, report.progress
    if before is None or told.last_step_time is not None or told.step >= before.step:
        return told
    return before.model_copy(update={"teachers": told.teachers})


def seconds_to_next_change(job: DistillationJob, status: Status, observed: Observed, now: datetime) -> float | None:
    """Return the seconds until time alone changes something of a running attempt; None where it never does."""
    starting = conditions.reason_of(status, ConditionType.SUCCEEDED) == Reason.STARTING
    stalled = conditions.is_true(status, ConditionType.STALLED)
    silent = _seconds_without_step(status, Observed(), now)
    lacking = any(observed.lacks_pods(c) for c in observed.trainer_jobs())
    changes = [
        POLL_SECONDS if starting and (observed.unwatched or lacking) else None,
        None if starting or stalled else job.spec.stall_timeout_seconds - silent,
        restart_seconds_left(job, status, now),
        deadlines.active_seconds_left(job.spec, status, now),
        deadlines.pre_running_seconds_left(job.spec, status, now),
        deadlines.room_seconds_left(job.spec, status, now),
    ]
    return min((max(1.0, math.ceil(seconds)) for seconds in changes if seconds is not None), default=None)


def _seconds_without_step(status: Status, observed: Observed, now: datetime) -> float:
    """Return the seconds since the last step of this attempt, or since the attempt began."""
    progress = observed.report.progress if observed.report else status.progress
    times = [parse_time(status.attempt_start_time), parse_time(progress.last_step_time if progress else None)]
    newest = max((t for t in times if t), default=now)
    return (now - newest).total_seconds()
