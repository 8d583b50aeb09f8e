"""A Teacher on the real API server: made, shared, scaled by what its jobs have for it to do, gone without a trace."""

import json
import urllib.error
from typing import Any

import pytest
from operator_world import CHILDREN, TEACHERS, Json, Kubelet, World, teacher

pytest_plugins = ["operator_fixtures"]
pytestmark = pytest.mark.usefixtures("kuberay")

SCALED = {"minReplicas": 1, "maxReplicas": 4, "targetRequests": 10}


def status(world: World, name: str = "poet") -> Json:
    found: Json = world.api.call("GET", world.path(TEACHERS, name)).get("status", {})
    return found


def until_ready(world: World, servers: int) -> None:
    world.until(f"{servers} servers answer", lambda: status(world).get("readyReplicas") == servers)


def report(requests: int) -> Json:
    progress = {"step": 1, "totalSteps": 10, "teachers": [{"name": "teacher", "requests": requests}]}
    return {"phase": "Training", "preflightPassed": True, "progress": progress}


def test_a_teacher_serves_and_is_scaled_by_hand_and_what_was_changed_is_put_right(
    world: World, kubelet: Kubelet, crds_installed: Any
) -> None:
    world.operator()
    world.api.call("POST", world.path(TEACHERS), teacher("poet"))
    until_ready(world, 1)
    assert sorted(world.children()) == [
        ("ConfigMap", "poet-scoring"),
        ("Deployment", "poet-scoring"),
        ("NetworkPolicy", "poet-scoring"),
        ("Service", "poet-scoring"),
    ]
    shown = crds_installed.kubectl("get", "dteacher", "-n", world.namespace).stdout
    assert [line.split()[:4] for line in shown.splitlines()] == [
        ["NAME", "STATE", "SERVERS", "WANTED"],
        ["poet", "Ready", "1", "1"],
    ]
    crds_installed.kubectl("scale", "dteacher/poet", "--replicas=2", "-n", world.namespace)
    until_ready(world, 2)
    path = world.path(CHILDREN["Deployment"], "poet-scoring")
    world.api.merge(path, {"spec": {"replicas": 5}})
    world.until("two servers again", lambda: world.api.call("GET", path)["spec"]["replicas"] == 2)
    world.api.call("DELETE", world.path(TEACHERS, "poet"))
    for kind, name in world.children():
        # What the garbage collector would do, of which this server has none.
        world.api.call("DELETE", world.path(CHILDREN[kind], name))
    world.until("it is not made again", lambda: not world.children(), seconds=5)


def test_an_autoscaler_scales_a_teacher_by_its_scale_subresource_to_zero_and_back(
    world: World, kubelet: Kubelet
) -> None:
    """As HPA and KEDA do: replicas and selector are read from the subresource, and replicas written to it."""
    world.claim()
    world.operator()
    world.api.call("POST", world.path(TEACHERS), teacher("poet", replicas=2))
    until_ready(world, 2)
    path = f"{world.path(TEACHERS, 'poet')}/scale"

    def scale() -> Json:
        found: Json = world.api.call("GET", path)
        return found

    world.until("two pods are counted", lambda: scale()["status"]["replicas"] == 2)
    assert scale()["spec"] == {"replicas": 2}
    selector = dict(part.split("=") for part in scale()["status"]["selector"].split(","))
    assert len([pod for pod in world.pods() if selector.items() <= pod["metadata"]["labels"].items()]) == 2
    world.api.merge(path, {"spec": {"replicas": 0}})
    world.until("no pod is left", lambda: not world.pods() and scale()["status"]["replicas"] == 0)
    world.submit(teacher={"ref": {"name": "poet"}})
    world.until_condition("TeacherReady", "ScaledToZero", "False")
    assert not [name for kind, name in world.children() if kind in ("RayCluster", "Job")], "it holds nothing"
    world.api.merge(path, {"spec": {"replicas": 1}})
    world.until_condition("Succeeded", "Running")
    assert scale()["status"]["replicas"] == 1


