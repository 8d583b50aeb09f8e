"""The hand-over from one trainer to the next: none begins while another one may still run. Pure.

A trainer that was told to end still writes its last checkpoint, for as long as its grace period. It has gone when its
pod has succeeded or failed, or is no longer there. Neither happens on a node of which nobody hears, and there a person
has to say that the node is off.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import Reason
from distill_operator.kinds import Kind
from distill_operator.model.conditions import FALSE, ConditionValue
from distill_operator.model.observed import Child, Observed, Outcome, Pod

OVERDUE = timedelta(seconds=60)
"""A pod that has not ended so long after its grace period is on a node of which nobody hears."""


def trainers_left(observed: Observed) -> list[Pod]:
    """Return the trainer pods that may still run, of any attempt, and of earlier jobs of this name."""
    own = [p for p in observed.pods if p.role is Role.TRAINER and not p.ended]
    return [*own, *observed.earlier_trainers]


def obstacle(job: DistillationJob, observed: Observed, now: datetime) -> ConditionValue | None:
    """Return the condition of a trainer that has to wait for the end of another one; None where none may still run."""
    namespace = job.metadata.namespace
    if left := trainers_left(observed):
        return overdue(left, namespace, now) or _waiting(left, namespace)
    for child in observed.children:
        if _may_make_a_trainer(job, child):
            text = f"the Job {child.name} is of an earlier job of this name, and may still run; delete it if it stays"
            return ConditionValue(FALSE, Reason.EARLIER_TRAINER_RUNS, text)
    return None


def overdue(pods: Iterable[Pod], namespace: str, now: datetime) -> ConditionValue | None:
    """Return what to do about a pod that should have ended long ago; None where there is none."""
    pod = next((p for p in pods if not p.ended and p.due is not None and p.due + OVERDUE < now), None)
    if pod is None:
        return None
    text = (
        f"{pod.name} should have ended by {pod.due:%Y-%m-%dT%H:%M:%SZ}, and its node {pod.node} does not confirm it: "
        "it may still run. The job goes on when the node is back. If it is gone, make sure that it is off, then: "
        f"kubectl delete pod {pod.name} -n {namespace} --force"
    )
    return ConditionValue(FALSE, Reason.POD_LOST, text)


def _waiting(left: Sequence[Pod], namespace: str) -> ConditionValue:
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    text = f"the trainer waits for the end of {left[0].name}{more}, which may still write into the run folder"
    if stays := next((p for p in left if not p.deleting), None):
        text += f"; if nothing ends it: kubectl delete pod {stays.name} -n {namespace}"
    return ConditionValue(FALSE, Reason.EARLIER_TRAINER_RUNS, text)


def _may_make_a_trainer(job: DistillationJob, child: Child) -> bool:
    """Return whether a Job of an earlier job of this name may still make pods."""
    prefix = names.trainer(job.metadata.name)
    return (
        child.kind is Kind.JOB
        and not child.ours
        and child.attempt > 0
        and child.name == f"{prefix}-{child.attempt}"
        and child.outcome is Outcome.ACTIVE
    )
