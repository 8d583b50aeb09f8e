"""The operator of the release before hands a running job over to this one; real API server, real server-side apply."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from operator_world import JOBS, ROOT, Json, Kubelet, Trainer, World

pytest_plugins = ["operator_fixtures"]

[RELEASE] = (ROOT / "tests" / "releases").glob("*.tar.gz")


def with_pods(world: World) -> dict[str, Json]:
    """spec of each child that has pods, and the file that they read."""
    children = world.children()
    found = {name: c["spec"] for (kind, name), c in children.items() if kind in ("Deployment", "RayCluster", "Job")}
    return {**found, "file": json.loads(children["ConfigMap", "job-job"]["data"]["job.yaml"])["spec"]}


def pods(world: World, role: str = "") -> dict[str, str]:
    """uids by name."""
    label = "distillation-operator.io/role"
    return {
        p["metadata"]["name"]: p["metadata"]["uid"]
        for p in world.pods()
        if role in ("", p["metadata"]["labels"][label]) and "deletionTimestamp" not in p["metadata"]
    }


def images(world: World) -> set[str]:
    return {p["spec"]["containers"][0]["image"] for p in world.pods()}


@pytest.mark.usefixtures("kuberay")
def test_a_job_of_the_release_before_keeps_its_pods_follows_its_user_and_is_new_after_a_failure(
    world: World, kubelet: Kubelet, crds_installed: Any, tmp_path: Path
) -> None:
    with tarfile.open(RELEASE) as archive:
        archive.extractall(tmp_path, filter="data")
    world.claim()
    old = {"PYTHONPATH": f"{tmp_path / 'crds'}:{tmp_path / 'operator'}", "DISTILL_WORKERS_IMAGE": "registry.test/old:1"}
    try:
        crds_installed.kubectl("apply", "-f", str(tmp_path / "crds"))
        before = world.operator(**old)
        world.submit()
        world.until_condition("Succeeded", "Running")
        before.terminate()
    finally:
        crds_installed.kubectl("apply", "-f", str(ROOT / "crds"))
    specs, began = with_pods(world), pods(world)
    assert images(world) == {"registry.test/old:1"}

    world.operator(DISTILL_JOB_EGRESS="open", DISTILL_SCRAPE_NAMESPACES="monitoring")
    patch = {"rollout": {"replicas": 2}, "teacher": {"replicas": 3}}
    world.api.merge(world.path(JOBS, "job"), {"spec": patch})
    world.until("the engines", lambda: len(pods(world, "rollout")) == 3)
    world.until("the teachers", lambda: len(pods(world, "teacher")) == 3)
    world.until_condition("Ready", "Ready", "True")
    assert began.items() <= pods(world).items(), "no pod was replaced"
    [group] = specs["job-rollout"]["workerGroupSpecs"]
    group |= dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), 2)
    specs["job-teacher"]["replicas"] = specs["file"]["teacher"]["replicas"] = 3
    specs["file"]["rollout"]["replicas"] = 2
    assert with_pods(world) == specs
    assert world.job()["status"]["attempts"] == 1

    kubelet.trainers[1] = Trainer(exit_code=75)
    world.until("the second attempt", lambda: world.job()["status"]["attempts"] == 2)
    world.until_condition("Succeeded", "Running")
    assert images(world) == {"registry.test/workers:1"}
    policy = world.children()["NetworkPolicy", "job-traffic"]["spec"]
    assert policy["policyTypes"] == ["Ingress"], "what has no pods is new with the attempt as well"
