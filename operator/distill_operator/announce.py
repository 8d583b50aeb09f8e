"""Which changes of a status a person should hear of, as Events.

They are posted before the status that they announce is written: after a crash in between they are asked for again,
under the same key, and so are the same Events.
"""

from distill_api.status import ConditionStatus, ConditionType, Reason, Status
from distill_operator import conditions
from distill_operator.effects import Event

ROLES = (ConditionType.TEACHER_READY, ConditionType.ROLLOUT_READY, ConditionType.TRAINER_READY)
PROBLEMS = frozenset(
    {
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CRASH_LOOPING,
        Reason.OUT_OF_MEMORY,
        Reason.EVICTED,
        Reason.TEACHER_UNREACHABLE,
        Reason.ENGINES_LOST,
        Reason.VOLUME_FULL,
        Reason.QUOTA_EXCEEDED,
        Reason.KUBERAY_NOT_INSTALLED,
        Reason.VOLUME_NOT_BOUND,
        Reason.GANG_NOT_INSTALLED,
        Reason.NAME_TAKEN,
    }
)
QUIET = frozenset({Reason.PENDING})
"""Reasons of Succeeded that say nothing by themselves."""


def announcements(uid: str, before: Status, after: Status) -> tuple[Event, ...]:
    found: list[Event] = []
    for condition in after.conditions:
        previous = conditions.find(before, ConditionType(condition.type)) if condition.type in _TYPES else None
        if previous is not None and (previous.status, previous.reason) == (condition.status, condition.reason):
            continue
        warning = _is_warning(condition.type, condition.status, condition.reason, after.attempts)
        if warning is None:
            continue
        key = f"{uid}/{condition.type}/{condition.reason}/{after.attempts}/{after.restarts}/{after.observed_generation}"
        found.append(Event(key, condition.reason, condition.message, warning))
    return tuple(found)


_TYPES = frozenset(ConditionType)


def _is_warning(condition_type: str, status: ConditionStatus, reason: str, attempts: int) -> bool | None:
    """None: nobody needs to hear."""
    if condition_type == ConditionType.SUCCEEDED:
        if reason in QUIET:
            return None
        return status is ConditionStatus.FALSE or reason == Reason.RESTARTING
    if condition_type in ROLES:
        return True if reason in PROBLEMS else None
    if condition_type == ConditionType.STALLED:
        return True if status is ConditionStatus.TRUE else None
    if condition_type == ConditionType.SPEC_VALID:
        # Before the first attempt, Succeeded says it.
        return True if status is ConditionStatus.FALSE and attempts else None
    return None
