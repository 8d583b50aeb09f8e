"""Deadlines of a job: the seconds that are left until the passing of time alone changes something. Pure."""

from datetime import datetime

from distill_api.spec.job_spec import Spec
from distill_api.status import ConditionType, Reason, Status
from distill_operator.model import conditions
from distill_operator.model.times import parse_time, seconds_since

ROOM_SECONDS = 1800
"""How long an attempt without preRunningDeadlineSeconds holds nodes while some of its pods find none.

Two jobs that each hold a part of what both need would otherwise wait for each other without end.
"""


def active_seconds_left(spec: Spec, status: Status, now: datetime) -> float | None:
    """Return the seconds until activeDeadlineSeconds; None without the deadline, or before the first attempt."""
    if spec.active_deadline_seconds is None or parse_time(status.start_time) is None:
        return None
    return spec.active_deadline_seconds - (seconds_since(status.start_time, now) - status.suspended_seconds)


def pre_running_seconds_left(spec: Spec, status: Status, now: datetime) -> float | None:
    """Return the seconds until preRunningDeadlineSeconds; None without it, and once every role has been ready."""
    running = conditions.reason_of(status, ConditionType.SUCCEEDED) == Reason.RUNNING
    if spec.pre_running_deadline_seconds is None or running or parse_time(status.attempt_start_time) is None:
        return None
    return spec.pre_running_deadline_seconds - seconds_since(status.attempt_start_time, now)


def room_seconds_left(spec: Spec, status: Status, now: datetime) -> float | None:
    """Return the seconds until an attempt whose pods find no node releases those it has.

    None where every pod finds its node, with preRunningDeadlineSeconds, and once every role has been ready.
    """
    running = conditions.reason_of(status, ConditionType.SUCCEEDED) == Reason.RUNNING
    waits = any(conditions.reason_of(status, c) == Reason.UNSCHEDULABLE for c in conditions.ROLE_CONDITIONS.values())
    if not waits or running or spec.pre_running_deadline_seconds or parse_time(status.attempt_start_time) is None:
        return None
    return ROOM_SECONDS - seconds_since(status.attempt_start_time, now)


def ttl_seconds_left(spec: Spec, status: Status, now: datetime) -> float | None:
    """Return the seconds until ttlSecondsAfterFinished; None without it, and before the job has finished."""
    if spec.ttl_seconds_after_finished is None or parse_time(status.completion_time) is None:
        return None
    return spec.ttl_seconds_after_finished - seconds_since(status.completion_time, now)
