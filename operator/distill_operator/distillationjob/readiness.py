"""Whether each role is up, and if not, why: small checks in order of how much their answer explains."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import Reason
from distill_operator.model.conditions import FALSE, TRUE, Verdict
from distill_operator.model.observed import Child, Claim, Disruption, Observed, Pod, newest_disruption
from distill_operator.model.pod_problems import no_pods, pods_problem
from distill_operator.runtime.kinds import Kind
from distill_operator.teacher import view as shared_view

QUOTA = "exceeded quota"
"""As the API server's quota admission says it."""


@dataclass(frozen=True)
class RoleState:
    """One role at one moment."""

    role: Role
    desired: int
    ready: int
    verdict: Verdict
    disruption: Disruption | None = None
    """The newest that is still to be seen."""


def roles(job: DistillationJob, observed: Observed, attempt: int) -> list[RoleState]:
    """Teacher, rollout, trainer."""
    found = [_teacher(job, observed), _rollout(job, observed), _trainer(job, observed, attempt)]
    shared = [view.disruption for view in shared_view.views(job, observed) if view.disruption]

    def newest(role: Role) -> Disruption | None:
        own = disruption(observed, role, attempt)
        seen = [*([own] if own else []), *(shared if role is Role.TEACHER else [])]
        return max(seen, key=lambda d: d.time, default=None)

    return [replace(state, disruption=newest(state.role)) for state in found]


def disruption(observed: Observed, role: Role, attempt: int) -> Disruption | None:
    """Of the job's own pods of a role."""
    return newest_disruption(
        p for p in observed.pods if p.role is role and (role is not Role.TRAINER or p.attempt == attempt)
    )


def obstacle(job: DistillationJob, observed: Observed) -> tuple[Role, Verdict] | None:
    """What forbids to start anything: known before the first pod, so none is left waiting with an accelerator."""
    if not observed.kuberay_installed:
        return Role.ROLLOUT, KUBERAY_MISSING
    if observed.gang_problem:
        return Role.TRAINER, Verdict(FALSE, Reason.GANG_NOT_INSTALLED, observed.gang_problem)
    for view in shared_view.views(job, observed):
        if view.verdict.reason in shared_view.NEVER_SERVES:
            return Role.TEACHER, view.verdict
    volume = job.spec.output.volume
    if volume is not None and (message := _claim_problem(volume.claim_name, observed.claim)):
        return Role.TRAINER, Verdict(FALSE, Reason.VOLUME_NOT_BOUND, message)
    return None


KUBERAY_MISSING = Verdict(
    FALSE,
    Reason.KUBERAY_NOT_INSTALLED,
    "the API server knows no RayCluster (ray.io/v1); install the KubeRay operator, and the job starts by itself",
)


def trainer_may_start(job: DistillationJob, observed: Observed) -> bool:
    """At once as a member of one group with the others, none of which gets a node without it: but a Teacher is in no
    group of a job's."""
    placed = all(view.placed for view in shared_view.views(job, observed))
    return placed and (job.spec.scheduling.all_at_once or all_scheduled(job, observed))


def all_scheduled(job: DistillationJob, observed: Observed) -> bool:
    """Every pod of own teachers and rollout has its node, so a trainer would not hold accelerators in vain."""
    teachers = [p for p in observed.pods_of(Role.TEACHER) if p.scheduled]
    rollout = [p for p in observed.pods_of(Role.ROLLOUT) if p.scheduled]
    heads = [p for p in rollout if p.head]
    return (
        len(teachers) >= sum(t.replicas for t in job.spec.served_teachers)
        and bool(heads)
        and len(rollout) - len(heads) >= job.spec.rollout.replicas
    )


def _teacher(job: DistillationJob, observed: Observed) -> RoleState:
    """The job's own, those that it shares, and those of which it knows no more than the address."""
    own = _own_teachers(job, observed)
    shared = [view.verdict for view in shared_view.views(job, observed)]
    desired = own.desired + len(shared)
    ready = own.ready + sum(verdict.status is TRUE for verdict in shared)
    verdicts = [*([own.verdict] if own.desired else []), *shared]
    if lacking := next((verdict for verdict in verdicts if verdict.status is not TRUE), None):
        return RoleState(Role.TEACHER, desired, ready, lacking)
    said = [verdict.message for verdict in verdicts]
    if far := [t.title for t in job.spec.all_teachers if t.endpoint is not None]:
        said.append(f"{', '.join(far)}: not the job's own, so the trainer's preflight judges")
    reason = Reason.READY if verdicts else Reason.EXTERNAL
    return RoleState(Role.TEACHER, desired, ready, Verdict(TRUE, reason, "; ".join(said)))


def _own_teachers(job: DistillationJob, observed: Observed) -> RoleState:
    served = job.spec.served_teachers
    found = {t.name: observed.child(Kind.DEPLOYMENT, names.teacher(job.metadata.name, t.name)) for t in served}
    # One that has more than it needs is no help to another.
    ready = sum(min(child.ready, t.replicas) for t in served if (child := found[t.name]) is not None)
    children = [child for child in found.values() if child is not None]
    desired = sum(t.replicas for t in served)
    return _serving_role(Role.TEACHER, desired, ready, observed.pods_of(Role.TEACHER), children)


def _rollout(job: DistillationJob, observed: Observed) -> RoleState:
    desired = job.spec.rollout.replicas
    if not observed.kuberay_installed:
        return RoleState(Role.ROLLOUT, desired, 0, KUBERAY_MISSING)
    child = observed.child(Kind.RAY_CLUSTER, names.ray_cluster(job.metadata.name))
    ready = child.ready if child else 0
    return _serving_role(Role.ROLLOUT, desired, ready, observed.pods_of(Role.ROLLOUT), [child] if child else [])


def _serving_role(role: Role, desired: int, ready: int, pods: Sequence[Pod], children: Sequence[Child]) -> RoleState:
    if ready >= desired:
        return RoleState(role, desired, ready, Verdict(TRUE, Reason.READY, f"{ready} of {desired} are ready"))
    waiting = Verdict(FALSE, Reason.NOT_READY, f"{ready} of {desired} are ready")
    return RoleState(role, desired, ready, pods_problem(pods) or no_pods(children) or waiting)


def _trainer(job: DistillationJob, observed: Observed, attempt: int) -> RoleState:
    desired = job.spec.trainer.nodes
    child = observed.child(Kind.JOB, names.trainer_job(job.metadata.name, attempt))
    if child is None or not child.ours:
        text = "the trainer starts when every pod of the teacher and of the rollout engines has a node"
        return RoleState(Role.TRAINER, desired, 0, Verdict(FALSE, Reason.WAITING_FOR_ROLES, text))
    ready = min(child.ready, desired)
    if ready >= desired:
        return RoleState(Role.TRAINER, desired, ready, Verdict(TRUE, Reason.READY, f"{ready} of {desired} are ready"))
    waiting = Verdict(FALSE, Reason.NOT_READY, f"{ready} of {desired} are ready")
    problem = pods_problem(observed.pods_of(Role.TRAINER, attempt))
    return RoleState(Role.TRAINER, desired, ready, problem or waiting)


def _claim_problem(name: str, claim: Claim) -> str:
    if claim is Claim.ABSENT:
        return f"the PersistentVolumeClaim {name} (spec.output.volume) does not exist; create it in the job's namespace"
    if claim is Claim.PENDING:
        why = f"`kubectl describe pvc {name}` says why"
        return f"the PersistentVolumeClaim {name} (spec.output.volume) is not bound; {why}"
    return ""
