"""Observation of a queue: the owner's labels, and the objects of Kueue besides its Workload."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from distill_api.job import DistillationJob
from distill_api.status import Reason
from distill_api.teacher.kind import Teacher
from distill_operator.kinds import Kind
from distill_operator.kueue import workload
from distill_operator.model.conditions import FALSE, ConditionValue
from distill_operator.model.observed import Child, Raw
from distill_operator.model.pod_sets import Placement
from distill_operator.model.queueing import Priority, Queueing
from distill_operator.resources.pod_template import user_patches
from distill_operator.runtime.cache import Cache
from distill_operator.settings import Settings

NOT_USED = ConditionValue(
    FALSE,
    Reason.KUEUE_NOT_INSTALLED,
    f"the label {workload.QUEUE_LABEL} asks for Kueue, which this installation does not use (kueue of the chart); set "
    "it, or remove the label, and it starts by itself",
)
NOT_INSTALLED = ConditionValue(
    FALSE,
    Reason.KUEUE_NOT_INSTALLED,
    "the API server knows no Workload (kueue.x-k8s.io/v1beta2); install Kueue, and it starts by itself",
)


CLASS_READ_AGAIN = timedelta(seconds=30)
"""How long a priority class is not read again: all that wait share a few."""


class Unreadable(Exception):
    """Raised for an object of the cluster that does not exist, or may not be read; the message names it."""


class QueueObserver:
    """Observes the queues of one owner after another."""

    def __init__(self, cache: Cache, settings: Settings, clock: Callable[[], datetime]) -> None:
        self._cache = cache
        self._settings = settings
        self._clock = clock
        self._classes: dict[tuple[Kind, str], tuple[datetime, Raw]] = {}
        """Priority classes, and until when each is not read again."""
        self._placements: dict[str, tuple[str, Mapping[str, Placement]]] = {}
        """By uid of the owner: what its admission adds. An edit of a flavor changes no pods that it has placed."""

    async def observe(self, owner: DistillationJob | Teacher, live: Child | None) -> Queueing:
        """Return how an owner is queued; `live` is the object under the name of its Workload."""
        queue, class_name, max_seconds = workload.labels_of(owner.metadata.labels)
        own = live if live is not None and live.ours else None
        if (not queue and own is None) or (own is not None and workload.is_true(own.content, "Finished")):
            return Queueing(queue)
        if not self._settings.kueue:
            return Queueing(queue, obstacle=NOT_USED)
        if not await self._cache.serves(Kind.WORKLOAD):
            return Queueing(queue, obstacle=NOT_INSTALLED)
        obstacle, priority, placements = None, None, self._placements.get(owner.metadata.uid, ("", {}))[1]
        try:
            if own is None or not workload.is_true(own.content, "QuotaReserved"):
                # Later it need not be known, as what has reserved quota keeps its priority.
                priority = await self._priority(owner, class_name)
            if own is not None and workload.is_true(own.content, "Admitted"):
                placements = await self._placed(owner.metadata.uid, own.content)
        except Unreadable as error:
            obstacle = ConditionValue(FALSE, Reason.WAITING_FOR_QUOTA, str(error))
        return Queueing(queue, max_seconds, priority, placements, obstacle)

    def forget(self, uid: str) -> None:
        """Forget an owner that is gone."""
        self._placements.pop(uid, None)

    async def _priority(self, owner: DistillationJob | Teacher, class_name: str) -> Priority | None:
        if class_name:
            found = await self._class(Kind.WORKLOAD_PRIORITY_CLASS, class_name)
            return Priority("kueue.x-k8s.io", "WorkloadPriorityClass", class_name, int(found["value"]))
        if name := _priority_class(owner):
            found = await self._class(Kind.PRIORITY_CLASS, name)
            return Priority("scheduling.k8s.io", "PriorityClass", name, int(found["value"]))
        return None

    async def _class(self, kind: Kind, name: str) -> Raw:
        until, known = self._classes.get((kind, name), (None, {}))
        if until is not None and self._clock() < until:
            return known
        found = await self._read(kind, name)
        self._classes[kind, name] = self._clock() + CLASS_READ_AGAIN, found
        return found

    async def _placed(self, uid: str, live: Raw) -> Mapping[str, Placement]:
        key = workload.admission_key(live)
        known, placements = self._placements.get(uid, ("", {}))
        if known != key:
            placements = {a["name"]: await self._placement(live, a) for a in workload.assignments(live)}
            self._placements[uid] = key, placements
        return placements

    async def _placement(self, live: Raw, assignment: Raw) -> Placement:
        """Return what the flavors of a pod set, its topology and the admission checks add to its pods."""
        node_selector: dict[str, str] = {}
        labels: dict[str, str] = {}
        annotations: dict[str, str] = {}
        tolerations: list[Raw] = []
        for name in sorted(set((assignment.get("flavors") or {}).values())):
            spec: dict[str, Any] = (await self._read(Kind.RESOURCE_FLAVOR, name)).get("spec") or {}
            node_selector |= spec.get("nodeLabels") or {}
            tolerations += spec.get("tolerations") or []
        for check in live.get("status", {}).get("admissionChecks", []):
            for update in check.get("podSetUpdates", []):
                if update["name"] == assignment["name"]:
                    node_selector |= update.get("nodeSelector") or {}
                    labels |= update.get("labels") or {}
                    annotations |= update.get("annotations") or {}
                    tolerations += update.get("tolerations") or []
        gated = workload.is_topology_aware(assignment)
        if gated:
            labels["kueue.x-k8s.io/podset"] = assignment["name"]
            annotations["kueue.x-k8s.io/workload"] = live["metadata"]["name"]
            asked: Raw = next((p for p in live["spec"]["podSets"] if p["name"] == assignment["name"]), {})
            if not {"required", "preferred", "unconstrained"} & (asked.get("topologyRequest") or {}).keys():
                annotations["kueue.x-k8s.io/podset-unconstrained-topology"] = "true"
        return Placement(node_selector, tuple(tolerations), labels, annotations, gated)

    async def _read(self, kind: Kind, name: str) -> Raw:
        found = await self._cache.cluster.get(kind, "", name)
        if found is None:
            raise Unreadable(f"the {kind.value.kind} {name} does not exist, or the operator may not read it")
        return found


def _priority_class(owner: DistillationJob | Teacher) -> str:
    """Return the PriorityClass of the owner's pods; the first, where roles differ."""
    if isinstance(owner, DistillationJob):
        of_job = owner.spec
        if of_job.scheduling.priority_class_name is not None:
            return of_job.scheduling.priority_class_name
        roles = [*(t.template for t in of_job.served_teachers), of_job.rollout.head_template, of_job.rollout.template]
        templates = [*roles, of_job.trainer.template]
    else:
        templates = [owner.spec.template]
    patches = (patch for template in templates for patch in reversed(user_patches(owner, template)))
    return next((str(name) for patch in patches if (name := patch.get("spec", {}).get("priorityClassName"))), "")
