"""Signs of life of a running attempt: the conditions that rest on them, and when they are looked at next. Pure."""

import math
from datetime import datetime

from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob import lifecycle
from distill_operator.distillationjob.readiness import RoleState
from distill_operator.model import conditions
from distill_operator.model.conditions import TRUE, Verdict
from distill_operator.model.observed import Observed
from distill_operator.runtime.times import parse_time

POLL_SECONDS = 10.0
"""While something outside the watches may change: a claim, KubeRay, an object of a deleted job."""


def reported(
    job: DistillationJob, status: Status, observed: Observed, states: list[RoleState], now: datetime
) -> dict[ConditionType, Verdict]:
    """Conditions that rest on what the trainer says."""
    preflight = conditions.verdict_of(status, ConditionType.PREFLIGHT, lifecycle.PREFLIGHT_AHEAD)
    if observed.report is not None and observed.report.preflight_passed:
        preflight = Verdict(TRUE, Reason.PASSED)
    stalled = lifecycle.NOT_STALLED
    trainer = next(s for s in states if s.role is Role.TRAINER)
    silent = _silent_seconds(status, observed, now)
    if trainer.verdict.status is TRUE and silent >= job.spec.stall_timeout_seconds:
        text = f"no step has ended for {job.spec.stall_timeout_seconds} s (stallTimeoutSeconds)"
        stalled = Verdict(TRUE, Reason.NO_STEP, text)
    return {ConditionType.PREFLIGHT: preflight, ConditionType.STALLED: stalled}


def _silent_seconds(status: Status, observed: Observed, now: datetime) -> float:
    """Since the last step of this attempt, or since the attempt began."""
    progress = observed.report.progress if observed.report else status.progress
    times = [parse_time(status.attempt_start_time), parse_time(progress.last_step_time if progress else None)]
    newest = max((t for t in times if t), default=now)
    return (now - newest).total_seconds()


def next_look(job: DistillationJob, status: Status, observed: Observed, now: datetime) -> float | None:
    """When time alone will change something."""
    starting = conditions.reason_of(status, ConditionType.SUCCEEDED) == Reason.STARTING
    stalled = conditions.is_true(status, ConditionType.STALLED)
    silent = _silent_seconds(status, Observed(), now)
    looks = [
        POLL_SECONDS if starting and observed.unwatched else None,
        None if starting or stalled else job.spec.stall_timeout_seconds - silent,
        lifecycle.active_seconds_left(job.spec, status, now),
        lifecycle.pre_running_seconds_left(job.spec, status, now),
    ]
    return min((max(1.0, math.ceil(look)) for look in looks if look is not None), default=None)
