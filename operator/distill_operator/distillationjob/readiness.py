"""Readiness of the roles, and why one is not ready: small checks in order of how much their answer explains. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import Reason
from distill_api.teacher.student import engines_score
from distill_operator.distillationjob import handover
from distill_operator.kinds import Kind
from distill_operator.model.conditions import FALSE, TRUE, ConditionValue
from distill_operator.model.observed import Child, Claim, Disruption, Observed, Outcome, Pod, newest_disruption
from distill_operator.model.pod_problems import no_pods, pods_problem
from distill_operator.teacher import view as teacher_view

SLOW = frozenset({Reason.NOT_READY, Reason.WAITING_FOR_ROLES})
"""Reasons of a role that may become ready by itself, as far as is known."""


@dataclass(frozen=True)
class RoleState:
    """Snapshot of one role: how many of its pods are desired and ready, and its condition."""

    role: Role
    desired: int
    ready: int
    condition: ConditionValue
    disruption: Disruption | None = None
    """The newest disruption that the role's pods tell of."""


def roles(job: DistillationJob, observed: Observed, attempt: int) -> list[RoleState]:
    """Return the states of teacher, rollout and trainer."""
    found = [_teacher(job, observed), _rollout(job, observed), _trainer(job, observed, attempt)]
    of_teachers = [view.disruption for view in teacher_view.views(job, observed) if view.disruption]

    def newest(role: Role) -> Disruption | None:
        own = disruption(observed, role, attempt)
        all_found = [*([own] if own else []), *(of_teachers if role is Role.TEACHER else [])]
        return max(all_found, key=lambda d: d.time, default=None)

    return [replace(state, disruption=newest(state.role)) for state in found]


def at_fault(states: Iterable[RoleState]) -> RoleState | None:
    """Return the role that keeps the others waiting: one with a problem before one that only takes its time."""
    lacking = [s for s in states if s.condition.status is not TRUE]
    return next((s for s in lacking if s.condition.reason not in SLOW), lacking[0] if lacking else None)


def disruption(observed: Observed, role: Role, attempt: int) -> Disruption | None:
    """Return the newest disruption of the job's own pods of a role."""
    return newest_disruption(
        p for p in observed.pods if p.role is role and (role is not Role.TRAINER or p.attempt == attempt)
    )


def obstacle(job: DistillationJob, observed: Observed) -> tuple[Role, ConditionValue] | None:
    """Return the role and condition of what forbids to start anything; None where nothing does.

    It is known before the first pod, so none is left waiting with an accelerator.
    """
    if not observed.kuberay_installed:
        return Role.ROLLOUT, KUBERAY_MISSING
    if observed.gang_problem:
        return Role.TRAINER, ConditionValue(FALSE, Reason.GANG_NOT_INSTALLED, observed.gang_problem)
    for view in teacher_view.views(job, observed):
        if view.condition.reason in teacher_view.NEVER_SERVES:
            return Role.TEACHER, view.condition
    volume = job.spec.output.volume
    if volume is not None and (message := _claim_problem(volume.claim_name, observed.claim)):
        return Role.TRAINER, ConditionValue(FALSE, Reason.VOLUME_NOT_BOUND, message)
    return None


KUBERAY_MISSING = ConditionValue(
    FALSE,
    Reason.KUBERAY_NOT_INSTALLED,
    "the API server knows no RayCluster (ray.io/v1); install the KubeRay operator, and the job starts by itself",
)


def trainer_may_start(job: DistillationJob, observed: Observed) -> bool:
    """Return whether the trainer may be made: once all others have nodes, and no other trainer may still run.

    At once where it is in one group with them, none of which gets a node without it; but a Teacher is in no group of a
    job's.
    """
    placed = all(view.placed for view in teacher_view.views(job, observed)) and not handover.trainers_left(observed)
    return placed and (job.spec.scheduling.all_at_once or all_scheduled(job, observed))


def all_scheduled(job: DistillationJob, observed: Observed) -> bool:
    """Return whether each pod of own teachers and rollout has a node, so that a trainer would not wait for it."""
    # A pod that was evicted stays, ended, with its node in it.
    teachers = [p for p in observed.pods_of(Role.TEACHER) if p.scheduled and not p.ended]
    rollout = [p for p in observed.pods_of(Role.ROLLOUT) if p.scheduled and not p.ended]
    heads = [p for p in rollout if p.head]
    return (
        len(teachers) >= sum(t.replicas for t in job.spec.served_teachers)
        and bool(heads)
        and len(rollout) - len(heads) >= job.spec.rollout.replicas
    )


