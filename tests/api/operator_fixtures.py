"""Fixtures of the tests that run the operator against the API server."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operator_world import RAY_CRD, ROOT, Kubelet, World, api_of

from distill_operator.rbac import (
    CLUSTER_RULES,
    GANG_RULES,
    KUEUE_CLUSTER_RULES,
    KUEUE_RULES,
    LEASE_RULES,
    NAMESPACED_RULES,
)
from go_modules import downloaded

RAY_CRD_PATH = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{RAY_CRD}"


def pinned_module(name: str) -> Path:
    """Folder of a Go module at the version that dev/tools/kuberay pins."""
    return Path(downloaded(name, ROOT / "dev/tools/kuberay")["Dir"])


@pytest.fixture(scope="session")
def ray_crd() -> Path:
    """KubeRay's own."""
    return pinned_module("github.com/ray-project/kuberay/ray-operator") / "config/crd/bases/ray.io_rayclusters.yaml"


def is_established(crd: dict[str, Any] | None) -> bool:
    conditions = (crd or {}).get("status", {}).get("conditions", [])
    said = {condition["type"]: condition["status"] for condition in conditions}
    return said.get("Established") == "True" and "deletionTimestamp" not in (crd or {})["metadata"]


@pytest.fixture
def kuberay(crds_installed: Any, ray_crd: Path) -> None:
    api, deadline = api_of(crds_installed.kubeconfig), time.monotonic() + 30
    # A test may have removed it. To apply its 900 KB costs both ends seconds, also where nothing changes.
    if not is_established(api.find(RAY_CRD_PATH)):
        crds_installed.kubectl("apply", "--server-side", "-f", str(ray_crd))
    while api.find("/apis/ray.io/v1/rayclusters") is None:
        assert time.monotonic() < deadline, "RayCluster is not served"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def operator_kubeconfig(crds_installed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a ServiceAccount with exactly the rights that rbac.py lists."""
    account(crds_installed, "everywhere")
    rules = [*NAMESPACED_RULES, *CLUSTER_RULES, *LEASE_RULES, *GANG_RULES, *KUEUE_RULES, *KUEUE_CLUSTER_RULES]
    grant(crds_installed, {"kind": "ClusterRole", "metadata": {"name": "operator"}, "rules": rules})
    crds_installed.kubectl(
        "create", "clusterrolebinding", "operator", "--clusterrole=operator", "--serviceaccount=default:everywhere"
    )
    return kubeconfig_of(crds_installed, "everywhere", tmp_path_factory.mktemp("operator"))


@pytest.fixture
def namespaced_kubeconfig(crds_installed: Any, namespace: str, tmp_path: Path) -> Path:
    """Of a ServiceAccount with rights in the namespace of the test alone."""
    name = f"only-{namespace}"
    account(crds_installed, name)
    meta = {"name": "operator", "namespace": namespace}
    grant(crds_installed, {"kind": "Role", "metadata": meta, "rules": [*NAMESPACED_RULES]})
    crds_installed.kubectl(
        *("create", "rolebinding", "operator", "--role=operator", f"--serviceaccount=default:{name}", "-n", namespace)
    )
    return kubeconfig_of(crds_installed, name, tmp_path)


def account(server: Any, name: str) -> None:
    server.kubectl("create", "serviceaccount", name, "-n", "default")


def grant(server: Any, role: dict[str, Any]) -> None:
    server.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "rbac.authorization.k8s.io/v1", **role}))


def kubeconfig_of(server: Any, name: str, folder: Path) -> Path:
    token = server.kubectl("create", "token", name, "-n", "default", "--duration=2h").stdout.strip()
    config = json.loads(server.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def world(crds_installed: Any, namespace: str, operator_kubeconfig: Path, tmp_path: Path) -> Iterator[World]:
    found = World(api_of(crds_installed.kubeconfig), namespace, operator_kubeconfig, tmp_path)
    yield found
    for operator in found.operators:
        if operator.process.poll() is None:
            operator.kill()
    found.clear()


@pytest.fixture
def kubelet(world: World) -> Iterator[Kubelet]:
    found = Kubelet(world)
    yield found
    found.stop()
