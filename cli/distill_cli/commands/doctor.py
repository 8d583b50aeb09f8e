"""`distill doctor`: looks at a cluster, and says what keeps jobs from running there."""

from __future__ import annotations

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click

from distill_cli.diagnosis.checks import findings
from distill_cli.diagnosis.findings import CRD_NAME, RIGHTS, Finding, Level, Right, Seen
from distill_cli.failure import FAILED
from distill_cli.options import output, reaches, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distill_cli.cluster import Cluster

Json = dict[str, Any]
STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
DEPLOYMENTS = "/apis/apps/v1/deployments"


@click.command()
@output("lines", "json")
@reaches
def doctor(output: str, connect: Callable[[], Cluster]) -> int:
    """Check a cluster: API, CRD, operator, KubeRay, accelerators, storage, monitoring, namespace, permissions.

    Each finding is ok, warn or fail, with what to do about it. Exit code 1 if one is fail. Whether images can be pulled
    and claims be mounted shows only when pods start: `distill watch` tells it.
    """
    from distill_cli.cluster import ApiError

    cluster = connect()
    try:
        found = findings(look(cluster))
    except ApiError as error:
        if error.status:
            raise
        found = [Finding("api", Level.FAIL, str(error), "check --context and --kubeconfig, and the network")]
    if output == "json":
        write_json([dataclasses.asdict(finding) for finding in found])
    else:
        show(found)
    return FAILED if any(finding.level is Level.FAIL for finding in found) else 0


def show(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for finding in found:
        line = Text.assemble(
            (f"{finding.level.value:<5}", STYLES[finding.level]), f"{finding.check:<13} {finding.message}"
        )
        if finding.remedy:
            line.append(f"; {finding.remedy}", style="" if finding.level is Level.OK else "italic")
        console.print(line)


def look(cluster: Cluster) -> Seen:
    """Everything that the checks are about. Raises ApiError where the API server does not answer."""
    version_answer = cluster.get("/version")
    namespace = _readable(cluster, f"/api/v1/namespaces/{cluster.namespace}")
    definition = _readable(cluster, f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD_NAME}")
    groups = {g["name"]: [v["version"] for v in g["versions"]] for g in cluster.get("/apis")["groups"]}
    return Seen(
        server=cluster.server,
        version=version_answer,
        namespace_name=cluster.namespace,
        namespace=namespace.found,
        namespace_exists=namespace.exists,
        crd=definition.found,
        crd_readable=definition.readable,
        groups=groups,
        operators=_items(cluster, DEPLOYMENTS, "app.kubernetes.io/name=distillation-operator"),
        kuberays=_items(cluster, DEPLOYMENTS, "app.kubernetes.io/name=kuberay-operator"),
        nodes=_items(cluster, "/api/v1/nodes"),
        storage_classes=_items(cluster, "/apis/storage.k8s.io/v1/storageclasses"),
        monitors=_monitors(cluster, groups),
        rights={right: _allowed(cluster, right) for right in RIGHTS},
        own_version=_own_version(),
    )


@dataclasses.dataclass(frozen=True)
class Answer:
    """An object, or why there is none."""

    found: Json | None
    readable: bool
    exists: bool


def _readable(cluster: Cluster, path: str) -> Answer:
    from distill_cli.cluster import ApiError

    try:
        return Answer(cluster.get(path), True, True)
    except ApiError as error:
        if error.status not in (403, 404):
            raise
        return Answer(None, error.status == 404, error.status == 403)


def _items(cluster: Cluster, path: str, labels: str = "") -> list[Json] | None:
    """None where they may not be listed."""
    from distill_cli.cluster import ApiError

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
