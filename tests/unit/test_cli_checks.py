"""`distill doctor`: each check by itself, on what was observed of a cluster."""

import copy
import dataclasses
from typing import Any

import pytest

from distill_api.generate.crd import crd
from distill_cli.diagnosis import checks
from distill_cli.diagnosis.checks import findings
from distill_cli.diagnosis.findings import Finding, Level
from distill_cli.diagnosis.observed import RIGHTS, Observed

Json = dict[str, Any]


def deployment(
    name: str, image: str = "i:v1.6.1", ready: int = 1, watched: str | None = None, selector: str = "", **labels: str
) -> Json:
    env = [] if watched is None else [{"name": "DISTILL_WATCH_NAMESPACES", "value": watched}]
    env.append({"name": "DISTILL_WATCH_NAMESPACE_SELECTOR", "value": selector})
    return {
        "metadata": {"namespace": "system", "name": name, "labels": labels},
        "spec": {"template": {"spec": {"containers": [{"image": image, "env": env}]}}},
        "status": {"availableReplicas": ready} if ready else {},
    }


GPU = "nvidia.com/gpu"
VERSION = {"app.kubernetes.io/version": "0.1.0"}
WHOLE = Observed(
    server="https://here",
    version={"gitVersion": "v1.36.2"},
    namespace_name="team",
    namespace={"metadata": {"labels": {checks.PSA_LABEL: "restricted"}}},
    namespace_exists=True,
    crd=crd(),
    crd_readable=True,
    groups={"distillation-operator.io": ["v1alpha1"], "ray.io": ["v1", "v1alpha1"]},
    operators=[deployment("distillation-operator", **VERSION)],
    kuberays=[deployment("kuberay-operator")],
    nodes=[{"spec": {}, "status": {"allocatable": {GPU: "8", "cpu": "64", "hugepages-1Gi": "4"}}}],
    storage_classes=[
        {"metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}}
    ],
    monitors=checks.MONITORS,
    rights=dict.fromkeys(RIGHTS, True),
    own_version="0.1.0",
)


def test_a_cluster_that_has_it_all_is_ok() -> None:
    found = findings(WHOLE)
    assert [(f.check, f.level, f.remedy) for f in found] == [(f.check, Level.OK, "") for f in found]
    assert len(found) == len(checks.CHECKS) == len({f.check for f in found})


def other_crd(change: str) -> Json:
    found = copy.deepcopy(crd())
    version = found["spec"]["versions"][0]
    if change == "version":
        version["name"] = "v1"
    else:
        del version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["seed"]
    return found


FAIL, WARN, OK = Level.FAIL, Level.WARN, Level.OK


@pytest.mark.parametrize(
    ("change", "check", "level", "said"),
    [
        ({"version": {"gitVersion": "v1.28.9"}}, "api", FAIL, "is Kubernetes v1.28.9"),
        ({"crd": None}, "crd", FAIL, "is not installed"),
        ({"crd": None, "crd_readable": False}, "crd", OK, "is served"),
        ({"crd": None, "crd_readable": False, "groups": {}}, "crd", FAIL, "is not served"),
        ({"crd": other_crd("version")}, "crd", FAIL, "has v1, this program v1alpha1"),
        ({"crd": other_crd("seed")}, "crd", WARN, "they differ in spec.seed"),
        ({"operators": None}, "operator", WARN, "may not be read"),
        ({"operators": []}, "operator", FAIL, "no operator is installed"),
        ({"operators": [deployment("o", ready=0)]}, "operator", FAIL, "Deployment system/o has no ready pod"),
        ({"operators": [deployment("a"), deployment("b")]}, "operator", FAIL, "system/a, system/b"),
        ({"operators": [deployment("a", watched="x"), deployment("b", watched="y,z")]}, "operator", OK, "is ready"),
        ({"operators": [deployment("a", watched="x"), deployment("b", watched="x")]}, "operator", FAIL, "same jobs"),
        (
            {"operators": [deployment("a", selector="x=y"), deployment("b", watched="x")]},
            "operator",
            WARN,
            "cannot tell",
        ),
        (
            {"operators": [deployment("a", selector="x"), deployment("b", selector="y")]},
            "operator",
            WARN,
            "cannot tell",
        ),
        ({"operators": [deployment("a", selector="x"), deployment("b", selector="x")]}, "operator", FAIL, "same jobs"),
        ({"operators": [deployment("a", selector="x"), deployment("b")]}, "operator", FAIL, "same jobs"),
        ({"own_version": "0.2.0"}, "operator", WARN, "of version 0.1.0, this program of 0.2.0"),
        ({"groups": {}}, "kuberay", FAIL, "ray.io/v1 is not served"),
        ({"kuberays": None}, "kuberay", WARN, "may not be looked at"),
        ({"kuberays": []}, "kuberay", WARN, "kuberay-operator"),
        ({"kuberays": [deployment("k", ready=0)]}, "kuberay", FAIL, "has no ready pod"),
        ({"kuberays": [deployment("k", "i:v1.4.0")]}, "kuberay", WARN, "KubeRay is v1.4.0"),
        ({"kuberays": [deployment("k", "i:nightly")]}, "kuberay", OK, "KubeRay nightly"),
        ({"nodes": None}, "accelerators", WARN, "may not be read"),
        ({"nodes": [{"spec": {}, "status": {"allocatable": {"cpu": "4"}}}]}, "accelerators", WARN, "none has an acc"),
        (
            {"nodes": [{"spec": {"unschedulable": True}, "status": {"allocatable": {GPU: "8"}}}]},
            "accelerators",
            WARN,
            "none has an accelerator",
        ),
        ({"storage_classes": None}, "storage", WARN, "may not be read"),
        ({"storage_classes": []}, "storage", WARN, "no storage class"),
        ({"storage_classes": [{"metadata": {"name": "slow"}}]}, "storage", WARN, "none of them the default"),
        ({"monitors": ["podmonitors"]}, "monitoring", WARN, "does not serve servicemonitors, prometheusrules"),
        ({"namespace": None, "namespace_exists": False}, "namespace", FAIL, "namespace team does not exist"),
        ({"namespace": None}, "namespace", WARN, "may not be read"),
        ({"namespace": {"metadata": {}}}, "namespace", OK, "enforces no Pod Security level"),
        ({"rights": {r: r.verb != "create" for r in RIGHTS}}, "permissions", FAIL, "create distillationjobs in"),
        ({"rights": {r: not r.subresource for r in RIGHTS}}, "permissions", WARN, "get pods/log (for logs)"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(change: Json, check: str, level: Level, said: str) -> None:
    by_name: dict[str, Finding] = {f.check: f for f in findings(dataclasses.replace(WHOLE, **change))}
    found = by_name[check]
    assert found.level is level and said in found.message
    assert bool(found.remedy) == (level is not OK)


def test_accelerators_are_counted_by_their_resource_and_by_node() -> None:
    nodes = [{"spec": {}, "status": {"allocatable": {GPU: n, "amd.com/gpu": "0"}}} for n in ("8", "4")]
    assert checks.accelerators(dataclasses.replace(WHOLE, nodes=nodes)).message == (
        "allocatable: nvidia.com/gpu 12 (at most 8 on a node)"
    )
