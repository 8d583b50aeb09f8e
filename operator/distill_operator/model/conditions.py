"""Conditions: one list, one of each type, lastTransitionTime moved by a changed status alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from distill_api.status import Condition, ConditionStatus, ConditionType, Reason, Status
from distill_operator.runtime.times import format_time

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN
_REASONS = frozenset(r.value for r in Reason)
MAX_MESSAGE = 4096
"""Enough for an exit report; a page of a scheduler's words about a thousand nodes is cut off."""


@dataclass(frozen=True)
class Verdict:
    """What a condition is to say."""

    status: ConditionStatus
    reason: Reason
    message: str = ""


class Conditioned(Protocol):
    """A status, of a job or of a Teacher."""

    @property
    def conditions(self) -> list[Condition]: ...


def find(status: Conditioned, condition_type: ConditionType) -> Condition | None:
    return next((c for c in status.conditions if c.type == condition_type.value), None)


def is_true(status: Conditioned, condition_type: ConditionType) -> bool:
    found = find(status, condition_type)
    return found is not None and found.status is TRUE


def reason_of(status: Conditioned, condition_type: ConditionType) -> str:
    found = find(status, condition_type)
    return found.reason if found else ""


def is_finished(status: Status) -> bool:
    """Terminal states are sticky: nothing but clean-up happens after this. An invalid spec may still be mended."""
    return status.completion_time is not None


def is_turn(before: Status, after: Status) -> bool:
    """More than the readiness of roles, a message or a number has changed."""
    kinds = (ConditionType.SUCCEEDED, ConditionType.SUSPENDED, ConditionType.SPEC_VALID)

    def turn(status: Status) -> list[object]:
        found = [find(status, kind) for kind in kinds]
        numbers = (status.attempts, status.restarts, status.completion_time, status.next_attempt_time)
        return [*((c.status, c.reason) if c else None for c in found), status.observed_generation, *numbers]

    return turn(before) != turn(after)


def verdict_of(status: Conditioned, condition_type: ConditionType, otherwise: Verdict) -> Verdict:
    """What the condition says now."""
    found = find(status, condition_type)
    if found is None or found.reason not in _REASONS:
        return otherwise
    return Verdict(found.status, Reason(found.reason), found.message)


def merged(
    before: Iterable[Condition], verdicts: Mapping[ConditionType, Verdict], generation: int, now: datetime
) -> list[Condition]:
    """All conditions in the order of their types; conditions that we do not know, such as another version's, stay."""
    old = {c.type: c for c in before}
    order = [t.value for t in ConditionType]
    found = dict(old)
    for condition_type, verdict in verdicts.items():
        previous = old.get(condition_type.value)
        message = verdict.message[:MAX_MESSAGE]
        if previous is not None and previous.observed_generation == generation:
            said = (previous.status, previous.reason, previous.message)
            if said == (verdict.status, verdict.reason.value, message):
                continue
        changed = previous is None or previous.status is not verdict.status
        found[condition_type.value] = Condition(
            type=condition_type.value,
            status=verdict.status,
            reason=verdict.reason.value,
            message=message,
            observed_generation=generation,
            last_transition_time=format_time(now) if changed or previous is None else previous.last_transition_time,
        )
    return sorted(found.values(), key=lambda c: order.index(c.type) if c.type in order else len(order))
