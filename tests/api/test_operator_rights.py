"""The operator holds the rights that it uses, no more and no less: the API server's audit log says which it uses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from operator_world import CHILDREN, JOBS, ROOT, TEACHERS, Json, Kubelet, Trainer, World, manifest, teacher

from distill_operator.rbac import CLUSTER_RULES, NAMESPACED_RULES, Rule

pytest_plugins = ["operator_fixtures"]
pytestmark = pytest.mark.usefixtures("kuberay")

Right = tuple[str, str, str]
"""Group, resource, verb."""
SECRETS = "/api/v1/namespaces/{ns}/secrets"
BY_ADMISSION = {
    ("distillation-operator.io", f"{plural}/finalizers", "update") for plural in ("distillationjobs", "teachers")
}
"""OwnerReferencesPermissionEnforcement asks for it inside other requests: see the last test."""


def rights(rules: Iterable[Rule]) -> set[Right]:
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


def asked(log: Path, user: str, namespace: str) -> tuple[set[Right], set[Right]]:
    """What was allowed to a ServiceAccount in a namespace and in the cluster as a whole, and what was forbidden."""
    allowed: set[Right] = set()
    forbidden: set[Right] = set()
    for line in log.read_text().splitlines():
        event: Json = json.loads(line)
        what = event.get("objectRef")
        if what is None or event["user"]["username"] != f"system:serviceaccount:default:{user}":
            continue
        if what.get("namespace", "") not in ("", namespace):
            continue
        resource = "/".join(part for part in (what["resource"], what.get("subresource")) if part)
        right = (what.get("apiGroup", ""), resource, event["verb"])
        if event.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid":
            forbidden.add(right)
            continue
        allowed.add(right)
        if event["verb"] == "patch" and event.get("responseStatus", {}).get("code") == 201:
            # A server-side apply that made the object: the server asked for the right to create, too.
            allowed.add((*right[:2], "create"))
    return allowed, forbidden


def whole_life(world: World, kubelet: Kubelet) -> None:
    """A job does all that makes the operator do something: starts, is suspended, resumed, completes and expires."""
    claims = world.path("/api/v1/namespaces/{ns}/persistentvolumeclaims")
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "slow"}
    world.api.call("POST", claims, {"metadata": {"name": "out"}, "spec": spec})
    kubelet.trainers[2] = Trainer(exit_code=0)
    world.api.call("POST", world.path(TEACHERS), teacher("poet"))
    kubelet.refused = 'Error creating: pods "job-trainer-1-0" is forbidden: exceeded quota: gpus'
    world.submit(ttlSecondsAfterFinished=1)
    said = world.until_condition("TrainerReady", "QuotaExceeded")
    assert said["message"] == f"Job job-trainer-1: {kubelet.refused}"
    kubelet.refused = ""
    world.until_condition("Succeeded", "Running")
    world.api.merge(world.path(CHILDREN["Deployment"], "job-teacher"), {"spec": {"replicas": 2}})
    path = world.path(JOBS, "job")
    world.api.merge(path, {"spec": {"suspend": True}})
    world.until(
        "no pods of the job", lambda: {p["metadata"]["name"] for p in world.pods()} == {"poet-scoring-teacher-0"}
    )
    world.api.merge(path, {"spec": {"suspend": False}})
    world.until("the job expires", lambda: not world.api.items(world.path(JOBS)))


SAME_EVENT_AFTER_AN_HOUR = """
import asyncio, sys
from datetime import UTC, datetime, timedelta
from distill_operator.kinds import Kind
from distill_operator.runtime import client
from distill_operator.runtime.effects import Event
from distill_operator.runtime.events import EventRecorder
from distill_operator.runtime.ownership import Key

async def record():
    api = await client.connect("test")
    now = datetime.now(UTC)
    times = iter([now, now + timedelta(hours=1)])
    recorder = EventRecorder(api, "test/operator", "test", lambda: next(times))
    job = Key(Kind.DISTILLATION_JOB, sys.argv[1], "job")
    for _ in range(2):
        await recorder.record(job, "uid", Event("key", "Running", "again", warning=False))
    await api.close()