def test_a_job_that_names_it_makes_no_teacher_and_its_requests_add_servers(world: World, kubelet: Kubelet) -> None:
    world.claim()
    server = kubelet.serve_progress()
    world.operator()
    world.api.call("POST", world.path(TEACHERS), teacher("poet", autoscaling=SCALED))
    until_ready(world, 1)
    kubelet.progress = report(25)
    world.submit(teacher={"ref": {"name": "poet"}})
    world.until_condition("TeacherReady", "Ready", "True")
    world.until_condition("Succeeded", "Running")
    assert ("Deployment", "job-teacher") not in world.children()
    [trainer] = [child for (kind, _), child in world.children().items() if kind == "Job"]
    environment = {e["name"]: e.get("value") for e in trainer["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["DISTILL_TEACHER_ADDRESS"] == "poet-scoring:30000"
    until_ready(world, 3)
    assert (status(world)["jobs"], status(world)["requests"]) == (1, 25)
    server.shutdown()


def test_a_job_waits_for_its_teacher_and_says_what_that_lacks_and_hears_when_it_is_deleted(
    world: World, kubelet: Kubelet
) -> None:
    world.claim()
    operator = world.operator()
    world.submit(teacher={"ref": {"name": "poet"}})
    missing = world.until_condition("TeacherReady", "TeacherNotFound", "False")
    assert "the Teacher poet does not exist in this namespace; create it" in missing["message"]
    kubelet.unschedulable.add("teacher")
    world.api.call("POST", world.path(TEACHERS), teacher("poet"))
    full = world.until_condition("TeacherReady", "Unschedulable", "False")
    assert "3 Insufficient nvidia.com/gpu" in full["message"]
    world.until("the engines are made", lambda: ("RayCluster", "job-rollout") in world.children())
    assert ("Job", "job-trainer-1") not in world.children(), "the trainer waits"
    kubelet.unschedulable.clear()
    world.until_condition("TeacherReady", "Ready", "True")
    world.until_condition("Succeeded", "Running")
    path = world.path("/apis/events.k8s.io/v1/namespaces/{ns}/events")
    about = [(e["regarding"]["kind"], e["reason"]) for e in world.api.items(path)]
    assert {("Teacher", "Unschedulable"), ("Teacher", "Ready"), ("DistillationJob", "TeacherNotFound")} <= set(about)
    assert len(about) == len(set(about)), "each is told once"
    assert 'distill_shared_teacher_condition{name="poet"' in operator.get("/metrics")
    world.api.call("DELETE", world.path(TEACHERS, "poet"))
    world.until_condition("TeacherReady", "TeacherNotFound", "False")
    assert "poet" not in "".join(line for line in operator.get("/metrics").splitlines() if "shared_teacher" in line)


def test_a_teacher_and_a_job_of_one_name_do_not_meet(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator()
    world.api.call("POST", world.path(TEACHERS), teacher("job"))
    world.submit()
    world.until_condition("Succeeded", "Running")
    world.until("both teachers answer", lambda: status(world, "job").get("readyReplicas") == 1)
    names = {name for kind, name in world.children() if kind == "Deployment"}
    assert names == {"job-teacher", "job-scoring"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"replicas": 3, "autoscaling": SCALED}, "replicas is what autoscaling decides"),
        ({"autoscaling": {"minReplicas": 5, "maxReplicas": 4}}, "minReplicas must not exceed maxReplicas"),
    ],
)
def test_the_server_refuses_a_wrong_teacher_in_a_sentence(
    crds_installed: Any, namespace: str, tmp_path: Any, spec: Json, said: str
) -> None:

    file = tmp_path / "teacher.json"
    file.write_text(json.dumps(teacher("poet", **spec)))
    refused = crds_installed.kubectl("apply", "-f", str(file), "-n", namespace, check=False)
    assert refused.returncode and said in refused.stderr


def test_of_a_served_model_nothing_but_the_number_of_servers_may_change(world: World) -> None:

    world.api.call("POST", world.path(TEACHERS), teacher("poet"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        world.api.merge(world.path(TEACHERS, "poet"), {"spec": {"model": "/models/other"}})
    assert "immutable" in refused.value.read().decode()
