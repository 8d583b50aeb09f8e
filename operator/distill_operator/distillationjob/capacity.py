"""The attempt for which there is not room enough: it does not hold nodes for ever while some of its pods find none."""

from datetime import datetime

from distill_api.job import DistillationJob
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob.failure import Failure
from distill_operator.distillationjob.lifecycle import ROLE_CONDITIONS
from distill_operator.model import conditions
from distill_operator.model.times import parse_time, seconds_since

ROOM_SECONDS = 1800
"""How long an attempt without preRunningDeadlineSeconds holds nodes while some of its pods find none.

Two jobs that each hold a part of what both need would otherwise wait for each other without end.
"""


def room_seconds_left(job: DistillationJob, status: Status, now: datetime) -> float | None:
    """Return the seconds until an attempt whose pods find no node releases those it has.

    None where every pod finds its node, with preRunningDeadlineSeconds, and once every role has been ready.
    """
    running = conditions.reason_of(status, ConditionType.SUCCEEDED) == Reason.RUNNING
    waits = any(conditions.reason_of(status, c) == Reason.UNSCHEDULABLE for c in ROLE_CONDITIONS.values())
    if not waits or running or job.spec.pre_running_deadline_seconds or parse_time(status.attempt_start_time) is None:
        return None
    return ROOM_SECONDS - seconds_since(status.attempt_start_time, now)


def no_room_in_time(waiting_for: str) -> Failure:
    """Return the failure of an attempt that releases its nodes, as some of its pods found none in ROOM_SECONDS."""
    message = f"some pods found no node for {ROOM_SECONDS} s, so the others are released: {waiting_for}"
    return Failure(Reason.BACKOFF_LIMIT_EXCEEDED, Reason.UNSCHEDULABLE, message, counts=False, uncounted="it never ran")
