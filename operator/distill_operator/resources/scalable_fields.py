"""Scalable fields: the counts in a child that its user may change while an attempt is under way. Pure.

The rest of a child is fixed for the attempt. Its hash tells, whatever the counts are, whether the operator that wrote
the child would render it the same way today.
"""

import copy
from typing import Any

from distill_api.spec.job_spec import Spec
from distill_operator.kinds import Kind, kind_of
from distill_operator.resources import configmap, pod_group
from distill_operator.resources.pod_template import Json

COUNTS = frozenset({"replicas", "minReplicas", "maxReplicas", "minMember"})
"""The scalable fields of a Deployment, a RayCluster's groups, a group of pods, and each part of a job that has pods."""
COUNTED = frozenset({Kind.DEPLOYMENT, *pod_group.KINDS})
"""Kinds whose spec itself holds scalable fields."""
MUTABLE = frozenset(Spec.model_fields[name].alias or name for name in Spec.mutable or ())
PARTS = ("rollout", "teacher")
"""Parts of a job's spec that hold scalable fields; so does each entry of teachers."""


def without_scalable_fields(child: Json) -> Json:
    """Return the child without what its user may change; the child itself where that is nothing."""
    if kind_of(child) is Kind.CONFIG_MAP:
        manifest = configmap.manifest(child)
        return child if manifest is None else {**child, "data": {**manifest, "spec": _fixed_spec(manifest["spec"])}}
    spec = child.get("spec", {})
    if kind_of(child) is Kind.RAY_CLUSTER:
        return {**child, "spec": {**spec, "workerGroupSpecs": [_fixed(group) for group in spec["workerGroupSpecs"]]}}
    return {**child, "spec": _fixed(spec)} if kind_of(child) in COUNTED else child


def with_scalable_fields_of(child: Json, source: Json) -> Json:
    """Return `child` with the scalable fields of `source`, which is the same child as another operator renders it.

    Return `source` itself where the child cannot be read, as somebody spoiled it.
    """
    try:
        return _with_scalable_fields_of(child, source)
    except (KeyError, TypeError, AttributeError):
        return source


def _with_scalable_fields_of(child: Json, source: Json) -> Json:
    if kind_of(child) is Kind.CONFIG_MAP:
        mine, theirs = configmap.manifest(child), configmap.manifest(source)
        if mine is None or theirs is None:
            return source
        spec = _counted_spec(mine["spec"], theirs["spec"])
        return child if spec == mine["spec"] else {**child, "data": configmap.data({**mine, "spec": spec})}
    found = copy.deepcopy(child)
    if kind_of(child) is Kind.RAY_CLUSTER:
        wanted = {group["groupName"]: group for group in source["spec"]["workerGroupSpecs"]}
        for group in found["spec"].get("workerGroupSpecs", []):
            group |= _counts(wanted.get(group["groupName"], {}))
    elif kind_of(child) in COUNTED:
        found["spec"] |= _counts(source["spec"])
    return found


def _counts(part: Json) -> Json:
    return {key: value for key, value in part.items() if key in COUNTS}


def _fixed(part: Json) -> Json:
    return {key: value for key, value in part.items() if key not in COUNTS}


def _fixed_spec(spec: Json) -> Json:
    found = {key: value for key, value in spec.items() if key not in MUTABLE}
    found |= {key: _fixed(spec[key]) for key in PARTS if spec.get(key)}
    return {**found, "teachers": [_fixed(each) for each in spec.get("teachers", [])]}


def _counted_spec(spec: Json, source: Json) -> Json:
    found = copy.deepcopy(spec)
    for key in PARTS:
        if counts := _counts(source.get(key) or {}):
            found[key] = {**(found.get(key) or {}), **counts}
    wanted: dict[Any, Json] = {each["name"]: each for each in source.get("teachers", [])}
    for each in found.get("teachers", []):
        each |= _counts(wanted.get(each["name"], {}))
    return found
