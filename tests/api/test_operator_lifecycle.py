"""The operator, as a process with its own rights alone, against the real API server; the test plays the cluster."""

import json
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from operator_world import CHILDREN, JOBS, PODS, RAY_CRD, Json, Kubelet, Trainer, World

pytest_plugins = ["operator_fixtures"]


def report(step: int, *, done: bool = False) -> Json:
    progress = {"step": step, "totalSteps": 10, "percent": step * 10, "reverseKL": "0.42", "checkpointStep": 5}
    result = {"modelPath": "/output/job/model", "step": 10} if done else None
    return {
        "phase": "Done" if done else "Training",
        "preflightPassed": True,
        "progress": progress,
        "result": result,
    }


def exit_report(reason: str, message: str) -> str:
    return json.dumps({"reason": reason, "message": message, "step": 3})


def kinds(world: World) -> list[tuple[str, str]]:
    return sorted(world.children())


@pytest.mark.usefixtures("kuberay")
def test_a_job_goes_from_apply_to_succeeded(world: World, kubelet: Kubelet) -> None:
    world.claim()
    server = kubelet.serve_progress()
    operator = world.operator()
    world.submit()
    world.until_condition("Succeeded", "Running", "Unknown")
    assert world.condition("Ready")["status"] == "True"
    assert kinds(world) == [
        ("ConfigMap", "job-job"),
        ("Deployment", "job-teacher"),
        ("Job", "job-trainer-1"),
        ("NetworkPolicy", "job-traffic"),
        ("RayCluster", "job-rollout"),
        ("Service", "job-teacher"),
        ("Service", "job-trainer"),
    ]
    owner = world.job()["metadata"]
    for child in world.children().values():
        meta = child["metadata"]
        assert [(o["uid"], o["controller"]) for o in meta["ownerReferences"]] == [(owner["uid"], True)]
        assert meta["labels"]["distillation-operator.io/job"] == "job"
        assert "kueue.x-k8s.io/priority-class" not in meta["labels"]
        assert "finalizers" not in meta
    assert "annotations" not in owner and "finalizers" not in owner

    kubelet.progress = report(4)
    world.until("progress", lambda: world.job()["status"].get("progress", {}).get("step") == 4)
    assert world.condition("Preflight")["status"] == "True"
    metrics = operator.get("/metrics")
    assert f'distill_job_condition{{name="job",namespace="{world.namespace}",type="Ready"}} 1.0' in metrics
    assert "last success" in operator.get("/healthz")

    kubelet.progress = report(10, done=True)
    world.until("the last progress", lambda: world.job()["status"]["progress"]["step"] == 10)
    kubelet.trainers[1] = Trainer(exit_code=0)
    world.until_condition("Succeeded", "Completed", "True")
    status = world.job()["status"]
    assert status["result"] == {"modelPath": "/output/job/model", "step": 10}
    assert (status["attempts"], status["restarts"]) == (1, 0)
    world.until("accelerators released", lambda: ("Deployment", "job-teacher") not in world.children())
    world.until("engines released", lambda: ("RayCluster", "job-rollout") not in world.children())
    assert ("Job", "job-trainer-1") in world.children()

    world.api.merge(world.path(JOBS, "job"), {"spec": {"ttlSecondsAfterFinished": 1}})
    world.until("ttl", lambda: not world.api.items(world.path(JOBS)))
    world.until("series gone", lambda: "distill_job_info{" not in operator.get("/metrics"))
    assert "ERROR" not in operator.log()
    server.shutdown()


@pytest.mark.usefixtures("kuberay")
def test_nothing_is_written_while_nothing_changes(world: World, kubelet: Kubelet) -> None:
    world.claim()
    operator = world.operator(DISTILL_RESYNC_SECONDS="0.3")
    world.submit()
    world.until_condition("Succeeded", "Running")
    before = (world.until_quiet(), world.children())

    def writes() -> dict[str, str]:
        lines = operator.get("/metrics").splitlines()
        wanted = [line for line in lines if line.startswith("distill_operator_api_requests_total")]
        return {line: "" for line in wanted if 'verb="get"' not in line and 'verb="list"' not in line}

    first = writes()
    time.sleep(2.5)
    assert writes() == first
    assert (world.job(), world.children()) == before


