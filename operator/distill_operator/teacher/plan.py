"""plan_teacher(): keep a Teacher's children as they should be, with as many servers as its jobs keep busy. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from distill_api import names, protocol
from distill_api.job import Metadata
from distill_api.names import Role
from distill_api.status import ConditionType, Reason
from distill_api.teacher.kind import Teacher, TeacherStatus
from distill_operator import policy
from distill_operator.kinds import Kind, kind_of
from distill_operator.model import conditions
from distill_operator.model.conditions import FALSE, TRUE, ConditionValue
from distill_operator.model.observed import Observed
from distill_operator.model.pod_problems import no_pods, pods_problem
from distill_operator.model.times import format_time, parse_time
from distill_operator.resources import teacher_servers
from distill_operator.resources.drift import has_drifted
from distill_operator.resources.pod_template import KEY_ENTRY
from distill_operator.runtime.effects import Apply, CreateSecret, Effect
from distill_operator.settings import Settings
from distill_operator.teacher.announcements import announcements, scaling
from distill_operator.teacher.autoscaler import Scale, rescaled, seconds_to_scale_down
from distill_operator.teacher.queue import kept, queue_effects, queued, without_queue_conditions

RETRY_SECONDS = 60.0
"""Until the next reconcile after a wrong spec, a taken name, or a quota: all are for a person to mend."""
VALID = ConditionValue(TRUE, Reason.VALID)
SCALED_TO_ZERO = ConditionValue(
    FALSE, Reason.SCALED_TO_ZERO, "spec.replicas is 0: it has no server, and jobs that name it wait for one"
)


@dataclass(frozen=True)
class TeacherPlan:
    """The effects, to be done in order, and the status that is written after them."""

    effects: tuple[Effect, ...]
    status: TeacherStatus
    requeue_after: float | None = None
    scaled: int = 0
    """How many servers more, or fewer, than were decided before."""


def plan_teacher(
    teacher: Teacher,
    status: TeacherStatus,
    observed: Observed,
    requests: Sequence[int],
    settings: Settings,
    now: datetime,
) -> TeacherPlan:
    """Return what to do next about a Teacher. `requests` wait or are under way at each running job that names it."""
    meta = teacher.metadata
    if problems := policy.problems(teacher.spec, settings):
        return refused(meta, status, observed, ConditionValue(FALSE, Reason.INVALID_SPEC, "; ".join(problems)), now)
    scale = _scale(teacher, status, sum(requests), now)
    queue = queued(teacher, status, observed, settings, scale.replicas)
    effects: list[Effect] = []
    for rendered in teacher_servers.children(teacher, settings, queue.servers, observed.queueing.placements):
        body, child = rendered, observed.child(kind_of(rendered), rendered["metadata"]["name"])
        if child is not None and not child.ours and child.belongs_to_earlier(body["metadata"]["ownerReferences"][0]):
            text = f"the {body['kind']} {body['metadata']['name']} of an earlier Teacher of this name is being removed"
            return refused(meta, status, observed, ConditionValue(FALSE, Reason.NOT_READY, text), now)
        if child is not None and not child.ours:
            what = f"the {body['kind']} {body['metadata']['name']} exists and belongs to something else"
            text = f"{what}; delete it, or name this Teacher differently"
            return refused(meta, status, observed, ConditionValue(FALSE, Reason.NAME_TAKEN, text), now)
        if child is not None and child.kind is Kind.DEPLOYMENT:
            body = kept(queue, body, child)
        if child is None or (not child.deleting and has_drifted(body, child)):
            effects.append(Apply(body))
    if any(isinstance(e, Apply) and e.body["kind"] == "Deployment" for e in effects):
        effects.insert(0, CreateSecret(teacher_servers.key(teacher), KEY_ENTRY))
    rule = teacher.spec.autoscaling
    scaled = scale.replicas - status.desired_replicas if rule and status.desired_replicas else 0
    after = _revised(
        meta,
        status.model_copy(
            update={
                "address": f"{names.shared_teacher(meta.name)}.{meta.namespace}:{protocol.SGLANG_PORT}",
                "desired_replicas": scale.replicas,
                **_for_autoscaler(meta, observed),
                "ready_replicas": min(_ready(meta, observed), queue.servers),
                "jobs": len(requests),
                "requests": sum(requests),
                "low_since": format_time(scale.low_since) if scale.low_since else None,
                "low_peak": scale.low_peak,
            }
        ),
        {
            ConditionType.READY: queue.waits or _readiness(meta, observed, queue.servers),
            ConditionType.SPEC_VALID: VALID,
            **queue.conditions,
        },
        now,
    )
    after = after if queue.conditions else without_queue_conditions(after)
    effects += queue_effects(queue, observed, now, ready=conditions.is_true(after, ConditionType.READY))
    events = announcements(meta.uid, status, after)
    if rule and scaled:
        events = (*events, scaling(meta.uid, rule, status.desired_replicas, after))
    again = seconds_to_scale_down(rule, scale, now) if rule else None
    if observed.queueing.obstacle is not None:
        # Nothing tells of its end.
        again = min(again or RETRY_SECONDS, RETRY_SECONDS)
    return TeacherPlan((*effects, *events), after, again, scaled)


def refused(
    meta: Metadata, status: TeacherStatus, observed: Observed, condition: ConditionValue, now: datetime
) -> TeacherPlan:
    """Return the plan of a Teacher for which nothing can be made, as `condition` says. What serves is left alone."""
    ready = _ready(meta, observed)
    serves = ConditionValue(TRUE, Reason.READY, f"{ready} servers answer; {condition.message}")
    # A quota, or a garbage collector that has not come yet: the spec is not at fault.
    valid = condition if condition.reason in (Reason.INVALID_SPEC, Reason.NAME_TAKEN) else VALID
    found = {ConditionType.SPEC_VALID: valid, ConditionType.READY: serves if ready else condition}
    update = {"ready_replicas": ready, **_for_autoscaler(meta, observed)}
    after = _revised(meta, status.model_copy(update=update), found, now)
    return TeacherPlan(announcements(meta.uid, status, after), after, RETRY_SECONDS)


def _revised(
    meta: Metadata, status: TeacherStatus, values: dict[ConditionType, ConditionValue], now: datetime
) -> TeacherStatus:
    found = conditions.merged(status.conditions, values, meta.generation, now)
    return status.model_copy(update={"observed_generation": meta.generation, "conditions": found})


def _for_autoscaler(meta: Metadata, observed: Observed) -> dict[str, int | str]:
    """Return what the scale subresource shows: the number of pods, and the labels that select them."""
    labels = {names.LABEL_SHARED_TEACHER: meta.name, names.LABEL_ROLE: Role.TEACHER.value}
    return {
        "replicas": sum(not pod.ended for pod in observed.pods_of(Role.TEACHER)),
        "selector": ",".join(f"{key}={value}" for key, value in labels.items()),
    }


def _scale(teacher: Teacher, status: TeacherStatus, requests: int, now: datetime) -> Scale:
    rule = teacher.spec.autoscaling
    if rule is None:
        return Scale(teacher.spec.replicas)
    before = Scale(status.desired_replicas or rule.min_replicas, parse_time(status.low_since), status.low_peak)
    return rescaled(rule, before, requests, now)


def _ready(meta: Metadata, observed: Observed) -> int:
    """Return how many servers answer."""
    deployment = observed.child(Kind.DEPLOYMENT, names.shared_teacher(meta.name))
    return deployment.ready if deployment and deployment.ours else 0


def _readiness(meta: Metadata, observed: Observed, wanted: int) -> ConditionValue:
    """Return the condition Ready: one server that answers is enough; the message says what keeps the others."""
    if wanted == 0:
        return SCALED_TO_ZERO
    ready = min(_ready(meta, observed), wanted)
    text = f"{ready} of {wanted} servers answer"
    deployment = observed.child(Kind.DEPLOYMENT, names.shared_teacher(meta.name))
    problem = pods_problem(observed.pods_of(Role.TEACHER)) or no_pods([deployment] if deployment else [])
    if ready:
        return ConditionValue(TRUE, Reason.READY, f"{text}; {problem.message}" if problem else text)
    return problem or ConditionValue(FALSE, Reason.NOT_READY, text)
