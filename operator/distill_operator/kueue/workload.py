"""The Workload of an owner: one pod set for each kind of pod, made by the builders that make the pods. Pure.

Kueue counts the quota that a Workload takes by its pod sets, and admits them together or not at all.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from distill_api import names
from distill_api.base import GROUP
from distill_api.job import DistillationJob
from distill_api.teacher.kind import Teacher
from distill_operator.kinds import Kind
from distill_operator.model.observed import Raw
from distill_operator.model.pod_sets import PodSet, pod_sets
from distill_operator.model.queueing import Queueing
from distill_operator.model.times import format_time, seconds_since
from distill_operator.resources import rendering, teacher_servers
from distill_operator.resources.pod_template import Json, metadata
from distill_operator.settings import Settings

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
MAX_SECONDS_LABEL = "kueue.x-k8s.io/max-exec-time-seconds"
GENERATION = f"{GROUP}/generation"
"""Annotation of a Workload: the generation of the owner that its pod sets were computed from."""
PLACEMENT = (
    "nodeSelector", "affinity", "tolerations", "priorityClassName", "schedulerName", "runtimeClassName",
    "restartPolicy", "topologySpreadConstraints", "resourceClaims", "hostNetwork", "overhead", "resources",
)  # fmt: skip
COUNTED = ("name", "resources", "restartPolicy")
"""Fields of a container: by restartPolicy an init container is one that runs on beside the others."""
TOPOLOGY = {
    "kueue.x-k8s.io/podset-required-topology": "required",
    "kueue.x-k8s.io/podset-preferred-topology": "preferred",
    "kueue.x-k8s.io/podset-unconstrained-topology": "unconstrained",
    "kueue.x-k8s.io/podset-slice-required-topology": "podSetSliceRequiredTopology",
    "kueue.x-k8s.io/podset-slice-size": "podSetSliceSize",
    "kueue.x-k8s.io/podset-group-name": "podSetGroupName",
}
"""Annotations of a pod template by which a user asks for nodes that are near each other."""
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"


def name_of(owner: DistillationJob | Teacher) -> str:
    """Return the name of the Workload of an owner."""
    return f"{owner.kind.lower()}-{owner.metadata.name}"


def workload(owner: DistillationJob | Teacher, settings: Settings, queueing: Queueing) -> Json:
    """Return the Workload (kueue.x-k8s.io/v1beta2) of an owner that names a queue."""
    sets = [_pod_set(each) for each in owner_pod_sets(owner, settings)]
    spec: Json = {"queueName": queueing.queue, "podSets": sets}
    if queueing.max_seconds is not None:
        spec["maximumExecutionTimeSeconds"] = queueing.max_seconds
    if (priority := queueing.priority) is not None:
        spec["priority"] = priority.value
        spec["priorityClassRef"] = {"group": priority.group, "kind": priority.kind, "name": priority.name}
    kind = Kind.WORKLOAD.value
    meta = metadata(owner, name_of(owner))
    fixed = [{key: value for key, value in each.items() if key != "count"} for each in sets]
    meta["annotations"] = {
        names.ANNOTATION_SPEC_HASH: rendering.digest({"podSets": fixed}),
        GENERATION: str(owner.metadata.generation),
    }
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": meta, "spec": spec}


def owner_pod_sets(owner: DistillationJob | Teacher, settings: Settings) -> list[PodSet]:
    """Return the pod sets of all pods that an owner may have at once."""
    if isinstance(owner, Teacher):
        rule = owner.spec.autoscaling
        most = rule.max_replicas if rule else owner.spec.replicas
        return pod_sets(teacher_servers.deployment(owner, settings, most))
    children = (*rendering.serving(owner, settings), rendering.training(owner, settings, 1))
    return [each for child in children for each in pod_sets(child)]


def _pod_set(of: PodSet) -> Json:
    """Return a pod set with what tells of place and amount alone: a Workload is kept for as long as its job."""
    spec = of.template["spec"]
    containers = {
        kind: [{key: c[key] for key in COUNTED if key in c} for c in spec[kind]]
        for kind in ("containers", "initContainers")
        if kind in spec
    }
    found: Json = {
        "name": of.name,
        "count": of.count,
        "template": {"spec": {**containers, **{key: spec[key] for key in PLACEMENT if key in spec}}},
    }
    if request := _topology_request(of):
        found["topologyRequest"] = request
    return found


def _topology_request(of: PodSet) -> Json:
    """Return what the annotations of the pods ask of their topology, as Kueue's own integrations read them."""
    annotations = of.template["metadata"].get("annotations", {})
    found: Json = {field: annotations[key] for key, field in TOPOLOGY.items() if key in annotations}
    if "unconstrained" in found:
        found["unconstrained"] = found["unconstrained"] == "true"
    if str(found.get("podSetSliceSize", "")).isdecimal():
        found["podSetSliceSize"] = int(found["podSetSliceSize"])
    if found and of.name == "trainer":
        found["podIndexLabel"] = COMPLETION_INDEX
    return found


