"""Deadlines of a job: the seconds that are left until the passing of time alone changes something. Pure."""

from datetime import datetime

from distill_api.spec.job_spec import Spec
from distill_api.status import ConditionType, Reason, Status
from distill_operator.model import conditions
from distill_operator.model.times import parse_time, seconds_since


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


def ttl_seconds_left(spec: Spec, status: Status, now: datetime) -> float | None:
    """Return the seconds until ttlSecondsAfterFinished; None without it, and before the job has finished."""
    if spec.ttl_seconds_after_finished is None or parse_time(status.completion_time) is None:
        return None
    return spec.ttl_seconds_after_finished - seconds_since(status.completion_time, now)
