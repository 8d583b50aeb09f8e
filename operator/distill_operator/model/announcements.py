"""Which changes of a status a person should hear of, as Events.

They are posted before the status that they announce is written: after a crash in between they are asked for again,
under the same key, and so are the same Events.
"""

from distill_api.status import ConditionStatus, ConditionType, Reason, Status
from distill_api.teacher import Autoscaling, TeacherStatus
from distill_operator.model import conditions
from distill_operator.runtime.effects import Event

ROLES = (ConditionType.TEACHER_READY, ConditionType.ROLLOUT_READY, ConditionType.TRAINER_READY)
PROBLEMS = frozenset(
    {
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CRASH_LOOPING,
        Reason.OUT_OF_MEMORY,
        Reason.EVICTED,
        Reason.TEACHER_NOT_FOUND,
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
QUIET = frozenset({Reason.PENDING, Reason.STARTING})
"""Reasons of Succeeded that say nothing by themselves. When an attempt began stands in the status."""
SCALED = "Scaled"
"""Reason of the Event about a Teacher that has got more servers, or fewer."""


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


def teacher_announcements(uid: str, before: TeacherStatus, after: TeacherStatus) -> tuple[Event, ...]:
    """Of a Teacher."""
    found: list[Event] = []
    for condition_type in (ConditionType.READY, ConditionType.SPEC_VALID):
        now, then = conditions.find(after, condition_type), conditions.find(before, condition_type)
        if now is None or (then is not None and (then.status, then.reason) == (now.status, now.reason)):
            continue
        warning = now.status is not ConditionStatus.TRUE
        if condition_type is ConditionType.READY:
            # What is wrong with the spec is said by that condition; no server yet is how each begins.
            lost = then is not None and then.status is ConditionStatus.TRUE
            if warning and not lost and (now.reason not in PROBLEMS or now.reason == Reason.NAME_TAKEN):
                continue
        elif not warning:
            continue
        key = f"{uid}/{condition_type}/{now.reason}/{after.observed_generation}"
        found.append(Event(key, now.reason, now.message, warning))
    return tuple(found)


def scaling(uid: str, rule: Autoscaling, before: int, after: TeacherStatus) -> Event:
    """That the number of a Teacher's servers has changed, from `before`, and why."""
    wanted = after.desired_replicas
    servers = "1 server" if wanted == 1 else f"{wanted} servers"
    why = f"{after.requests} requests of {after.jobs} jobs, {rule.target_requests} for each server"
    if wanted < before:
        why = f"fewer were enough for {rule.scale_down_seconds} s"
    text = f"{servers} instead of {before}, of {rule.min_replicas} to {rule.max_replicas}: {why}"
    return Event(f"{uid}/{SCALED}/{before}/{wanted}/{after.observed_generation}", SCALED, text, warning=False)
