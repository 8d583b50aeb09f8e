"""The view that a job has of a Teacher that it names: whether it exists, answers, and has a node. Pure."""

from dataclasses import dataclass

from distill_api.job import DistillationJob
from distill_api.status import ConditionType, Reason
from distill_operator.model import conditions
from distill_operator.model.conditions import FALSE, TRUE, ConditionValue
from distill_operator.model.observed import Disruption, Observed, ObservedTeacher, newest_disruption

NEVER_SERVES = frozenset(
    {
        Reason.TEACHER_NOT_FOUND,
        Reason.INVALID_SPEC,
        Reason.NAME_TAKEN,
        Reason.SCALED_TO_ZERO,
        Reason.WAITING_FOR_QUOTA,
    }
)
"""Reasons that last until somebody acts, or others end: a job's pods would hold accelerators for nothing meanwhile."""


@dataclass(frozen=True)
class View:
    """All of a Teacher that a job's plan depends on: where it changes, the Teacher's jobs must be reconciled."""

    condition: ConditionValue
    """What it contributes to the job's TeacherReady."""
    placed: bool = False
    """Whether a server of it has a node."""
    disruption: Disruption | None = None
    """The newest disruption that its pods tell of."""


def view(name: str, servers: ObservedTeacher | None) -> View:
    """Return the view of the Teacher of a name; `servers` is None where it does not exist."""
    if servers is None or servers.deleting:
        what = "does not exist in this namespace; create it" if servers is None else "is being deleted; create it again"
        text = f"the Teacher {name} {what}, and the job goes on by itself"
        return View(ConditionValue(FALSE, Reason.TEACHER_NOT_FOUND, text))
    placed = any(p.scheduled and not p.deleting for p in servers.pods)
    return View(_verdict(servers), placed, newest_disruption(servers.pods))


def views(job: DistillationJob, observed: Observed) -> list[View]:
    """Return the view of each Teacher that the job names."""
    return [view(name, observed.teacher(name)) for name in job.spec.shared_teachers]


def _verdict(servers: ObservedTeacher) -> ConditionValue:
    new = ConditionValue(FALSE, Reason.NOT_READY, "it was not reconciled yet")
    found = conditions.value_of(servers.status, ConditionType.READY, new)
    if found.status is TRUE:
        # Without the number of servers: each job would be written to whenever one comes or goes.
        return ConditionValue(TRUE, Reason.READY, f"Teacher {servers.name} answers")
    return ConditionValue(FALSE, found.reason, f"Teacher {servers.name}: {found.message}")