@pytest.mark.usefixtures("kuberay")
def test_a_failed_attempt_is_followed_by_the_next_one_from_scratch(world: World, kubelet: Kubelet) -> None:
    world.claim()
    kubelet.trainers[1] = Trainer(exit_code=75, message=exit_report("TeacherUnreachable", "no teacher answers"))
    world.operator()
    world.submit(backoffLimit=1)
    said = world.until_condition("Succeeded", "Restarting", "Unknown")
    assert "no teacher answers" in said["message"]
    assert world.condition("TrainerReady")["reason"] == "TeacherUnreachable"
    serving = {("Deployment", "job-teacher"), ("RayCluster", "job-rollout"), ("Job", "job-trainer-1")}
    world.until("everything of the attempt is gone", lambda: not serving & set(world.children()))
    kubelet.trainers[2] = Trainer(exit_code=1)
    world.until_condition("Succeeded", "BackoffLimitExceeded", "False")
    status = world.job()["status"]
    assert (status["attempts"], status["restarts"]) == (2, 2)
    assert {name for name, _ in kubelet.seen_trainer_jobs} == {"job-trainer-1", "job-trainer-2"}
    world.until("nothing is held", lambda: not (serving & set(world.children())))


@pytest.mark.usefixtures("kuberay")
def test_a_configuration_error_is_not_tried_again(world: World, kubelet: Kubelet) -> None:
    world.claim()
    text = "the tokenizers of student and teacher differ; choose a teacher of the student's family"
    kubelet.trainers[1] = Trainer(exit_code=78, message=exit_report("PreflightFailed", text))
    world.operator()
    world.submit()
    assert world.until_condition("Succeeded", "PreflightFailed", "False")["message"] == text
    assert world.condition("Preflight")["status"] == "False"
    assert world.job()["status"]["attempts"] == 1