# What is written into the status of a Workload. The fields that Kueue's scheduler has written stay as they are.


def condition(live: Raw, condition_type: str) -> Raw:
    """Return a condition of a Workload; empty where it has none of the type."""
    found: Iterable[Raw] = live.get("status", {}).get("conditions", [])
    return next((c for c in found if c["type"] == condition_type), {})


def is_true(live: Raw, condition_type: str) -> bool:
    """Return whether a condition of a Workload is True."""
    return condition(live, condition_type).get("status") == "True"


def with_conditions(live: Raw, now: datetime, *changes: Json, **status: Any) -> Json:
    """Return the patch that writes conditions, and fields of the status besides."""
    found = {c["type"]: dict(c) for c in live.get("status", {}).get("conditions", [])}
    for change in changes:
        before = found.get(change["type"], {})
        kept = before.get("lastTransitionTime") if before.get("status") == change["status"] else None
        found[change["type"]] = {
            **change,
            "lastTransitionTime": kept or format_time(now),
            "observedGeneration": live["metadata"].get("generation", 0),
        }
    meta = {key: live["metadata"][key] for key in ("uid", "resourceVersion")}
    return {"metadata": meta, "status": {"conditions": list(found.values()), **status}}


def released(live: Raw, now: datetime) -> Json:
    """Return the patch that ends the reservation of an evicted Workload, as Kueue's jobframework does.

    Kueue then queues it again: at once after a preemption, else when its reason for the eviction is over.
    """
    eviction = condition(live, "Evicted")
    again = eviction["reason"] in ("Preempted", "NodeFailures")
    message = str(eviction.get("message", ""))
    admitted = condition(live, "Admitted")
    changes = [
        _condition("QuotaReserved", "False", "Pending", message),
        _condition("Requeued", str(again), eviction["reason"], message),
    ]
    status: Json = {"admission": None}
    if admitted.get("status") == "True":
        changes.append(_condition("Admitted", "False", "NoReservation", "The workload has no reservation"))
        past = live.get("status", {}).get("accumulatedPastExecutionTimeSeconds", 0)
        status["accumulatedPastExecutionTimeSeconds"] = past + int(seconds_since(admitted["lastTransitionTime"], now))
    if is_true(live, "PodsReady"):
        changes.append(pods_ready(live, ready=False))
    return with_conditions(live, now, *changes, **status)


def pods_ready(live: Raw, *, ready: bool) -> Json:
    """Return the condition PodsReady: who was ready once, and is not, recovers."""
    before = condition(live, "PodsReady")
    recovers = before.get("reason") in ("WaitForRecovery", "Recovered")
    if ready:
        reason = "Recovered" if recovers else "Started"
        return _condition("PodsReady", "True", reason, "All pods are ready")
    was_ready = before.get("status") == "True" and is_true(live, "Admitted") and not is_true(live, "Evicted")
    waits = was_ready or (recovers and is_true(live, "Admitted"))
    return _condition("PodsReady", "False", "WaitForRecovery" if waits else "WaitForStart", "Not all pods are ready")


def finished(message: str, *, success: bool) -> Json:
    """Return the condition Finished, with which Kueue releases the quota for good."""
    return _condition("Finished", "True", "Succeeded" if success else "Failed", message)


def _condition(condition_type: str, status: str, reason: str, message: str) -> Json:
    return {"type": condition_type, "status": status, "reason": reason, "message": message[:32768]}


def labels_of(labels: Mapping[str, str]) -> tuple[str, str, int | None]:
    """Return what an owner's labels say: the queue, the WorkloadPriorityClass, and for how long it may be admitted."""
    seconds = labels.get(MAX_SECONDS_LABEL, "")
    return labels.get(QUEUE_LABEL, ""), labels.get(PRIORITY_LABEL, ""), int(seconds) if seconds.isdecimal() else None


def assignments(live: Raw) -> list[Raw]:
    """Return what Kueue has assigned to each pod set; nothing while no quota is reserved."""
    found = (live.get("status", {}).get("admission") or {}).get("podSetAssignments", [])
    return list(found)


def admission_key(live: Raw) -> str:
    """Return what stays the same while an admission asks the same of the pods."""
    parts = [
        [a["name"], sorted(set((a.get("flavors") or {}).values())), is_topology_aware(a)] for a in assignments(live)
    ]
    updates = [check.get("podSetUpdates", []) for check in live.get("status", {}).get("admissionChecks", [])]
    return json.dumps([live["metadata"]["uid"], parts, updates], sort_keys=True)


def is_topology_aware(assignment: Raw) -> bool:
    """Return whether Kueue chooses a node for each pod of an assignment."""
    return bool(assignment.get("topologyAssignment") or assignment.get("delayedTopologyRequest"))
