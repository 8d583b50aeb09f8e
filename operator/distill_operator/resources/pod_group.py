"""The group of pods that a gang scheduler places whole or not at all, and what makes a pod a member of it.

The group's name, its labels and annotations are each scheduler's own: scheduler-plugins' coscheduling
(scheduling.x-k8s.io/v1alpha1), Volcano (scheduling.volcano.sh/v1beta1) and KAI (scheduling.run.ai/v2alpha2, whose
pod grouper must be told that the group is made by somebody else: kai.scheduler/skip-podgrouper).
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

from distill_api import names
from distill_api.job import DistillationJob
from distill_api.names import Role
from distill_api.spec.scheduling import Gang, GangScope
from distill_operator.kinds import Kind
from distill_operator.resources.pod_template import Json, metadata, selector

AFFINITY_WEIGHT = 100
"""Weight of the affinity: the greatest that there is, as nothing else of ours competes with it."""


@dataclass(frozen=True)
class Dialect:
    """What one gang scheduler wants of its groups and pods. GROUP and QUEUE stand for the names."""

    kind: Kind
    scheduler: str
    """Scheduler name under which its own chart installs it."""
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


GROUP, QUEUE = "{group}", "{queue}"
DIALECTS = {
    Gang.SCHEDULER_PLUGINS: Dialect(
        Kind.COSCHEDULING_GROUP, "scheduler-plugins-scheduler", labels={"scheduling.x-k8s.io/pod-group": GROUP}
    ),
    Gang.VOLCANO: Dialect(Kind.VOLCANO_GROUP, "volcano", annotations={"scheduling.k8s.io/group-name": GROUP}),
    Gang.KAI: Dialect(
        Kind.KAI_GROUP,
        "kai-scheduler",
        labels={"kai.scheduler/queue": QUEUE},
        annotations={"pod-group-name": GROUP, "kai.scheduler/skip-podgrouper": "true"},
    ),
}
KINDS = frozenset(dialect.kind for dialect in DIALECTS.values())


def dialect(job: DistillationJob) -> Dialect | None:
    """Return the dialect of the job's gang scheduler; None where pods are placed one by one."""
    return DIALECTS.get(job.spec.scheduling.gang)


def pod_group(job: DistillationJob, children: Iterable[Json]) -> Json | None:
    """Return the group of those children whose pods belong to it; None without a gang."""
    found = dialect(job)
    if found is None:
        return None
    scheduling = job.spec.scheduling
    spec: Json = {"minMember": sum(_pods(child) for child in children if _is_member(job, child))}
    if scheduling.queue is not None:
        spec["queue"] = scheduling.queue
    if scheduling.priority_class_name is not None and found.kind is not Kind.COSCHEDULING_GROUP:
        spec["priorityClassName"] = scheduling.priority_class_name
    return {
        "apiVersion": found.kind.value.api_version,
        "kind": found.kind.value.kind,
        "metadata": metadata(job, names.pod_group(job.metadata.name)),
        "spec": spec,
    }


def placed(job: DistillationJob, child: Json) -> Json:
    """Return the child with its pods as spec.scheduling wants them placed. What a role's template says goes before."""
    scheduling, found = job.spec.scheduling, dialect(job)
    if found is None and scheduling.priority_class_name is None and scheduling.topology_key is None:
        return child
    # Parts of it may be the job's own.
    child = copy.deepcopy(child)
    for template in _templates(child):
        spec = template["spec"]
        if scheduling.priority_class_name is not None:
            spec.setdefault("priorityClassName", scheduling.priority_class_name)
        if found is not None and _is_member(job, child):
            spec.setdefault("schedulerName", found.scheduler)
            template["metadata"]["labels"] |= _named(job, found.labels)
            template["metadata"]["annotations"] |= _named(job, found.annotations)
        if scheduling.topology_key is not None and _role(child) is Role.TRAINER:
            _keep_near(job, spec, scheduling.topology_key)
    return child


def _keep_near(job: DistillationJob, spec: Json, topology_key: str) -> None:
    near = {
        "weight": AFFINITY_WEIGHT,
        "podAffinityTerm": {
            "topologyKey": topology_key,
            "labelSelector": {"matchLabels": selector(job, Role.TRAINER)},
        },
    }
    affinity = spec.setdefault("affinity", {}).setdefault("podAffinity", {})
    affinity.setdefault("preferredDuringSchedulingIgnoredDuringExecution", []).append(near)


def _named(job: DistillationJob, entries: dict[str, str]) -> dict[str, str]:
    values = {GROUP: names.pod_group(job.metadata.name), QUEUE: job.spec.scheduling.queue or ""}
    return {key: values.get(value, value) for key, value in entries.items()}


def _is_member(job: DistillationJob, child: Json) -> bool:
    return job.spec.scheduling.scope is GangScope.JOB or _role(child) is Role.TRAINER


def _role(child: Json) -> Role:
    return Role(child["metadata"]["labels"][names.LABEL_ROLE])


def _templates(child: Json) -> list[Json]:
    spec = child["spec"]
    if child["kind"] == Kind.RAY_CLUSTER.value.kind:
        return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return [spec["template"]]


def _pods(child: Json) -> int:
    """Return how many pods the child asks for."""
    spec = child["spec"]
    if child["kind"] == Kind.RAY_CLUSTER.value.kind:
        return 1 + sum(int(group["replicas"]) for group in spec["workerGroupSpecs"])
    return int(spec["completions"] if child["kind"] == Kind.JOB.value.kind else spec["replicas"])
