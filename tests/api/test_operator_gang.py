"""A gang with the group of scheduler-plugins, whose own CRD judges it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from operator_fixtures import pinned_module
from operator_world import Json, Kubelet, Trainer, World

pytest_plugins = ["operator_fixtures"]
pytestmark = pytest.mark.usefixtures("kuberay")

GROUPS = "/apis/scheduling.x-k8s.io/v1alpha1/namespaces/{ns}/podgroups"
CRD = "podgroups.scheduling.x-k8s.io"


def group(world: World) -> Json | None:
    found = world.api.items(world.path(GROUPS))
    return found[0] if found else None


def test_a_gang_waits_for_its_scheduler_and_its_group_goes_with_each_attempt(
    world: World, kubelet: Kubelet, crds_installed: Any
) -> None:
    crds_installed.kubectl("delete", "crd", CRD, "--ignore-not-found", "--wait=true", "--timeout=60s")
    world.claim()
    operator = world.operator(DISTILL_RESYNC_SECONDS="1")
    world.submit(scheduling={"gang": "scheduler-plugins", "scope": "job"}, rollout={"replicas": 2}, backoffLimit=1)
    said = world.until_condition("TrainerReady", "GangSchedulerNotInstalled", "False")
    assert "install scheduler-plugins, and the job starts by itself" in said["message"]
    assert not world.children()

    crd = pinned_module("sigs.k8s.io/scheduler-plugins") / "config/crd/bases/scheduling.x-k8s.io_podgroups.yaml"
    crds_installed.kubectl("apply", "-f", str(crd))
    world.until_condition("Succeeded", "Running")
    first = group(world)
    assert first is not None and first["spec"]["minMember"] == 1 + 1 + 2 + 1
    pods = world.pods()
    assert len(pods) == 5
    assert {p["metadata"]["labels"].get("scheduling.x-k8s.io/pod-group") for p in pods} == {"job-gang"}
    assert {p["spec"]["schedulerName"] for p in pods} == {"scheduler-plugins-scheduler"}

    kubelet.trainers[1] = Trainer(exit_code=75)
    world.until_condition("Succeeded", "Restarting")
    world.until("the group goes with its attempt", lambda: group(world) is None)
    world.until("the second attempt", lambda: world.job()["status"]["attempts"] == 2)
    second = world.until("its group", lambda: group(world))
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    kubelet.trainers[2] = Trainer(exit_code=0)
    world.until_condition("Succeeded", "Completed", "True")
    world.until("nothing is left", lambda: group(world) is None)
    assert "ERROR" not in operator.log()
    shutil.rmtree(crds_installed.kubeconfig.parent / "kubectl-cache", ignore_errors=True)


def test_an_operator_without_the_right_to_groups_says_so(
    world: World, kubelet: Kubelet, namespaced_kubeconfig: Path
) -> None:
    world.claim()
    world.operator(KUBECONFIG=str(namespaced_kubeconfig))
    world.submit(scheduling={"gang": "volcano"})
    said = world.until_condition("TrainerReady", "GangSchedulerNotInstalled", "False")
    assert "the operator may not use the groups of volcano" in said["message"]
    assert not world.children()
