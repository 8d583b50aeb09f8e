"""Conditions of a status: one list, one of each type, lastTransitionTime moved by a changed status alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from distill_api.names import Role
from distill_api.status import Condition, ConditionStatus, ConditionType, Reason, Status
from distill_operator.model.times import format_time

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
ROLE_CONDITIONS: Mapping[Role, ConditionType] = {
    Role.TEACHER: ConditionType.TEACHER_READY,
    Role.ROLLOUT: ConditionType.ROLLOUT_READY,
    Role.TRAINER: ConditionType.TRAINER_READY,
}
_REASONS = frozenset(r.value for r in Reason)
MAX_MESSAGE = 4096
"""Longest message in characters: enough for an exit report; a scheduler's page about a thousand nodes is cut off."""


@dataclass(frozen=True)
class ConditionValue:
    """What a condition says: its status, reason and message, without its type and its times."""

    status: ConditionStatus
    reason: Reason
    message: str = ""


class Conditioned(Protocol):
    """A status, of a DistillationJob or of a Teacher."""

    @property
    def conditions(self) -> list[Condition]: ...


def find(status: Conditioned, condition_type: ConditionType) -> Condition | None:
    """Return the condition of a type; None where the status has none."""
    return next((c for c in status.conditions if c.type == condition_type.value), None)


def is_true(status: Conditioned, condition_type: ConditionType) -> bool:
    """Return whether the condition of a type is True."""
    found = find(status, condition_type)
    return found is not None and found.status is TRUE


def reason_of(status: Conditioned, condition_type: ConditionType) -> str:
    """Return the reason of a condition; empty where the status has none of the type."""
    found = find(status, condition_type)
    return found.reason if found else ""


def is_finished(status: Status) -> bool:
    """Return whether the job has ended, after which nothing but clean-up happens. An invalid spec is no end."""
    return status.completion_time is not None


def is_transition(before: Status, after: Status) -> bool:
    """Return whether more than the readiness of roles, a message or a count has changed."""
    kinds = (ConditionType.SUCCEEDED, ConditionType.SUSPENDED, ConditionType.SPEC_VALID)

    def state(status: Status) -> list[object]:
        found = [find(status, kind) for kind in kinds]
        numbers = (status.attempts, status.restarts, status.completion_time, status.next_attempt_time)
        return [*((c.status, c.reason) if c else None for c in found), status.observed_generation, *numbers]

    return state(before) != state(after)


def value_of(status: Conditioned, condition_type: ConditionType, otherwise: ConditionValue) -> ConditionValue:
    """Return what a condition says now, or `otherwise` where it is absent or of an unknown reason."""
    found = find(status, condition_type)
    if found is None or found.reason not in _REASONS:
        return otherwise
    return ConditionValue(found.status, Reason(found.reason), found.message)


def merged(
    before: Iterable[Condition], values: Mapping[ConditionType, ConditionValue], generation: int, now: datetime
) -> list[Condition]:
    """Return the conditions with these values, in the order of their types.

    Conditions of unknown types, such as another version's, stay.
    """
    old = {c.type: c for c in before}
    order = [t.value for t in ConditionType]
    found = dict(old)
    for condition_type, value in values.items():
        previous = old.get(condition_type.value)
        message = value.message[:MAX_MESSAGE]
        if previous is not None and previous.observed_generation == generation:
            written = (previous.status, previous.reason, previous.message)
            if written == (value.status, value.reason.value, message):
                continue
        changed = previous is None or previous.status is not value.status
        found[condition_type.value] = Condition(
            type=condition_type.value,
            status=value.status,
            reason=value.reason.value,
            message=message,
            observed_generation=generation,
            last_transition_time=format_time(now) if changed or previous is None else previous.last_transition_time,
        )
    return sorted(found.values(), key=lambda c: order.index(c.type) if c.type in order else len(order))
