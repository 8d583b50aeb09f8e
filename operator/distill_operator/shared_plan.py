"""What to do about a Teacher: hold its children as they should be, as many servers as its jobs keep busy. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from distill_api import names, wire
from distill_api.names import Role
from distill_api.shared_teacher import SharedTeacher, SharedTeacherStatus
from distill_api.status import ConditionType, Reason
from distill_operator import conditions, policy
from distill_operator.children import shared
from distill_operator.children.pod import KEY_ENTRY
from distill_operator.conditions import FALSE, TRUE, Verdict
from distill_operator.drift import has_drifted
from distill_operator.effects import Apply, CreateSecret, Effect
from distill_operator.kinds import Kind, kind_of
from distill_operator.observed import Observed
from distill_operator.readiness import pods_problem
from distill_operator.scaling import Scale, rescaled, seconds_to_scale_down
from distill_operator.settings import Settings
from distill_operator.times import format_time, parse_time

RETRY_SECONDS = 60.0
"""After a spec that is wrong, or a name that is taken: both are for a person to mend."""


@dataclass(frozen=True)
class SharedPlan:
    """Effects in order, then the status."""

    effects: tuple[Effect, ...]
    status: SharedTeacherStatus
    requeue_after: float | None = None


def plan_shared(
    teacher: SharedTeacher,
    status: SharedTeacherStatus,
    observed: Observed,
    requests: Sequence[int],
    settings: Settings,
    now: datetime,
) -> SharedPlan:
    """The next thing to do. `requests` wait or are under way at each running job that learns from it."""
    if problems := policy.problems(teacher.spec, settings):
        return refused(teacher.metadata.generation, status, "; ".join(problems), now)
    name = names.shared_teacher(teacher.metadata.name)
    scale = _scale(teacher, status, sum(requests), now)
    wanted = shared.children(teacher, settings, scale.replicas)
    effects: list[Effect] = []
    for body in wanted:
        child = observed.child(kind_of(body), body["metadata"]["name"])
        if child is not None and not child.ours:
            what = f"the {body['kind']} {body['metadata']['name']} exists and belongs to something else"
            return refused(
                teacher.metadata.generation,
                status,
                f"{what}; delete it, or name this Teacher differently",
                now,
                Reason.NAME_TAKEN,
            )
        if child is None or (not child.deleting and has_drifted(body, child)):
            effects.append(Apply(body))
    if any(isinstance(e, Apply) and e.body["kind"] == "Deployment" for e in effects):
        effects.insert(0, CreateSecret(shared.key(teacher), KEY_ENTRY))
    deployment = observed.child(Kind.DEPLOYMENT, name)
    ready = min(deployment.ready, scale.replicas) if deployment else 0
    after = status.model_copy(
        update={
            "observed_generation": teacher.metadata.generation,
            "address": f"{name}.{teacher.metadata.namespace}:{wire.SGLANG_PORT}",
            "desired_replicas": scale.replicas,
            "ready_replicas": ready,
            "jobs": len(requests),
            "requests": sum(requests),
            "low_since": format_time(scale.low_since) if scale.low_since else None,
            "low_peak": scale.low_peak,
            "conditions": conditions.merged(
                status.conditions,
                {
                    ConditionType.READY: _readiness(observed, ready, scale.replicas),
                    ConditionType.SPEC_VALID: Verdict(TRUE, Reason.VALID),
                },
                teacher.metadata.generation,
                now,
            ),
        }
    )
    rule = teacher.spec.autoscaling
    return SharedPlan(tuple(effects), after, seconds_to_scale_down(rule, scale, now) if rule else None)


def refused(
    generation: int,
    status: SharedTeacherStatus,
    message: str,
    now: datetime,
    reason: Reason = Reason.INVALID_SPEC,
) -> SharedPlan:
    """Nothing is made of it. What already serves is left alone."""
    verdict = Verdict(FALSE, reason, message)
    found = {ConditionType.SPEC_VALID: verdict}
    if not status.ready_replicas:
        found[ConditionType.READY] = verdict
    after = status.model_copy(
        update={
            "observed_generation": generation,
            "conditions": conditions.merged(status.conditions, found, generation, now),
        }
    )
    return SharedPlan((), after, RETRY_SECONDS)


def _scale(teacher: SharedTeacher, status: SharedTeacherStatus, requests: int, now: datetime) -> Scale:
    rule = teacher.spec.autoscaling
    if rule is None:
        return Scale(teacher.spec.replicas)
    before = Scale(status.desired_replicas or rule.min_replicas, parse_time(status.low_since), status.low_peak)
    return rescaled(rule, before, requests, now)


def _readiness(observed: Observed, ready: int, wanted: int) -> Verdict:
    """One server that answers is enough to score."""
    text = f"{ready} of {wanted} servers answer"
    if ready:
        return Verdict(TRUE, Reason.READY, text)
    return pods_problem(observed.pods_of(Role.TEACHER)) or Verdict(FALSE, Reason.NOT_READY, text)
