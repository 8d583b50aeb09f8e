"""Whose a pod is. A job's name on it is not enough: an earlier job of that name may have left it, or somebody else.

Every pod carries the uid of its owner. Those that an operator before 0.2.0 made lack it, and are known by their
controllers.
"""

from collections.abc import Iterable, Sequence

from distill_api import names
from distill_api.names import Role
from distill_operator.kinds import Kind
from distill_operator.model.observed import Child, Pod, Raw
from distill_operator.model.reading import read_pods

OF_A_JOB = "batch.kubernetes.io/controller-uid"
"""Label that the Job controller puts on each pod, and that the pod keeps when it loses its Job."""


def pods_of(raws: Iterable[Raw], owner_uid: str, children: Iterable[Child]) -> tuple[Pod, ...]:
    """Return the pods of the owner with this uid and these children, in order of their names."""
    known = list(children)
    return read_pods(raw for raw in raws if _belongs(raw, owner_uid, known))


def earlier_trainers(raws: Iterable[Raw], owner_uid: str, children: Iterable[Child]) -> tuple[Pod, ...]:
    """Return the trainer pods of the owner's name that are not its own and may still write into its run folder.

    They are of an earlier job of this name, or were made before 0.2.0 by a Job that is gone. A pod that only carries
    our labels is none of them: no Job of a trainer made it.
    """
    known = list(children)
    found = read_pods(raw for raw in raws if _is_of_a_job(raw) and not _belongs(raw, owner_uid, known))
    return tuple(p for p in found if p.role is Role.TRAINER and not p.ended)


def servers_of(raws: Iterable[Raw], teacher_uid: str) -> tuple[Pod, ...]:
    """Return the pods of the Teacher with this uid; of those made before 0.2.0, all that carry its name."""
    return read_pods(
        raw for raw in raws if raw["metadata"].get("labels", {}).get(names.LABEL_OWNER_UID, teacher_uid) == teacher_uid
    )


def _belongs(raw: Raw, owner_uid: str, children: Sequence[Child]) -> bool:
    labels = raw["metadata"].get("labels", {})
    if (uid := labels.get(names.LABEL_OWNER_UID)) is not None:
        return bool(uid == owner_uid)
    controller = _controller(raw)
    if controller.get("kind") == "ReplicaSet":
        deployment = controller.get("name", "").rpartition("-")[0]
        return any(c.ours and c.kind is Kind.DEPLOYMENT and c.name == deployment for c in children)
    return any(c.ours and c.uid and c.uid == controller.get("uid") for c in children)


def _is_of_a_job(raw: Raw) -> bool:
    labels = raw["metadata"].get("labels", {})
    return names.LABEL_OWNER_UID in labels or OF_A_JOB in labels or _controller(raw).get("kind") == "Job"


def _controller(raw: Raw) -> Raw:
    owners = raw["metadata"].get("ownerReferences", [])
    found: Raw = next((o for o in owners if o.get("controller")), {})
    return found
