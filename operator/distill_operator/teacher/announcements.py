"""The Events of a Teacher: which changes of its status, and of its number of servers, a person should notice."""

from distill_api.status import ConditionStatus, ConditionType, Reason
from distill_api.teacher.kind import Autoscaling, TeacherStatus
from distill_operator.model import conditions
from distill_operator.runtime.effects import Event

PROBLEMS = frozenset(
    {
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CONTAINER_REFUSED,
        Reason.CRASH_LOOPING,
        Reason.OUT_OF_MEMORY,
        Reason.QUOTA_EXCEEDED,
        Reason.PODS_REFUSED,
    }
)
"""Reasons of Ready that a person may have to mend."""
SCALED = "Scaled"
"""Reason of the Event about a Teacher that has got more servers, or fewer."""


def announcements(uid: str, before: TeacherStatus, after: TeacherStatus) -> tuple[Event, ...]:
    """Return the Events of a change of the status of the Teacher with this uid."""
    found: list[Event] = []
    for condition_type in (ConditionType.READY, ConditionType.SPEC_VALID):
        now, then = conditions.find(after, condition_type), conditions.find(before, condition_type)
        if now is None or (then is not None and (then.status, then.reason) == (now.status, now.reason)):
            continue
        failed = now.status is not ConditionStatus.TRUE
        warning = failed and now.reason not in (Reason.SCALED_TO_ZERO, Reason.WAITING_FOR_QUOTA)
        if condition_type is ConditionType.READY:
            # What is wrong with the spec is said by SpecValid; that no server answers yet is how each begins.
            lost = then is not None and then.status is ConditionStatus.TRUE
            if failed and not lost and now.reason not in PROBLEMS:
                continue
        elif not failed:
            continue
        key = f"{uid}/{condition_type}/{now.reason}/{after.observed_generation}"
        found.append(Event(key, now.reason, now.message, warning))
    return tuple(found)


def scaling(uid: str, rule: Autoscaling, before: int, after: TeacherStatus) -> Event:
    """Return the Event that the number of a Teacher's servers has changed, from `before`, and why."""
    wanted = after.desired_replicas
    servers = "1 server" if wanted == 1 else f"{wanted} servers"
    why = f"{after.requests} requests of {after.jobs} jobs, {rule.target_requests} for each server"
    if wanted < before:
        why = f"fewer were enough for {rule.scale_down_seconds} s"
    text = f"{servers} instead of {before}, of {rule.min_replicas} to {rule.max_replicas}: {why}"
    return Event(f"{uid}/{SCALED}/{before}/{wanted}/{after.observed_generation}", SCALED, text, warning=False)
