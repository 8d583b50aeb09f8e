"""A Teacher as the jobs that name it see it: is it there, does it answer, has it a node. Pure."""

from dataclasses import dataclass

from distill_api.job import DistillationJob
from distill_api.status import ConditionType, Reason
from distill_operator.model import conditions
from distill_operator.model.conditions import FALSE, TRUE, Verdict
from distill_operator.model.observed import Disruption, Observed, ObservedTeacher, newest_disruption

NEVER_SERVES = frozenset({Reason.TEACHER_NOT_FOUND, Reason.INVALID_SPEC, Reason.NAME_TAKEN})
"""Until a person does something: pods of a job that waited for such a one would hold accelerators in vain."""


@dataclass(frozen=True)
class View:
    """Whatever of a Teacher a job's plan depends on: where it changes, the Teacher's jobs have to be looked at."""

    verdict: Verdict
    """Of the job's TeacherReady."""
    placed: bool = False
    """A server of it has a node."""
    disruption: Disruption | None = None
    """The newest that is still to be seen."""


def view(name: str, servers: ObservedTeacher | None) -> View:
    """`servers` is None for a Teacher that does not exist."""
    if servers is None or servers.deleting:
        what = "does not exist in this namespace; create it" if servers is None else "is being deleted; create it again"
        text = f"the Teacher {name} {what}, and the job goes on by itself"
        return View(Verdict(FALSE, Reason.TEACHER_NOT_FOUND, text))
    placed = any(p.scheduled and not p.deleting for p in servers.pods)
    return View(_verdict(servers), placed, newest_disruption(servers.pods))


def views(job: DistillationJob, observed: Observed) -> list[View]:
    """Of each Teacher that the job names."""
    return [view(name, observed.observed_teacher(name)) for name in job.spec.shared_teachers]


def _verdict(servers: ObservedTeacher) -> Verdict:
    new = Verdict(FALSE, Reason.NOT_READY, "no look was taken at it yet")
    found = conditions.verdict_of(servers.status, ConditionType.READY, new)
    if found.status is TRUE:
        # Without the number of servers: each job would be written to whenever one comes or goes.
        return Verdict(TRUE, Reason.READY, f"Teacher {servers.name} answers")
    return Verdict(FALSE, found.reason, f"Teacher {servers.name}: {found.message}")
