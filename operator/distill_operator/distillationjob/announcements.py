"""The Events of a DistillationJob: which changes of its status a person should notice.

They are posted before the status that they announce is written: after a crash in between they are asked for again,
under the same key, and so are the same Events.
"""

from collections.abc import Iterator

from distill_api.status import ConditionStatus, ConditionType, Reason, Status
from distill_operator.model import conditions
from distill_operator.runtime.effects import Event

ROLES = (ConditionType.TEACHER_READY, ConditionType.ROLLOUT_READY, ConditionType.TRAINER_READY)
PROBLEMS = frozenset(
    {
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CONTAINER_REFUSED,
        Reason.CRASH_LOOPING,
        Reason.OUT_OF_MEMORY,
        Reason.EVICTED,
        Reason.TEACHER_NOT_FOUND,
        Reason.TEACHER_UNREACHABLE,
        Reason.ENGINES_LOST,
        Reason.VOLUME_FULL,
        Reason.POD_LOST,
        Reason.QUOTA_EXCEEDED,
        Reason.PODS_REFUSED,
        Reason.KUBERAY_NOT_INSTALLED,
        Reason.VOLUME_NOT_BOUND,
        Reason.GANG_NOT_INSTALLED,
        Reason.NAME_TAKEN,
    }
)
"""Reasons of a role's condition that a person may have to mend."""
QUIET = frozenset({Reason.PENDING, Reason.STARTING})
"""Reasons of Succeeded that say nothing by themselves. When an attempt began stands in the status."""
_TYPES = frozenset(ConditionType)


def announcements(uid: str, before: Status, after: Status) -> tuple[Event, ...]:
    """Return the Events of a change of the status of the job with this uid."""
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
    return (*found, *_disruptions(uid, before, after))


def _disruptions(uid: str, before: Status, after: Status) -> Iterator[Event]:
    """Yield the Event of each pod that the cluster took away, also where the training goes on without it."""
    known = {(role.name, role.disruption_time) for role in before.roles}
    for role in after.roles:
        if role.disruption and (role.name, role.disruption_time) not in known:
            key = f"{uid}/{role.name}/disruption/{role.disruption_time}"
            yield Event(key, Reason.EVICTED, f"{role.name}: {role.disruption}", warning=True)


def _is_warning(condition_type: str, status: ConditionStatus, reason: str, attempts: int) -> bool | None:
    """Return whether a condition's Event is a warning; None where it is worth no Event."""
    if condition_type == ConditionType.SUCCEEDED:
        if reason in QUIET:
            return None
        return status is ConditionStatus.FALSE or reason in (Reason.RESTARTING, Reason.INVALID_SPEC)
    if condition_type in ROLES:
        return True if reason in PROBLEMS else None
    if condition_type == ConditionType.ADMITTED:
        # That it waits, the summary says.
        return None if reason == Reason.WAITING_FOR_QUOTA else status is ConditionStatus.FALSE
    if condition_type == ConditionType.STALLED:
        return True if status is ConditionStatus.TRUE else None
    if condition_type == ConditionType.PUBLISHED:
        return None if status is ConditionStatus.UNKNOWN else status is ConditionStatus.FALSE
    if condition_type == ConditionType.SPEC_VALID:
        # Before the first attempt, Succeeded says it.
        return True if status is ConditionStatus.FALSE and attempts else None
    return None
