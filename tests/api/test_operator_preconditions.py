"""What makes a stale view harmless: the API server refuses an apply that rests on one."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client, config

from distill_operator.kinds import Kind
from distill_operator.model.ownership import OWNERSHIP
from distill_operator.runtime.client import KubernetesCluster
from distill_operator.runtime.errors import Conflict

pytest_plugins = ["operator_fixtures"]
KINDS = {
    "ConfigMap": ("v1", {"data": {"a": "b"}}),
    "Service": ("v1", {"spec": {"ports": [{"port": 1}], "clusterIP": "None"}}),
    "NetworkPolicy": ("networking.k8s.io/v1", {"spec": {"podSelector": {}}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_apply_makes_only_what_is_not_there_and_changes_only_what_was_meant(
    kind: str, namespace: str, operator_kubeconfig: Path
) -> None:
    version, content = KINDS[kind]
    body: dict[str, Any] = {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": "x", "namespace": namespace},
        **content,
    }

    async def run() -> None:
        configuration = client.Configuration()
        await config.load_kube_config(config_file=str(operator_kubeconfig), client_configuration=configuration)
        cluster = KubernetesCluster(client.ApiClient(configuration), OWNERSHIP.field_manager)
        other = "5f0c0a54-0000-4000-8000-000000000001"
        with pytest.raises(Conflict):
            await cluster.apply(body, uid=other)
        await cluster.apply(body, dry_run=True)
        made = await cluster.apply(body)
        for uid, dry_run in (("", False), ("", True), (other, False)):
            with pytest.raises(Conflict):
                await cluster.apply(body, uid=uid, dry_run=dry_run)
        again = await cluster.apply(body, uid=made["metadata"]["uid"])
        assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
        (found,) = [item async for page, _ in cluster.pages(_kind(kind), namespace) for item in page if _named(item)]
        assert found["metadata"]["uid"] == made["metadata"]["uid"]
        await cluster.close()

    asyncio.run(run())


def _kind(name: str) -> Kind:
    return next(kind for kind in Kind if kind.value.kind == name)


def _named(item: dict[str, Any]) -> bool:
    return bool(item["metadata"]["name"] == "x")