asyncio.run(record())
"""


def same_event_after_an_hour(world: World, kubeconfig: Path) -> None:
    """By the operator's own code and rights, as no test waits so long."""
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": f"{ROOT}/crds:{ROOT}/operator"}
    script = [sys.executable, "-c", SAME_EVENT_AFTER_AN_HOUR, world.namespace]
    subprocess.run(script, env=environment, check=True, timeout=60)


def test_the_operator_of_all_namespaces_uses_every_right_that_it_holds_and_no_other(
    world: World, kubelet: Kubelet, operator_kubeconfig: Path, crds_installed: Any
) -> None:
    operator = world.operator(DISTILL_WATCH_NAMESPACES="")
    whole_life(world, kubelet)
    same_event_after_an_hour(world, operator_kubeconfig)
    assert operator.terminate()[0] == 0
    used, forbidden = asked(crds_installed.kubeconfig.parent / "audit.log", "everywhere", world.namespace)
    assert not forbidden
    assert used | BY_ADMISSION == rights([*NAMESPACED_RULES, *CLUSTER_RULES])


def test_the_operator_of_one_namespace_uses_every_right_that_it_holds_there(
    world: World, kubelet: Kubelet, namespaced_kubeconfig: Path, crds_installed: Any
) -> None:
    operator = world.operator(KUBECONFIG=str(namespaced_kubeconfig))
    whole_life(world, kubelet)
    same_event_after_an_hour(world, namespaced_kubeconfig)
    assert operator.terminate()[0] == 0
    used, forbidden = asked(crds_installed.kubeconfig.parent / "audit.log", f"only-{world.namespace}", world.namespace)
    # It goes on without: the claim gets the benefit of the doubt.
    assert forbidden == {("storage.k8s.io", "storageclasses", "get")}
    assert used | BY_ADMISSION == rights(NAMESPACED_RULES)


def test_the_key_of_a_job_is_made_for_it_and_nobody_in_the_operator_can_read_it(
    world: World, kubelet: Kubelet, crds_installed: Any
) -> None:
    world.claim()
    operator = world.operator()
    uid = world.submit()["metadata"]["uid"]
    world.until_condition("Succeeded", "Running")
    [secret] = world.api.items(world.path(SECRETS))
    assert secret["metadata"]["name"] == f"job-key-{uid[:8]}"
    assert [(o["uid"], o["controller"]) for o in secret["metadata"]["ownerReferences"]] == [(uid, True)]
    assert set(secret["data"]) == {"key"} and secret["immutable"] is True
    who = "--as=system:serviceaccount:default:everywhere"
    for verb, allowed in (("create", "yes"), ("get", "no"), ("list", "no"), ("patch", "no"), ("delete", "no")):
        said = crds_installed.kubectl("auth", "can-i", verb, "secrets", "-n", world.namespace, who, check=False)
        assert said.stdout.strip() == allowed, verb
    assert secret["data"]["key"] not in operator.log()


def test_without_the_right_to_finalizers_a_strict_server_refuses_children(world: World, crds_installed: Any) -> None:
    name = f"lacks-{world.namespace}"
    rules = [rule for rule in NAMESPACED_RULES if "distillationjobs/finalizers" not in rule["resources"]]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name}, "rules": rules}
    crds_installed.kubectl("create", "-n", world.namespace, "-f", "-", stdin=json.dumps(role))
    crds_installed.kubectl(
        *("create", "rolebinding", name, f"--role={name}", f"--serviceaccount=default:{name}", "-n", world.namespace)
    )
    owner = world.api.call("POST", world.path(JOBS), manifest("job"))
    reference = {
        **{"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": "job", "uid": owner["metadata"]["uid"]},
        **{"controller": True, "blockOwnerDeletion": True},
    }
    child = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "child", "namespace": world.namespace, "ownerReferences": [reference]},
    }
    refused = crds_installed.kubectl(
        *("create", "-f", "-", f"--as=system:serviceaccount:default:{name}"), stdin=json.dumps(child), check=False
    )
    assert "cannot set blockOwnerDeletion" in refused.stderr