def _teacher(job: DistillationJob, observed: Observed) -> RoleState:
    """Return the state of the job's own teachers, the Teachers that it names, and external endpoints together."""
    own = _own_teachers(job, observed)
    named = [view.condition for view in teacher_view.views(job, observed)]
    desired = own.desired + len(named)
    ready = own.ready + sum(condition.status is TRUE for condition in named)
    values = [*([own.condition] if own.desired else []), *named]
    if lacking := next((condition for condition in values if condition.status is not TRUE), None):
        return RoleState(Role.TEACHER, desired, ready, lacking)
    messages = [condition.message for condition in values]
    if external := [t.title for t in job.spec.live_teachers if t.endpoint is not None]:
        messages.append(f"{', '.join(external)}: not the job's own, so the trainer's preflight judges")
    if not job.spec.live_teachers:
        messages.append("all scores are precomputed (objective.teacherLogprobs): no teacher is needed")
    if engines_score(job.spec):
        messages.append("the teacher is the student itself (teacher.student): the rollout engines score")
    reason = Reason.READY if values else Reason.EXTERNAL
    return RoleState(Role.TEACHER, desired, ready, ConditionValue(TRUE, reason, "; ".join(messages)))


def _own_teachers(job: DistillationJob, observed: Observed) -> RoleState:
    served = job.spec.served_teachers
    found = {t.name: observed.child(Kind.DEPLOYMENT, names.teacher(job.metadata.name, t.name)) for t in served}
    # A teacher that has more servers than it needs is no help to another.
    ready = sum(min(child.ready, t.replicas) for t in served if (child := found[t.name]) is not None)
    children = [child for child in found.values() if child is not None]
    desired = sum(t.replicas for t in served)
    return _serving_role(Role.TEACHER, desired, ready, observed.pods_of(Role.TEACHER), children)


def _rollout(job: DistillationJob, observed: Observed) -> RoleState:
    desired = job.spec.rollout.replicas
    if not observed.kuberay_installed:
        return RoleState(Role.ROLLOUT, desired, 0, KUBERAY_MISSING)
    child = observed.child(Kind.RAY_CLUSTER, names.ray_cluster(job.metadata.name))
    pods = observed.pods_of(Role.ROLLOUT)
    ready = max(child.ready, min(_ready_engines(pods), desired)) if child else 0
    return _serving_role(Role.ROLLOUT, desired, ready, pods, [child] if child else [])


def _ready_engines(pods: Sequence[Pod]) -> int:
    """Return how many engines are ready by their pods; none serves without a head.

    After an API server was away, KubeRay may write the status of a RayCluster eleven minutes late: it retries conflicts
    with what it still has in its cache, each time after twice as long.
    """
    ready = [pod for pod in pods if pod.ready and not pod.deleting]
    heads = sum(pod.head for pod in ready)
    return len(ready) - heads if heads else 0


def _serving_role(role: Role, desired: int, ready: int, pods: Sequence[Pod], children: Sequence[Child]) -> RoleState:
    if ready >= desired:
        return RoleState(role, desired, ready, ConditionValue(TRUE, Reason.READY, f"{ready} of {desired} are ready"))
    waiting = ConditionValue(FALSE, Reason.NOT_READY, f"{ready} of {desired} are ready")
    return RoleState(role, desired, ready, pods_problem(pods) or no_pods(children) or waiting)


def _trainer(job: DistillationJob, observed: Observed, attempt: int) -> RoleState:
    desired = job.spec.trainer.nodes
    child = observed.child(Kind.JOB, names.trainer_job(job.metadata.name, attempt))
    if child is None or not child.ours:
        text = "the trainer starts when every pod of the teacher and of the rollout engines has a node"
        return RoleState(Role.TRAINER, desired, 0, ConditionValue(FALSE, Reason.WAITING_FOR_ROLES, text))
    ready = min(child.ready, desired)
    if ready >= desired:
        return RoleState(
            Role.TRAINER, desired, ready, ConditionValue(TRUE, Reason.READY, f"{ready} of {desired} are ready")
        )
    waiting = ConditionValue(FALSE, Reason.NOT_READY, f"{ready} of {desired} are ready")
    problem = pods_problem(observed.pods_of(Role.TRAINER, attempt))
    refused = no_pods([child]) if child.outcome is Outcome.ACTIVE else None
    return RoleState(Role.TRAINER, desired, ready, problem or refused or waiting)


def _claim_problem(name: str, claim: Claim) -> str:
    if claim is Claim.ABSENT:
        return f"the PersistentVolumeClaim {name} (spec.output.volume) does not exist; create it in the job's namespace"
    if claim is Claim.DELETING:
        return f"the PersistentVolumeClaim {name} (spec.output.volume) is being deleted; create it again"
    if claim is Claim.PENDING:
        why = f"`kubectl describe pvc {name}` says why"
        return f"the PersistentVolumeClaim {name} (spec.output.volume) is not bound; {why}"
    return ""
