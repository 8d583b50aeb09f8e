"""The queue of a Teacher: how many servers Kueue has admitted, and what is to be done about its Workload. Pure.

A Teacher with an autoscaler reserves quota for the most servers that it may have; one without, for its replicas. It
makes do with what was admitted: more replicas are queued once it is scaled to zero and back, or evicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from distill_api import names
from distill_api.names import Role
from distill_api.status import ConditionType, Reason
from distill_api.teacher.kind import Teacher, TeacherStatus
from distill_operator.kinds import Kind
from distill_operator.kueue import admission, workload
from distill_operator.kueue.admission import Request
from distill_operator.model import conditions
from distill_operator.model.conditions import FALSE, ConditionValue
from distill_operator.model.observed import Child, Observed
from distill_operator.resources.pod_template import Json
from distill_operator.runtime.effects import Effect
from distill_operator.settings import Settings


@dataclass(frozen=True)
class Queued:
    """What the queue of a Teacher allows."""

    teacher: str
    request: Request
    servers: int
    """How many servers it may have now."""
    waits: ConditionValue | None = None
    """The condition Ready, where it may have none."""
    conditions: Mapping[ConditionType, ConditionValue] = field(default_factory=dict)


def queued(teacher: Teacher, status: TeacherStatus, observed: Observed, settings: Settings, wanted: int) -> Queued:
    """Return what the queue of a Teacher allows; `wanted` is how many servers it is to have."""
    deployment = observed.child(Kind.DEPLOYMENT, names.shared_teacher(teacher.metadata.name))
    serves = deployment is not None and deployment.ours and deployment.desired > 0
    request = Request(
        observed.queueing,
        observed.child(Kind.WORKLOAD, workload.name_of(teacher)),
        wanted=lambda: workload.workload(teacher, settings, observed.queueing),
        generation=teacher.metadata.generation,
        running=serves,
        capped=True,
        # Servers that were made without a queue stay until it is scaled to zero.
        unqueued=serves and conditions.find(status, ConditionType.ADMITTED) is None,
    )
    if wanted == 0:
        return Queued(teacher.metadata.name, request, 0)
    if held := admission.hold(request):
        # Jobs wait for it as for one that is scaled to zero.
        waits = ConditionValue(FALSE, Reason.WAITING_FOR_QUOTA, held.message)
        return Queued(teacher.metadata.name, request, 0, waits, admission.conditions(request))
    admitted = admission.admitted_count(request, Role.TEACHER.value)
    servers = wanted if admitted is None else min(wanted, admitted)
    return Queued(teacher.metadata.name, request, servers, conditions=admission.conditions(request))


def kept(queue: Queued, body: Json, live: Child) -> Json:
    """Return the Deployment with the pods that its servers are now, where their placement cannot be read."""
    request = queue.request
    serves = live.desired > 0 and queue.servers > 0
    if request.queueing.obstacle is None or not serves or not admission.is_queued(request):
        return body
    annotations = {**body["metadata"]["annotations"], names.ANNOTATION_SPEC_HASH: live.spec_hash}
    return {
        **body,
        "metadata": {**body["metadata"], "annotations": annotations},
        "spec": {**body["spec"], "template": live.content["spec"]["template"]},
    }


def queue_effects(queue: Queued, observed: Observed, now: datetime, *, ready: bool) -> Sequence[Effect]:
    """Return what is to be done about the Workload of a Teacher."""
    deployment = observed.child(Kind.DEPLOYMENT, names.shared_teacher(queue.teacher))
    stopped = deployment is None or (deployment.desired == 0 and not _replicas(deployment.content))
    released = queue.servers == 0 and stopped and not observed.active
    if queue.servers == 0 and queue.waits is None:
        return admission.withdrawal(queue.request.live) if released else ()
    return admission.effects(queue.request, now, released=released, ready=ready, ended=None)


def without_queue_conditions(status: TeacherStatus) -> TeacherStatus:
    """Return the status of a Teacher that names no queue."""
    of_queue = (ConditionType.QUOTA_RESERVED, ConditionType.ADMITTED)
    left = [c for c in status.conditions if c.type not in of_queue]
    return status if len(left) == len(status.conditions) else status.model_copy(update={"conditions": left})


def _replicas(deployment: Mapping[str, object]) -> int:
    status = deployment.get("status")
    return int(status.get("replicas", 0)) if isinstance(status, Mapping) else 0