@pytest.mark.usefixtures("kuberay")
def test_suspend_releases_every_pod_and_resume_is_the_next_attempt(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator()
    world.submit()
    world.until_condition("Succeeded", "Running")
    path = world.path(JOBS, "job")
    world.api.merge(path, {"spec": {"suspend": True}})
    world.until_condition("Suspended", "Suspended", "True")
    world.until("no pods", lambda: not world.pods())
    assert {kind for kind, _ in world.children()} == {"ConfigMap", "Service", "NetworkPolicy"}
    world.api.merge(path, {"spec": {"suspend": False}})
    world.until_condition("Succeeded", "Running")
    status = world.job()["status"]
    assert (status["attempts"], status["restarts"]) == (2, 0)
    assert ("Job", "job-trainer-2") in world.children()


@pytest.mark.usefixtures("kuberay")
def test_pods_of_every_child_pass_pod_security_restricted(world: World, kubelet: Kubelet) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    world.api.merge(f"/api/v1/namespaces/{world.namespace}", {"metadata": {"labels": label}})
    world.claim()
    world.operator()
    # disk: the engines mount the output volume as well
    world.submit(trainer={"weightSync": "disk", "nodes": 2}, rollout={"replicas": 2})
    # The kubelet of the test makes real pods of the real templates, so a refused one would never run.
    world.until_condition("Succeeded", "Running")
    pod = world.pods()[0]
    broken = {**pod, "metadata": {"name": "broken"}, "spec": {"containers": [{"name": "x", "image": "x"}]}}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        world.api.call("POST", world.path(PODS) + "?dryRun=All", broken)


@pytest.mark.usefixtures("kuberay")
def test_pods_as_kubernetes_writes_them_run_in_every_role_and_are_applied_once(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator()
    spec = {
        "initContainers": [
            {"name": "fetch", "image": "tools:1", "command": ["fetch"], "resources": {"limits": {"cpu": 1}}},
            {"name": "log", "image": "log:1", "restartPolicy": "Always"},
        ],
        "containers": [
            {
                "name": "main",
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                "resources": {"limits": {"rdma/hca": 1}, "claims": [{"name": "gpu"}]},
                "envFrom": [{"secretRef": {"name": "hub", "optional": True}}],
            }
        ],
        "hostNetwork": True,
        "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "h200"}],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "zone",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"team": "a"}},
            }
        ],
        "terminationGracePeriodSeconds": 600,
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
    }
    world.submit(podTemplate={"metadata": {"labels": {"team": "a"}}, "spec": spec})
    world.until_condition("Succeeded", "Running")
    pods = world.pods()
    assert {pod["metadata"]["labels"]["distillation-operator.io/role"] for pod in pods} == {
        "teacher",
        "rollout",
        "trainer",
    }
    for pod in pods:
        assert [c["name"] for c in pod["spec"]["initContainers"]] == ["fetch", "log"]
        own = pod["spec"]["containers"][0]
        assert own["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert own["resources"]["limits"]["rdma/hca"] == "1" and own["envFrom"] == spec["containers"][0]["envFrom"]
        assert pod["spec"]["hostNetwork"] is True and pod["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
        assert pod["spec"]["terminationGracePeriodSeconds"] == 600 and pod["metadata"]["labels"]["team"] == "a"
    generations = {name: c["metadata"].get("generation") for name, c in world.children().items()}
    world.api.merge(world.path(JOBS, "job"), {"spec": {"backoffLimit": 7}})
    time.sleep(3)
    assert {name: c["metadata"].get("generation") for name, c in world.children().items()} == generations


@pytest.mark.usefixtures("kuberay")
def test_what_only_the_operator_may_set_is_refused_by_name_before_anything_starts(world: World) -> None:
    world.claim()
    world.operator()
    world.submit(trainer={"template": {"spec": {"containers": [{"name": "main", "command": ["sleep"]}]}}})
    said = world.until_condition("Succeeded", "InvalidSpec", "Unknown")
    assert "containers[main].command may not be set" in said["message"]
    assert not world.children()


@pytest.mark.usefixtures("kuberay")
def test_the_trainer_waits_until_every_other_pod_has_a_node(world: World, kubelet: Kubelet) -> None:
    world.claim()
    kubelet.unschedulable.add("rollout")
    world.operator()
    world.submit()
    assert "Insufficient nvidia.com/gpu" in world.until_condition("RolloutReady", "Unschedulable", "False")["message"]
    assert world.condition("TrainerReady")["reason"] == "WaitingForRoles"
    assert not kubelet.seen_trainer_jobs
    kubelet.unschedulable.clear()
    world.until_condition("Succeeded", "Running")


@pytest.mark.usefixtures("kuberay")
def test_a_change_by_hand_is_put_right(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator()
    world.submit(rollout={"replicas": 1})
    world.until_condition("Succeeded", "Running")
    path = world.path(CHILDREN["Deployment"], "job-teacher")
    world.api.merge(path, {"spec": {"replicas": 3}})
    world.until("replicas again", lambda: world.api.call("GET", path)["spec"]["replicas"] == 1)
    world.api.merge(world.path(JOBS, "job"), {"spec": {"rollout": {"replicas": 2}}})
    ray = world.path(CHILDREN["RayCluster"], "job-rollout")
    group = "workerGroupSpecs"
    world.until("two engines", lambda: world.api.call("GET", ray)["spec"][group][0]["replicas"] == 2)
    world.until("both ready", lambda: "2 of 2" in world.condition("RolloutReady")["message"])
    assert world.job()["status"]["attempts"] == 1


def test_kuberay_may_be_installed_after_the_job(
    world: World, kubelet: Kubelet, crds_installed: Any, ray_crd: Path
) -> None:
    crds_installed.kubectl("delete", "crd", RAY_CRD, "--ignore-not-found", "--wait=true", "--timeout=60s")
    world.claim()
    # Everywhere, as only then the CRDs are watched.
    operator = world.operator(DISTILL_WATCH_NAMESPACES="")
    world.submit()
    said = world.until_condition("RolloutReady", "KubeRayNotInstalled", "False")
    assert "install the KubeRay operator" in said["message"]
    assert not world.children()
    crds_installed.kubectl("apply", "--server-side", "-f", str(ray_crd))
    world.until_condition("Succeeded", "Running")
    assert operator.process.poll() is None
    assert "forbidden" not in operator.log().lower()


@pytest.mark.usefixtures("kuberay")
def test_a_missing_claim_starts_nothing_and_says_what_to_do(world: World, kubelet: Kubelet) -> None:
    world.operator()
    world.submit()
    said = world.until_condition("TrainerReady", "VolumeNotBound", "False")
    assert "out (spec.output.volume) does not exist; create it" in said["message"]
    time.sleep(1)
    assert not world.children()
    world.claim()
    world.until_condition("Succeeded", "Running")


@pytest.mark.usefixtures("kuberay")
def test_an_invalid_spec_starts_nothing_and_says_what_to_do(world: World, kubelet: Kubelet) -> None:
    world.operator()
    world.submit(trustRemoteCode=True)
    said = world.until_condition("Succeeded", "InvalidSpec", "Unknown")
    assert "spec.trustRemoteCode: this installation does not allow" in said["message"]
    assert world.condition("SpecValid")["status"] == "False"
    assert not world.children()


@pytest.mark.usefixtures("kuberay")
def test_a_pod_template_that_the_api_server_refuses_starts_nothing(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator()
    wrong = {"volumes": [{"name": "Not_A_Name", "emptyDir": {}}]}
    world.submit(trainer={"template": wrong})
    said = world.until_condition("Succeeded", "InvalidSpec", "Unknown")
    assert "Not_A_Name" in said["message"]
    assert not world.children()


@pytest.mark.usefixtures("kuberay")
def test_a_strangers_object_of_the_same_name_is_left_alone(world: World, kubelet: Kubelet) -> None:
    world.claim()
    path = world.path(CHILDREN["ConfigMap"])
    world.api.call("POST", path, {"metadata": {"name": "job-job"}, "data": {"mine": "yes"}})
    world.operator()
    world.submit()
    said = world.until_condition("TrainerReady", "NameTaken", "False")
    assert "ConfigMap job-job exists and belongs to something else" in said["message"]
    assert kinds(world) == [("ConfigMap", "job-job")]
    world.api.call("DELETE", f"{path}/job-job")
    world.until_condition("Succeeded", "Running")


@pytest.mark.usefixtures("kuberay")
def test_sigterm_ends_the_operator_cleanly_within_five_seconds(world: World, kubelet: Kubelet) -> None:
    world.claim()
    operator = world.operator()
    world.submit()
    world.until_condition("Succeeded", "Running")
    before = world.children()
    for _ in range(3):  # the best of three: another process may have had the processors meanwhile
        code, seconds = operator.terminate()
        assert code == 0, operator.log()
        assert world.children() == before
        if seconds < 5:
            break
        operator = world.operator()
        world.until("it works", lambda found=operator: "last success" in found.get("/healthz"))
    assert seconds < 5


@pytest.mark.usefixtures("kuberay")
def test_rights_in_one_namespace_are_enough_there(world: World, kubelet: Kubelet, namespaced_kubeconfig: Path) -> None:
    world.claim()
    operator = world.operator(KUBECONFIG=str(namespaced_kubeconfig))
    world.submit()
    world.until_condition("Succeeded", "Running")
    assert "forbidden" not in operator.log().lower()


def test_a_wrong_setting_is_named(world: World) -> None:
    operator = world.operator(DISTILL_WORKERS_IMAGE="")
    assert operator.process.wait(20) == 1
    assert "DISTILL_WORKERS_IMAGE is not set" in operator.log()
