"""What happens around a job: quotas, preemption, other controllers, namespaces and CRDs that come and go."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from operator_world import CHILDREN, JOBS, RAY_CRD, Json, Kubelet, Trainer, World

pytest_plugins = ["operator_fixtures"]

EVENTS = "/apis/events.k8s.io/v1/namespaces/{ns}/events"


def events(world: World) -> Counter[str]:
    return Counter(e["reason"] for e in world.api.items(world.path(EVENTS)))


@pytest.mark.usefixtures("kuberay")
def test_a_job_of_another_controller_is_left_alone_entirely(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator()
    foreign = world.submit("foreign", managedBy="kueue.x-k8s.io/multikueue")
    world.submit("ours")
    world.until_condition("Succeeded", "Running", name="ours")
    found = world.job("foreign")
    assert found["metadata"]["resourceVersion"] == foreign["metadata"]["resourceVersion"]
    assert "status" not in found
    assert {e["regarding"]["name"] for e in world.api.items(world.path(EVENTS))} == {"ours"}
    assert not [name for _, name in world.children() if name.startswith("foreign")]


@pytest.mark.usefixtures("kuberay")
def test_a_quota_delays_the_start_and_is_told_by_its_name(world: World, kubelet: Kubelet) -> None:
    world.claim()
    path = world.path("/api/v1/namespaces/{ns}/resourcequotas")
    quota = world.api.call("POST", path, {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}})
    used = {"status": {"hard": quota["spec"]["hard"], "used": {"count/jobs.batch": "0"}}}
    world.api.merge(f"{path}/none/status", used)
    world.operator()
    world.submit()
    said = world.until_condition("TrainerReady", "QuotaExceeded", "False")
    assert "exceeded quota: none" in said["message"]
    assert world.condition("Succeeded")["reason"] == "Pending"
    assert world.condition("SpecValid")["status"] == "True"
    assert not world.children()
    assert events(world) == {"QuotaExceeded": 1}
    world.api.call("DELETE", f"{path}/none")
    world.until_condition("Succeeded", "Running")


@pytest.mark.usefixtures("kuberay")
def test_a_preemption_does_not_count_and_a_memory_kill_is_called_one(world: World, kubelet: Kubelet) -> None:
    world.claim()
    lost = json.dumps({"reason": "InternalError", "message": "a peer is gone", "step": 3})
    kubelet.trainers[1] = Trainer(exit_code=75, message=lost, disrupted=True)
    kubelet.trainers[2] = Trainer(exit_code=137, reason="OOMKilled")
    world.operator()
    world.submit(backoffLimit=0, trainer={"nodes": 2})
    said = world.until_condition("TrainerReady", "Evicted", "False")
    assert "preempted by another pod of higher priority" in said["message"]
    assert world.job()["status"].get("restarts", 0) == 0
    world.until_condition("Succeeded", "BackoffLimitExceeded", "False")
    assert world.condition("TrainerReady")["reason"] == "OutOfMemory"
    status = world.job()["status"]
    assert (status["attempts"], status["restarts"]) == (2, 1)


@pytest.mark.usefixtures("kuberay")
def test_what_keeps_pods_from_starting_is_told_in_a_condition_and_one_event(world: World, kubelet: Kubelet) -> None:
    world.claim()
    wait = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
    last = {"terminated": {"exitCode": 78, "message": "no such model: /models/teacher", "finishedAt": NOW}}
    kubelet.broken["teacher"] = {"state": wait, "lastState": last}
    pull = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "registry.test/workers:1"'}}
    kubelet.broken["rollout"] = {"state": pull}
    world.operator(DISTILL_RESYNC_SECONDS="0.3")
    world.submit(backoffLimit=0)
    crash = world.until_condition("TeacherReady", "CrashLooping", "False")
    assert crash["message"].endswith("exit code 78: no such model: /models/teacher")
    assert "pulling image" in world.until_condition("RolloutReady", "ImagePullFailed", "False")["message"]
    world.api.merge(world.path(JOBS, "job"), {"spec": {"preRunningDeadlineSeconds": 1}})
    said = world.until_condition("Succeeded", "PreRunningDeadlineExceeded", "False")
    assert "no such model" in said["message"]
    # The trainer is made once all have a node; it runs on until the deadline ends the attempt.
    wanted = {"CrashLooping": 1, "ImagePullFailed": 1, "PreRunningDeadlineExceeded": 1}
    assert events(world) == wanted


@pytest.mark.usefixtures("kuberay")
def test_silence_is_told_and_a_deadline_ends_the_job(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator()
    world.submit(stallTimeoutSeconds=2)
    assert "no step has ended for 2 s" in world.until_condition("Stalled", "NoStep", "True")["message"]
    world.api.merge(world.path(JOBS, "job"), {"spec": {"activeDeadlineSeconds": 5}})
    assert "active for more than 5 s" in world.until_condition("Succeeded", "DeadlineExceeded", "False")["message"]
    world.until("every pod is released", lambda: not world.pods())
    found = events(world)
    assert (found["NoStep"], found["DeadlineExceeded"]) == (1, 1)


@pytest.mark.usefixtures("kuberay")
def test_a_change_of_any_child_is_put_right_and_so_is_its_loss(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator(DISTILL_RESYNC_SECONDS="0.5")
    world.submit()
    world.until_condition("Succeeded", "Running")
    before = world.children()
    ingress = before["NetworkPolicy", "job-traffic"]["spec"]["ingress"]
    changes: dict[tuple[str, str], Json] = {
        ("ConfigMap", "job-job"): {"data": {"job.yaml": "{}"}},
        ("Deployment", "job-teacher"): {"spec": {"replicas": 0}},
        ("Job", "job-trainer-1"): {"spec": {"parallelism": 0}},
        # One rule more, which lets everybody in.
        ("NetworkPolicy", "job-traffic"): {"spec": {"ingress": [*ingress, {}]}},
        ("RayCluster", "job-rollout"): {"spec": {"workerGroupSpecs": []}},
        ("Service", "job-teacher"): {"spec": {"selector": {"distillation-operator.io/role": "trainer"}}},
        ("Service", "job-trainer"): {"spec": {"publishNotReadyAddresses": False}},
    }
    assert set(changes) == set(before)
    kubelet.stop()  # a deleted teacher's pods would be collected, and the roles be down
    for (kind, name), change in changes.items():
        world.api.merge(world.path(CHILDREN[kind], name), change)

    def spec(children: dict[tuple[str, str], Json]) -> Any:
        return {key: (child.get("spec"), child.get("data")) for key, child in children.items()}

    assert spec(world.children()) != spec(before)
    world.until("all is as it was", lambda: spec(world.children()) == spec(before))
    lost = [key for key in changes if key[0] in ("ConfigMap", "NetworkPolicy", "Service")]
    for kind, name in lost:
        world.api.call("DELETE", world.path(CHILDREN[kind], name))
    world.until("all is there again", lambda: set(world.children()) == set(before))
    assert world.job()["status"]["attempts"] == 1


@pytest.mark.usefixtures("kuberay")
def test_a_namespace_that_is_being_deleted_is_no_fault_of_the_job(world: World, kubelet: Kubelet) -> None:
    world.claim()
    operator = world.operator(DISTILL_RESYNC_SECONDS="0.3")
    world.submit()
    world.until_condition("Succeeded", "Running")
    kubelet.stop()
    # Nothing empties the namespace here, so each of its objects is deleted by hand, a child before the job.
    world.api.call("DELETE", f"/api/v1/namespaces/{world.namespace}")
    world.api.call("DELETE", world.path(CHILDREN["Deployment"], "job-teacher"))
    world.until("it was noticed", lambda: "its namespace is being deleted" in operator.log())
    assert world.condition("SpecValid")["status"] == "True"
    assert world.condition("Succeeded")["reason"] == "Running"
    world.api.call("DELETE", world.path(JOBS, "job"))
    world.until("it is forgotten", lambda: "distill_job_info{" not in operator.get("/metrics"))
    assert operator.process.poll() is None
    assert "ERROR" not in operator.log()


def test_the_crd_of_ray_clusters_may_be_removed_under_a_running_job(
    world: World, kubelet: Kubelet, crds_installed: Any, ray_crd: Path, kuberay: None
) -> None:
    world.claim()
    operator = world.operator(DISTILL_WATCH_NAMESPACES="", DISTILL_RESYNC_SECONDS="1")
    world.submit()
    world.until_condition("Succeeded", "Running")
    crds_installed.kubectl("delete", "crd", RAY_CRD, "--wait=true", "--timeout=60s")
    world.until_condition("RolloutReady", "KubeRayNotInstalled", "False")
    assert world.condition("Succeeded")["reason"] == "Running", (
        "whether it goes on without engines is the trainer's say"
    )
    # Which gives up in the end.
    lost = json.dumps({"reason": "EnginesLost", "message": "no engine answers", "step": 3})
    kubelet.trainers[1] = Trainer(exit_code=75, message=lost)
    world.until_condition("TrainerReady", "EnginesLost", "False")
    world.until("nothing is started", lambda: not world.pods())
    crds_installed.kubectl("apply", "--server-side", "-f", str(ray_crd))
    world.until_condition("Succeeded", "Running")
    assert world.job()["status"]["attempts"] == 2
    assert operator.process.poll() is None


@pytest.mark.usefixtures("kuberay")
def test_two_jobs_of_one_name_in_two_namespaces_know_nothing_of_each_other(
    world: World, kubelet: Kubelet, operator_kubeconfig: Path, tmp_path: Path
) -> None:
    other = World(world.api, f"{world.namespace}-other", operator_kubeconfig, tmp_path)
    world.api.call("POST", "/api/v1/namespaces", {"metadata": {"name": other.namespace}})
    theirs = Kubelet(other)
    theirs.trainers[1] = Trainer(exit_code=0)
    operator = world.operator(DISTILL_WATCH_NAMESPACES="")
    for each in (world, other):
        each.claim()
        each.submit()
    world.until_condition("Succeeded", "Running")
    other.until_condition("Succeeded", "Completed", "True")
    other.until("released", lambda: ("Deployment", "job-teacher") not in other.children())
    other.api.call("DELETE", other.path(JOBS, "job"))
    # The garbage collector's part.
    for kind, name in other.children():
        other.api.call("DELETE", other.path(CHILDREN[kind], name))
    other.until("forgotten", lambda: f'namespace="{other.namespace}"' not in operator.get("/metrics"))
    theirs.stop()
    assert world.condition("Succeeded")["reason"] == "Running"
    assert len(world.children()) == 7


@pytest.mark.usefixtures("kuberay")
def test_the_longest_name_runs_fails_and_runs_again(world: World, kubelet: Kubelet) -> None:
    world.claim()
    name = "j" * 40
    kubelet.trainers[1] = Trainer(exit_code=75)
    world.operator()
    world.submit(name, trainer={"nodes": 2})
    world.until_condition("Succeeded", "Restarting", name=name)
    world.until("the second attempt", lambda: world.job(name)["status"]["attempts"] == 2)
    world.until_condition("Succeeded", "Running", name=name)
    assert max(len(p["metadata"]["name"]) for p in world.pods()) <= 63
    too_long = f"{name}j"
    with pytest.raises(Exception, match="422"):
        world.submit(too_long)


NOW = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
