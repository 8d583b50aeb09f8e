"""The numbers in a child that its user may change while an attempt is under way: how many pods there are to be.

The rest of a child is what the attempt began with. Its hash tells, whatever the numbers are, whether the operator that
wrote the child would write it the same way today.
"""

import copy
from typing import Any

from distill_api.spec import Spec
from distill_operator.resources import configmap, pod_group
from distill_operator.resources.pod_template import Json
from distill_operator.runtime.kinds import Kind, kind_of

COUNTS = frozenset({"replicas", "minReplicas", "maxReplicas", "minMember"})
"""Of a Deployment, of a RayCluster's groups, of a group of pods, and of each part of a job that has pods."""
COUNTED = frozenset({Kind.DEPLOYMENT, *pod_group.KINDS})
"""Kinds whose spec itself says how many."""
MUTABLE = frozenset(Spec.model_fields[name].alias or name for name in Spec.mutable or ())
PARTS = ("rollout", "teacher")
"""Of a job's spec, which say for themselves how many pods they want; so does each entry of teachers."""


def fixed(child: Json) -> Json:
    """The child without what its user may change; the child itself where that is nothing."""
    if kind_of(child) is Kind.CONFIG_MAP:
        manifest = configmap.manifest(child)
        return child if manifest is None else {**child, "data": {**manifest, "spec": _fixed_spec(manifest["spec"])}}
    spec = child.get("spec", {})
    if kind_of(child) is Kind.RAY_CLUSTER:
        return {**child, "spec": {**spec, "workerGroupSpecs": [_fixed(group) for group in spec["workerGroupSpecs"]]}}
    return {**child, "spec": _fixed(spec)} if kind_of(child) in COUNTED else child


def with_numbers(child: Json, asked: Json) -> Json:
    """`child`, word for word, with the numbers of `asked`, the same child as another operator writes it.

    `asked` itself where nothing can be made of the child, as somebody spoiled it.
    """
    try:
        return _with_numbers(child, asked)
    except (KeyError, TypeError, AttributeError):
        return asked


def _with_numbers(child: Json, asked: Json) -> Json:
    if kind_of(child) is Kind.CONFIG_MAP:
        mine, theirs = configmap.manifest(child), configmap.manifest(asked)
        if mine is None or theirs is None:
            return asked
        spec = _numbered_spec(mine["spec"], theirs["spec"])
        return child if spec == mine["spec"] else {**child, "data": configmap.data({**mine, "spec": spec})}
    found = copy.deepcopy(child)
    if kind_of(child) is Kind.RAY_CLUSTER:
        wanted = {group["groupName"]: group for group in asked["spec"]["workerGroupSpecs"]}
        for group in found["spec"].get("workerGroupSpecs", []):
            group |= _numbers(wanted.get(group["groupName"], {}))
    elif kind_of(child) in COUNTED:
        found["spec"] |= _numbers(asked["spec"])
    return found


def _numbers(part: Json) -> Json:
    return {key: value for key, value in part.items() if key in COUNTS}


def _fixed(part: Json) -> Json:
    return {key: value for key, value in part.items() if key not in COUNTS}


def _fixed_spec(spec: Json) -> Json:
    found = {key: value for key, value in spec.items() if key not in MUTABLE}
    found |= {key: _fixed(spec[key]) for key in PARTS if spec.get(key)}
    return {**found, "teachers": [_fixed(each) for each in spec.get("teachers", [])]}


def _numbered_spec(spec: Json, asked: Json) -> Json:
    found = copy.deepcopy(spec)
    for key in PARTS:
        if numbers := _numbers(asked.get(key) or {}):
            found[key] = {**(found.get(key) or {}), **numbers}
    wanted: dict[Any, Json] = {each["name"]: each for each in asked.get("teachers", [])}
    for each in found.get("teachers", []):
        each |= _numbers(wanted.get(each["name"], {}))
    return found
