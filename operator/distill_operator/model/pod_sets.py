"""Pod sets: the kinds of pods that a child makes, under the names by which Kueue admits and places them. Pure.

Kueue admits a set of equal pods, and says by flavor and topology where each set is to run.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill_api import names
from distill_operator.kinds import Kind, kind_of

Json = dict[str, Any]
Raw = Mapping[str, Any]
TOPOLOGY_GATE = "kueue.x-k8s.io/topology"
"""Scheduling gate that Kueue takes away from each pod once it has chosen the pod's node."""


@dataclass(frozen=True)
class PodSet:
    """Equal pods of a child."""

    name: str
    count: int
    template: Json


@dataclass(frozen=True)
class Placement:
    """What an admission adds to the pods of a set."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Raw, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    gated: bool = False
    """Kueue chooses a node for each pod, which waits for that."""


def pod_sets(child: Json) -> list[PodSet]:
    """Return the pod sets of a Deployment, a RayCluster or a Job."""
    spec = child["spec"]
    match kind_of(child):
        case Kind.RAY_CLUSTER:
            groups = (PodSet(g["groupName"], g["replicas"], g["template"]) for g in spec["workerGroupSpecs"])
            return [PodSet("head", 1, spec["headGroupSpec"]["template"]), *groups]
        case Kind.JOB:
            return [PodSet("trainer", spec["completions"], spec["template"])]
        case _:
            return [PodSet(_of_servers(child), spec["replicas"], spec["template"])]


def placed(child: Json, placements: Mapping[str, Placement]) -> Json:
    """Return the child with its pods where their admission places them."""
    if not any(each.name in placements for each in pod_sets(child)):
        return child
    # Parts of it may be the owner's own.
    child = copy.deepcopy(child)
    for each in pod_sets(child):
        if each.name in placements:
            _place(each.template, placements[each.name])
    return child


def _place(template: Json, placement: Placement) -> None:
    meta, spec = template.setdefault("metadata", {}), template["spec"]
    for where, key, added in (
        (spec, "nodeSelector", placement.node_selector),
        (meta, "labels", placement.labels),
        (meta, "annotations", placement.annotations),
    ):
        if added:
            where[key] = {**(where.get(key) or {}), **added}
    known = spec.get("tolerations") or []
    if more := [dict(each) for each in placement.tolerations if each not in known]:
        spec["tolerations"] = [*known, *more]
    if placement.gated:
        spec["schedulingGates"] = [*(spec.get("schedulingGates") or []), {"name": TOPOLOGY_GATE}]


def _of_servers(child: Json) -> str:
    """Return the name of a Deployment's pods: teacher, or teacher-NAME of a job that has several."""
    owner = child["metadata"]["ownerReferences"][0]["name"]
    name = str(child["metadata"]["name"])
    return "teacher" if name == names.shared_teacher(owner) else name.removeprefix(f"{owner}-")
