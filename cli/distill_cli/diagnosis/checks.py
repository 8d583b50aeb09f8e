"""The checks of `distill doctor`: pure functions of what was observed, each a finding with what to do about it."""

import re
from collections.abc import Callable, Sequence

from distill_cli.diagnosis.definition import definition
from distill_cli.diagnosis.findings import INSTALL_CHART, Finding, Level
from distill_cli.diagnosis.observed import Json, Observed

MIN_KUBERNETES = (1, 29)
"""The oldest version that the chart's kubeVersion takes: in it CEL rules of CRDs became stable."""
MIN_KUBERAY = (1, 6)
CORE_RESOURCES = ("kubernetes.io/", "hugepages-", "attachable-volumes-")
MONITORS = ("podmonitors", "servicemonitors", "prometheusrules")
PSA_LABEL = "pod-security.kubernetes.io/enforce"


def kubernetes(observed: Observed) -> Finding:
    said = observed.version.get("gitVersion", "")
    if not _at_least(said, MIN_KUBERNETES):
        least = ".".join(map(str, MIN_KUBERNETES))
        return Finding("api", Level.FAIL, f"{observed.server} is Kubernetes {said}", f"upgrade it to {least} or newer")
    return Finding("api", Level.OK, f"{observed.server} is Kubernetes {said}")


def operator(observed: Observed) -> Finding:
    if observed.operators is None:
        return Finding(
            "operator",
            Level.WARN,
            "Deployments of all namespaces may not be read by you",
            "ask an administrator whether the operator runs",
        )
    if not observed.operators:
        return Finding("operator", Level.FAIL, "no operator is installed: jobs stay New", INSTALL_CHART)
    ready = [d for d in observed.operators if d.get("status", {}).get("availableReplicas", 0)]
    if not ready:
        where = _full_name(observed.operators[0])
        return Finding(
            "operator",
            Level.FAIL,
            f"Deployment {where} has no ready pod",
            f"kubectl -n {where.split('/')[0]} describe pods; kubectl logs",
        )
    version = ready[0]["metadata"].get("labels", {}).get("app.kubernetes.io/version")
    if len(observed.operators) > 1 and not (apart := _watch_apart(observed.operators)):
        names = ", ".join(_full_name(d) for d in observed.operators)
        if apart is None:
            return Finding(
                "operator",
                Level.WARN,
                f"cannot tell whether several operators watch the same namespaces, by their selectors: {names}",
                "see that no namespace has the labels of two of them, or is in watchNamespaces of another",
            )
        return Finding(
            "operator",
            Level.FAIL,
            f"several operators keep the same jobs: {names}",
            "uninstall all but one, or set watchNamespaces of each",
        )
    if version and observed.own_version and version != observed.own_version:
        return Finding(
            "operator",
            Level.WARN,
            f"the operator is of version {version}, this program of {observed.own_version}",
            "upgrade the older of them",
        )
    return Finding(
        "operator", Level.OK, f"Deployment {_full_name(ready[0])} {version or ''} is ready".replace("  ", " ")
    )


def _watch_apart(operators: Sequence[Json]) -> bool | None:
    """Return whether no namespace is watched by two of the operators; neither list nor selector means all.

    None when that depends on the labels of the namespaces.
    """
    watched: list[str] = []
    for deployment in operators:
        environment = deployment["spec"]["template"]["spec"]["containers"][0].get("env", [])
        given = {e["name"]: e.get("value", "") for e in environment}
        names, selector = given.get("DISTILL_WATCH_NAMESPACES"), given.get("DISTILL_WATCH_NAMESPACE_SELECTOR")
        if not names and not selector:
            return False
        watched += names.split(",") if names else []
        watched += [f"selector {selector}"] if selector else []
    if len(watched) > len(set(watched)):
        return False
    return None if any(each.startswith("selector ") for each in watched) else True


