"""Upkeep of a job's children: the effects that make each as it should be, and those that remove it. Pure."""

from collections.abc import Iterable

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.status import Reason
from distill_operator.distillationjob import readiness
from distill_operator.kinds import Kind, kind_of
from distill_operator.model.conditions import FALSE, ConditionValue
from distill_operator.model.observed import Child, Observed, Raw
from distill_operator.resources import pinning, rendering
from distill_operator.resources.drift import has_drifted
from distill_operator.resources.pod_template import KEY_ENTRY, Json
from distill_operator.runtime.effects import Apply, CreateSecret, Delete, Effect

SERVING = frozenset({Kind.DEPLOYMENT, Kind.RAY_CLUSTER})


def repairs(
    job: DistillationJob,
    observed: Observed,
    wanted: list[Json],
    trainer: Json,
    *,
    under_way: bool,
    unplaced: bool = False,
) -> list[Effect]:
    """Return what makes the children as they should be.

    `wanted` are those besides the trainer Job; `under_way` says that the attempt has pods, so that it keeps what it
    began with; `unplaced` that where its pods belong cannot be read, so that no child with pods is made.
    """
    effects: list[Effect] = []
    for body in wanted:
        if kind_of(body) is Kind.RAY_CLUSTER and not observed.kuberay_installed:
            continue
        if unplaced and kind_of(body) in pinning.WITH_PODS and existing(body, observed) is None:
            continue
        effects += _repair(body, observed, under_way)
    if any(isinstance(e, Apply) and kind_of(e.body) in SERVING for e in effects):
        # Whether the Secret exists is not read: it is asked for whenever pods are made that use it.
        effects.insert(0, CreateSecret(rendering.key(job), KEY_ENTRY))
    if existing(trainer, observed) or (readiness.trainer_may_start(job, observed) and not unplaced):
        # A Job's pods cannot be changed; what somebody changed by hand of one of ours can be put right.
        effects += _repair(trainer, observed, under_way)
    return effects


def _repair(body: Json, observed: Observed, under_way: bool) -> list[Apply]:
    """Return at most one Apply: of a child that is missing, or is not what it should be."""
    child = existing(body, observed)
    if child is None:
        return [Apply(body)]
    desired = pinning.pinned(body, child) if under_way else body
    return [Apply(desired)] if not child.deleting and has_drifted(desired, child) else []


def deletions(children: Iterable[Child]) -> tuple[Delete, ...]:
    """Return the deletions of children that are not being deleted already."""
    return tuple(Delete(c.kind, c.name, c.uid) for c in children if not c.deleting)


def existing(body: Json, observed: Observed) -> Child | None:
    """Return the live object under the name of a rendered child."""
    return observed.child(kind_of(body), body["metadata"]["name"])


def role_of(body: Raw) -> Role:
    """Return the role of a rendered child; that of the trainer for what belongs to all."""
    return Role(body["metadata"]["labels"].get(names.LABEL_ROLE, Role.TRAINER.value))


def name_taken(wanted: list[Json], observed: Observed) -> tuple[Role, ConditionValue] | None:
    """Return the role and condition of the first child whose name a foreign object has.

    Server-side apply would take that object over, so it is never asked to.
    """
    for body in wanted:
        child = existing(body, observed)
        if child is not None and not child.ours:
            what = f"{body['kind']} {body['metadata']['name']}"
            if child.belongs_to_earlier(body["metadata"]["ownerReferences"][0]):
                text = f"the {what} is of an earlier job of this name, and goes with it"
                return role_of(body), ConditionValue(FALSE, Reason.NOT_READY, text)
            text = f"the {what} exists and belongs to something else; delete it, or name this job differently"
            return role_of(body), ConditionValue(FALSE, Reason.NAME_TAKEN, text)
    return None
