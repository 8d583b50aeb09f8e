"""The one part of `distill doctor` that reads the cluster: everything that the checks judge."""

from __future__ import annotations

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distill_cli.cluster import ApiError, Cluster
from distill_cli.diagnosis.observed import CRD_NAME, RIGHTS, Observed, Right

Json = dict[str, Any]
DEPLOYMENTS = "/apis/apps/v1/deployments"


def observe(cluster: Cluster) -> Observed:
    """Return everything that the checks judge. Raises ApiError where the API server does not answer."""
    server_version = cluster.get("/version")
    namespace = _get(cluster, f"/api/v1/namespaces/{cluster.namespace}")
    definition = _get(cluster, f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD_NAME}")
    groups = {g["name"]: [v["version"] for v in g["versions"]] for g in cluster.get("/apis")["groups"]}
    return Observed(
        server=cluster.server,
        version=server_version,
        namespace_name=cluster.namespace,
        namespace=namespace.found,
        namespace_exists=namespace.exists,
        crd=definition.found,
        crd_readable=definition.readable,
        groups=groups,
        operators=_list(cluster, DEPLOYMENTS, "app.kubernetes.io/name=distillation-operator"),
        kuberays=_list(cluster, DEPLOYMENTS, "app.kubernetes.io/name=kuberay-operator"),
        nodes=_list(cluster, "/api/v1/nodes"),
        storage_classes=_list(cluster, "/apis/storage.k8s.io/v1/storageclasses"),
        monitors=_monitors(cluster, groups),
        rights={right: _allowed(cluster, right) for right in RIGHTS},
        own_version=_own_version(),
    )


@dataclasses.dataclass(frozen=True)
class Answer:
    """An object, or why there is none: it may not be read, or it does not exist."""

    found: Json | None
    readable: bool
    exists: bool


def _get(cluster: Cluster, path: str) -> Answer:
    try:
        return Answer(cluster.get(path), True, True)
    except ApiError as error:
        if error.status not in (403, 404):
            raise
        return Answer(None, error.status == 404, error.status == 403)


def _list(cluster: Cluster, path: str, labels: str = "") -> list[Json] | None:
    """Return the objects, or None where they may not be listed."""
    try:
        return list(cluster.get(path, {"labelSelector": labels})["items"])
    except ApiError as error:
        if error.status != 403:
            raise
        return None


def _monitors(cluster: Cluster, groups: dict[str, list[str]]) -> list[str]:
    if "v1" not in groups.get("monitoring.coreos.com", []):
        return []
    return [resource["name"] for resource in cluster.get("/apis/monitoring.coreos.com/v1")["resources"]]


def _allowed(cluster: Cluster, right: Right) -> bool:
    attributes = {
        "namespace": cluster.namespace,
        "verb": right.verb,
        "group": right.group,
        "resource": right.resource,
        "subresource": right.subresource,
    }
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = cluster.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=body)
    return bool(answer["status"]["allowed"])


def _own_version() -> str | None:
    try:
        return version("distillation-operator")
    except PackageNotFoundError:
        return None