def kuberay(observed: Observed) -> Finding:
    if "v1" not in observed.groups.get("ray.io", ()):
        return Finding(
            "kuberay",
            Level.FAIL,
            "RayCluster ray.io/v1 is not served: jobs wait for their engines",
            "install KubeRay 1.6 or newer by its chart kuberay-operator",
        )
    if observed.kuberays is None:
        return Finding(
            "kuberay",
            Level.WARN,
            "RayCluster is served; its operator may not be looked at by you",
            "ask an administrator for its version",
        )
    if not observed.kuberays:
        return Finding(
            "kuberay",
            Level.WARN,
            "RayCluster is served, and no Deployment is labelled app.kubernetes.io/name=kuberay-operator",
            "see that KubeRay's operator runs: without it no engine starts",
        )
    image = observed.kuberays[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    version = image.rpartition(":")[2]
    if not any(d.get("status", {}).get("availableReplicas", 0) for d in observed.kuberays):
        return Finding(
            "kuberay",
            Level.FAIL,
            f"Deployment {_full_name(observed.kuberays[0])} has no ready pod",
            "see its pods and their logs",
        )
    if re.search(r"\d+\.\d+", version) and not _at_least(version, MIN_KUBERAY):
        return Finding(
            "kuberay", Level.WARN, f"KubeRay is {version}; 1.6 is what this project is tested with", "upgrade KubeRay"
        )
    return Finding("kuberay", Level.OK, f"KubeRay {version} is ready")


def accelerators(observed: Observed) -> Finding:
    if observed.nodes is None:
        return Finding(
            "accelerators",
            Level.WARN,
            "nodes may not be read by you",
            "ask an administrator which accelerators there are",
        )
    total: dict[str, int] = {}
    most: dict[str, int] = {}
    for node in observed.nodes:
        if node["spec"].get("unschedulable"):
            continue
        for name, count in node["status"].get("allocatable", {}).items():
            if "/" in name and not name.startswith(CORE_RESOURCES) and str(count).isdigit() and int(count):
                total[name] = total.get(name, 0) + int(count)
                most[name] = max(most.get(name, 0), int(count))
    if not total:
        return Finding(
            "accelerators",
            Level.WARN,
            f"{len(observed.nodes)} nodes, and none has an accelerator to give: "
            "only jobs with accelerator: none will run",
            "install the device plugin of your accelerators (for NVIDIA: the GPU operator)",
        )
    each = ", ".join(f"{name} {count} (at most {most[name]} on a node)" for name, count in sorted(total.items()))
    return Finding("accelerators", Level.OK, f"allocatable: {each}")


def storage(observed: Observed) -> Finding:
    if observed.storage_classes is None:
        return Finding(
            "storage",
            Level.WARN,
            "storage classes may not be read by you",
            "make sure that the job's claims exist and are bound",
        )
    names = [c["metadata"]["name"] for c in observed.storage_classes]
    if not names:
        return Finding(
            "storage",
            Level.WARN,
            "there is no storage class: claims are bound only to volumes made by hand",
            "install a provisioner, or make volumes for the models and the output",
        )
    key = "storageclass.kubernetes.io/is-default-class"
    default = [
        c["metadata"]["name"]
        for c in observed.storage_classes
        if c["metadata"].get("annotations", {}).get(key) == "true"
    ]
    if not default:
        return Finding(
            "storage",
            Level.WARN,
            f"storage classes {', '.join(names)}, none of them the default",
            "name one in each claim, as storageClassName",
        )
    return Finding(
        "storage",
        Level.OK,
        f"storage classes {', '.join(names)}; default {default[0]}. Several trainer nodes need one with ReadWriteMany",
    )


def monitoring(observed: Observed) -> Finding:
    absent = [name for name in MONITORS if name not in observed.monitors]
    if absent:
        return Finding(
            "monitoring",
            Level.WARN,
            f"the Prometheus Operator does not serve {', '.join(absent)}",
            "install it before metrics.podMonitor or metrics.prometheusRule of the chart; jobs run without",
        )
    return Finding("monitoring", Level.OK, f"the Prometheus Operator serves {', '.join(MONITORS)}")


def permissions(observed: Observed) -> Finding:
    lacking = [right for right, allowed in observed.rights.items() if not allowed]
    role = f"ask for the chart's editor role in namespace {observed.namespace_name}"
    if needed := [right for right in lacking if right.required]:
        return Finding(
            "permissions",
            Level.FAIL,
            f"you may not {', '.join(map(str, needed))} in namespace {observed.namespace_name}",
            role,
        )
    if lacking:
        lost = ", ".join(f"{right} (for {right.need})" for right in lacking)
        return Finding(
            "permissions",
            Level.WARN,
            f"you may not {lost} in namespace {observed.namespace_name}",
            "ask for the cluster role edit there (view shows logs and events alone)",
        )
    return Finding(
        "permissions", Level.OK, f"you may do all that the commands do in namespace {observed.namespace_name}"
    )


def namespace(observed: Observed) -> Finding:
    if not observed.namespace_exists:
        return Finding(
            "namespace",
            Level.FAIL,
            f"namespace {observed.namespace_name} does not exist",
            f"kubectl create namespace {observed.namespace_name}",
        )
    if observed.namespace is None:
        return Finding(
            "namespace",
            Level.WARN,
            f"namespace {observed.namespace_name} may not be read by you",
            "ask for the right to get it",
        )
    level = observed.namespace["metadata"].get("labels", {}).get(PSA_LABEL)
    if level is None:
        return Finding(
            "namespace",
            Level.OK,
            f"namespace {observed.namespace_name} enforces no Pod Security level; the pods of jobs satisfy restricted",
        )
    return Finding(
        "namespace",
        Level.OK,
        f"namespace {observed.namespace_name} enforces Pod Security level {level}, which the pods of jobs satisfy",
    )


CHECKS: tuple[Callable[[Observed], Finding], ...] = (
    kubernetes,
    definition,
    operator,
    kuberay,
    accelerators,
    storage,
    monitoring,
    namespace,
    permissions,
)


def findings(observed: Observed) -> list[Finding]:
    """Return the finding of every check, in their order."""
    return [check(observed) for check in CHECKS]


def _full_name(deployment: Json) -> str:
    return f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"


def _at_least(version: str, least: tuple[int, int]) -> bool:
    found = re.search(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= least
