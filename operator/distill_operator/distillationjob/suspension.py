"""Suspension of a job: by its user (spec.suspend), or as Kueue has not admitted it. Pure.

Both release every pod, count no attempt and keep all checkpoints. A job of a user who suspends it leaves its queue; one
that Kueue evicts gives its reservation back once its last pod is gone, and waits for the next.
"""

from collections.abc import Sequence
from datetime import datetime

from distill_api.job import DistillationJob
from distill_api.status import ConditionType, Reason, Status
from distill_operator.distillationjob import handover, lifecycle, upkeep
from distill_operator.distillationjob.trainer_conditions import POLL_SECONDS
from distill_operator.kinds import Kind
from distill_operator.kueue import admission, workload
from distill_operator.kueue.admission import Request
from distill_operator.model import conditions
from distill_operator.model.conditions import FALSE, TRUE, UNKNOWN, ConditionValue
from distill_operator.model.observed import Observed
from distill_operator.model.queueing import BY_USER, Suspension
from distill_operator.resources import pinning
from distill_operator.runtime.effects import Effect
from distill_operator.settings import Settings

QUEUE_CONDITIONS = (ConditionType.QUOTA_RESERVED, ConditionType.ADMITTED)


def request(job: DistillationJob, status: Status, observed: Observed, settings: Settings) -> Request:
    """Return the job's Workload with what decides about it."""
    waits = status.next_attempt_time is not None or lifecycle.is_suspended(status) or conditions.is_finished(status)
    running = status.attempts > 0 and not waits
    return Request(
        observed.queueing,
        observed.child(Kind.WORKLOAD, workload.name_of(job)),
        wanted=lambda: workload.workload(job, settings, observed.queueing),
        generation=job.metadata.generation,
        running=running,
        # Admission is recorded with the beginning of an attempt that needed it.
        unqueued=running and conditions.find(status, ConditionType.ADMITTED) is None,
    )


def of(job: DistillationJob, queued: Request) -> Suspension | None:
    """Return why the job is to have no pod; None where it may."""
    if job.spec.suspend:
        return BY_USER
    if held := admission.hold(queued):
        releasing = f"{held.message}; pods are still there: status.active says how many"
        # An evicted job waits for quota like any other; what somebody has to mend is named as what it is.
        reason = Reason.WAITING_FOR_QUOTA if held.reason is Reason.EVICTED else held.reason
        return Suspension(reason, held.message, releasing)
    return None


def suspended(
    job: DistillationJob, status: Status, observed: Observed, why: Suspension, now: datetime
) -> tuple[tuple[Effect, ...], Status, float | None]:
    """Record that the job is suspended, release what runs, and say so when nothing does any more.

    Return effects, status, and the seconds until the next reconcile: none, and 0, for a transition.
    """
    children = pinning.attempt_children(job, observed)
    released = not children and not observed.active
    if not lifecycle.is_suspended(status):
        return (), lifecycle.suspended(job, status, now, why, released=released), 0.0
    effects = upkeep.deletions(children)
    said = {ConditionType.SUCCEEDED: ConditionValue(UNKNOWN, why.reason, why.message)}
    if conditions.is_true(status, ConditionType.SUSPENDED):
        said[ConditionType.SUSPENDED] = ConditionValue(TRUE, Reason.SUSPENDED, why.message)
        again = POLL_SECONDS if observed.queueing.obstacle is not None else None
        return effects, lifecycle.revised(job, status, now, said), again
    if released:
        return (), lifecycle.suspended(job, status, now, why, released=True), 0.0
    late = handover.overdue(observed.pods, job.metadata.namespace, now)
    text = late.message if late else why.releasing
    said[ConditionType.SUSPENDED] = ConditionValue(FALSE, Reason.SUSPENDING, text)
    return effects, lifecycle.revised(job, status, now, said), POLL_SECONDS


def queue_effects(
    job: DistillationJob, before: Status, after: Status, observed: Observed, queued: Request, now: datetime
) -> Sequence[Effect]:
    """Return what is to be done about the job's Workload; `before` is the status that is written already."""
    gone = not observed.active and not pinning.attempt_children(job, observed)
    # That no pod is left was read from the API server before it was recorded.
    released = gone and conditions.is_true(before, ConditionType.SUSPENDED)
    if conditions.is_finished(before):
        ended = conditions.value_of(before, ConditionType.SUCCEEDED, ConditionValue(FALSE, Reason.COMPLETED))
        return admission.effects(queued, now, released=not observed.active, ready=False, ended=ended)
    if job.spec.suspend:
        return admission.withdrawal(queued.live) if released else ()
    running = conditions.reason_of(after, ConditionType.SUCCEEDED) == Reason.RUNNING
    ready = running and conditions.is_true(after, ConditionType.READY)
    return admission.effects(queued, now, released=released, ready=ready, ended=None)


def with_queue_conditions(job: DistillationJob, status: Status, queued: Request, now: datetime) -> Status:
    """Return the status with QuotaReserved and Admitted, or without them where no queue is named."""
    if conditions.is_finished(status):
        return status
    if found := admission.conditions(queued):
        shown = conditions.merged(status.conditions, found, job.metadata.generation, now)
    else:
        shown = [c for c in status.conditions if c.type not in QUEUE_CONDITIONS]
    return status if shown == status.conditions else status.model_copy(update={"conditions": shown})
