"""At most one trainer: the operator as a process waits for the pods of before, whichever way they came about.

The kubelet of these tests has a node that lets no trainer pod go until it is told to.
"""

from typing import Any

import pytest
from operator_world import CHILDREN, JOBS, PODS, Kubelet, Trainer, World

pytest_plugins = ["operator_fixtures"]
pytestmark = pytest.mark.usefixtures("kuberay")
WAITS = "EarlierTrainerRuns"


@pytest.fixture
def running(world: World, kubelet: Kubelet) -> World:
    """A job that runs, and whose trainer will take its time to end."""
    kubelet.lingering = True
    world.claim()
    world.submit()
    world.operator()
    world.until_condition("Succeeded", "Running")
    return world


def status(world: World) -> Any:
    return world.job().get("status", {})


def trainers(world: World) -> list[str]:
    role = "distillation-operator.io/role"
    return sorted(p["metadata"]["name"] for p in world.pods() if p["metadata"]["labels"].get(role) == "trainer")


def test_a_job_that_is_suspended_and_resumed_waits_for_its_trainer(running: World, kubelet: Kubelet) -> None:
    running.api.merge(running.path(JOBS, "job"), {"spec": {"suspend": True}})
    running.until_condition("Suspended", "Suspending", "False")
    running.until("only the trainer is left", lambda: status(running).get("active") == 1)
    assert running.condition("Suspended")["status"] == "False"
    running.api.merge(running.path(JOBS, "job"), {"spec": {"suspend": False}})
    running.until_condition("TrainerReady", WAITS)
    assert (status(running)["attempts"], trainers(running)) == (1, ["job-trainer-1-0"])
    kubelet.end_trainers()
    running.until_condition("Succeeded", "Running")
    assert (status(running)["attempts"], trainers(running)) == (2, ["job-trainer-2-0"])


def test_a_suspended_job_says_so_when_its_last_pod_has_gone(running: World, kubelet: Kubelet) -> None:
    running.api.merge(running.path(JOBS, "job"), {"spec": {"suspend": True}})
    running.until("only the trainer is left", lambda: status(running).get("active") == 1)
    kubelet.end_trainers()
    running.until_condition("Suspended", "Suspended", "True")
    assert (status(running).get("active", 0), running.pods()) == (0, [])


def test_the_next_attempt_waits_for_the_other_ranks_of_the_failed_one(world: World, kubelet: Kubelet) -> None:
    kubelet.lingering = True
    kubelet.trainers[1] = Trainer(exit_code=75, survivors=True)
    world.claim()
    world.submit(trainer={"nodes": 2})
    world.operator()
    world.until_condition("TrainerReady", WAITS)
    assert (status(world)["attempts"], status(world)["restarts"]) == (1, 1)
    assert trainers(world)[-1] == "job-trainer-1-1"
    kubelet.end_trainers()
    world.until_condition("Succeeded", "Running")
    assert trainers(world) == ["job-trainer-2-0", "job-trainer-2-1"]


def test_a_job_that_is_applied_again_waits_for_the_old_trainer_and_names_its_lost_node(
    running: World, kubelet: Kubelet
) -> None:
    kubelet.grace_seconds = 1
    running.api.call("DELETE", running.path(JOBS, "job"))
    running.submit()
    for kind, name in running.children():
        # As the garbage collector does.
        options = {"propagationPolicy": "Background"}
        running.api.call("DELETE", running.path(CHILDREN[kind], name), options)
    running.until_condition("TrainerReady", WAITS)
    assert (status(running).get("attempts", 0), status(running).get("active", 0)) == (0, 0)
    lost = running.until_condition("TrainerReady", "PodLost")
    assert "its node n1 does not confirm it" in lost["message"]
    command = f"kubectl delete pod job-trainer-1-0 -n {running.namespace} --force"
    assert lost["message"].endswith(command), "which is done now"
    kubelet.end_trainers()
    running.until_condition("Succeeded", "Running")
    running.until("every pod is counted", lambda: status(running)["active"] == 4)
    assert status(running)["attempts"] == 1


def test_a_deleted_trainer_job_is_a_failed_attempt(running: World, kubelet: Kubelet) -> None:
    running.api.call("DELETE", running.path(CHILDREN["Job"], "job-trainer-1"), {"propagationPolicy": "Background"})
    running.until_condition("TrainerReady", WAITS)
    assert (status(running)["attempts"], status(running)["restarts"]) == (1, 1)
    kubelet.end_trainers()
    running.until_condition("Succeeded", "Running")
    assert [name for name, _ in sorted(kubelet.seen_trainer_jobs)] == ["job-trainer-1", "job-trainer-2"]
    events = running.api.items(running.path("/apis/events.k8s.io/v1/namespaces/{ns}/events"))
    assert any("the Job job-trainer-1 was deleted" in e["note"] for e in events if e["reason"] == "Restarting")


def test_a_pod_that_somebody_made_with_the_labels_of_a_job_is_not_its_own(running: World, kubelet: Kubelet) -> None:
    labels = {"app.kubernetes.io/managed-by": "distillation-operator"}
    labels |= {"distillation-operator.io/job": "job", "distillation-operator.io/role": "rollout"}
    spec = {"containers": [{"name": "x", "image": "x"}]}
    body = {"metadata": {"name": "mine", "labels": labels}, "spec": spec}
    running.api.call("POST", running.path(PODS), body)
    running.api.merge(running.path(JOBS, "job"), {"spec": {"suspend": True}})
    running.until("only the trainer is left", lambda: status(running).get("active") == 1)
    kubelet.end_trainers()
    running.until_condition("Suspended", "Suspended", "True")
    running.api.merge(running.path(JOBS, "job"), {"spec": {"suspend": False}})
    running.until_condition("Succeeded", "Running")
    assert "mine" in [p["metadata"]["name"] for p in running.pods()]
