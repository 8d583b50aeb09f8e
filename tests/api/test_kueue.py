"""Jobs and Teachers in queues, against Kueue's own CRDs; its scheduler is played by what it would write."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_world import JOBS, TEACHERS, Kubelet, Trainer, World, manifest, teacher

from go_modules import downloaded

pytest_plugins = ["operator_fixtures"]

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "kueue"
GOLDEN = ROOT / "tests" / "unit" / "golden" / "workload.yaml"
PLURALS = ("workloads", "clusterqueues", "localqueues", "resourceflavors", "workloadpriorityclasses")
WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/namespaces/{ns}/workloads"
QUEUE = "kueue.x-k8s.io/queue-name"
POOL = {"example.com/pool": "training"}
AGO = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def kueue(crds_installed: Any) -> Iterator[Any]:
    """The server, with the CRDs of the Kueue that dev/tools/kueue pins, and without its webhooks."""
    folder = Path(downloaded("sigs.k8s.io/kueue", ROOT / "dev/tools/kueue")["Dir"]) / "config/components/crd/bases"
    names = []
    for plural in PLURALS:
        found = yaml.safe_load((folder / f"kueue.x-k8s.io_{plural}.yaml").read_text())
        # No webhook runs here to convert; each object is written in the version that is stored.
        found["spec"]["conversion"] = {"strategy": "None"}
        names.append(found["metadata"]["name"])
        crds_installed.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(found))
    for name in names:
        crds_installed.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{name}")
    shutil.rmtree(crds_installed.kubeconfig.parent / "kubectl-cache", ignore_errors=True)
    flavor = {"metadata": {"name": "training"}, "spec": {"nodeLabels": POOL}}
    for kind, body in (
        ("ResourceFlavor", flavor),
        ("WorkloadPriorityClass", {"metadata": {"name": "urgent"}, "value": 1000}),
    ):
        whole = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, **body}
        crds_installed.kubectl("apply", "-f", "-", stdin=json.dumps(whole))
    yield crds_installed
    crds_installed.kubectl("delete", "crd", *names, "--wait=false")


class Scheduler:
    """Kueue's scheduler, as far as it writes one Workload."""

    def __init__(self, world: World, name: str = "distillationjob-job") -> None:
        self.world, self.path = world, world.path(WORKLOADS, name)

    def find(self) -> Json | None:
        return self.world.api.find(self.path)

    def wait(self) -> Json:
        found: Json = self.world.until("the Workload", self.find)
        return found

    def says(self, kind: str) -> tuple[str, str]:
        found = (self.find() or {}).get("status", {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in found if c["type"] == kind), ("", ""))

    def write(self, *changes: tuple[str, str, str, str], **status: Any) -> None:
        kept = {c["type"]: c for c in (self.find() or {}).get("status", {}).get("conditions", [])}
        for kind, value, reason, message in changes:
            body = {"type": kind, "status": value, "reason": reason, "message": message}
            kept[kind] = {**body, "lastTransitionTime": AGO}
        patch = {"status": {"conditions": list(kept.values()), **status}}
        self.world.api.merge(f"{self.path}/status", patch)

    def pends(self, message: str) -> None:
        self.write(("QuotaReserved", "False", "Pending", message))

    def admits(self) -> None:
        sets = [
            {"name": p["name"], "count": p["count"], "flavors": {"cpu": "training", "memory": "training"}}
            for p in self.wait()["spec"]["podSets"]
        ]
        self.write(
            ("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue all"),
            ("Admitted", "True", "Admitted", "The workload is admitted"),
            ("Evicted", "False", "QuotaReserved", "Previously"),
            admission={"clusterQueue": "all", "podSetAssignments": sets},
        )

    def evicts(self, reason: str = "Preempted") -> None:
        self.write(("Evicted", "True", reason, "Preempted to accommodate a workload"))


def submit(world: World, labels: dict[str, str], **spec: Any) -> None:
    body = manifest("job", **spec)
    body["metadata"]["labels"] = labels
    world.api.call("POST", world.path(JOBS), body)


def test_the_examples_and_what_the_operator_makes_are_what_kueue_takes(kueue: Any, namespace: str) -> None:
    documents = [*yaml.safe_load_all((EXAMPLES / "queues.yaml").read_text())]
    documents += [yaml.safe_load((EXAMPLES / "job.yaml").read_text()), yaml.safe_load(GOLDEN.read_text())]
    for document in documents:
        if "namespace" in document["metadata"]:
            document["metadata"]["namespace"] = namespace
        kueue.kubectl("create", "--validate=strict", "-f", "-", stdin=json.dumps(document))


@pytest.mark.usefixtures("kueue", "kuberay")
def test_a_queued_job_has_pods_while_it_is_admitted_and_gives_its_quota_back_after_the_last(
    world: World, kubelet: Kubelet
) -> None:
    world.claim()
    kubelet.lingering = True
    world.operator(DISTILL_KUEUE="true")
    submit(world, {QUEUE: "research", "kueue.x-k8s.io/priority-class": "urgent"})
    scheduler = Scheduler(world)
    found = scheduler.wait()
    assert found["spec"]["queueName"] == "research" and found["spec"]["priority"] == 1000
    assert [p["name"] for p in found["spec"]["podSets"]] == ["teacher", "head", "engine", "trainer"]
    scheduler.pends("couldn't assign flavors: insufficient unused quota for cpu")
    world.until("Kueue's reason", lambda: "insufficient unused quota" in world.condition("Succeeded")["message"])
    assert world.condition("Succeeded")["reason"] == "WaitingForQuota"
    assert world.condition("Succeeded")["message"].startswith("waits for quota in queue research: ")
    assert world.condition("QuotaReserved")["status"] == world.condition("Admitted")["status"] == "False"
    assert not world.pods() and not world.job()["status"].get("attempts")

    scheduler.admits()
    world.until_condition("Succeeded", "Running")
    world.until("PodsReady", lambda: scheduler.says("PodsReady") == ("True", "Started"))
    assert world.condition("Admitted")["status"] == "True"
    assert all(pod["spec"]["nodeSelector"] == POOL for pod in world.pods())
    for child in world.children().values():
        assert not [k for k in child["metadata"].get("labels", {}) if "kueue" in k]

    # Its trainer's node is silent, so the trainer may still run: neither does another begin, nor is its quota free.
    broken: list[str] = []
    watching = threading.Event()

    def look() -> None:
        while not watching.wait(0.05):
            # In this order: what holds no quota at the first read has no pod at the second.
            holds, pods = scheduler.says("QuotaReserved")[0] == "True", world.pods()
            if pods and not holds:
                broken.append(f"{len(pods)} pods without quota")

    watcher = threading.Thread(target=look)
    watcher.start()
    scheduler.evicts()
    world.until_condition("Suspended", "Suspending", "False")
    world.until("only the trainer is left", lambda: len(world.pods()) == 1)
    assert scheduler.says("QuotaReserved")[0] == "True"
    kubelet.end_trainers()
    world.until("the quota is free", lambda: scheduler.says("QuotaReserved")[0] == "False")
    watching.set()
    watcher.join()
    assert not broken
    found = scheduler.wait()["status"]
    assert "admission" not in found
    assert scheduler.says("Requeued") == ("True", "Preempted")
    assert scheduler.says("Admitted") == ("False", "NoReservation")
    world.until_condition("Succeeded", "WaitingForQuota")

    kubelet.lingering = False
    kubelet.trainers[2] = Trainer(exit_code=0)
    scheduler.admits()
    world.until_condition("Succeeded", "Completed")
    status = world.job()["status"]
    assert (status["attempts"], status.get("restarts", 0)) == (2, 0)
    world.until("Finished", lambda: scheduler.says("Finished") == ("True", "Succeeded"))


@pytest.mark.usefixtures("kueue", "kuberay")
def test_a_job_without_a_queue_and_one_of_another_cluster_have_no_workload(world: World, kubelet: Kubelet) -> None:
    world.claim()
    world.operator(DISTILL_KUEUE="true")
    elsewhere = manifest("elsewhere", managedBy="kueue.x-k8s.io/multikueue")
    elsewhere["metadata"]["labels"] = {QUEUE: "research"}
    world.api.call("POST", world.path(JOBS), elsewhere)
    world.submit()
    world.until_condition("Succeeded", "Running")
    assert not world.api.items(world.path(WORKLOADS))
    assert world.condition("Admitted")["status"] == ""
    assert "status" not in world.job("elsewhere")


@pytest.mark.usefixtures("kuberay")
def test_a_queue_without_kueue_is_told_and_the_job_starts_once_it_is_there(
    request: pytest.FixtureRequest, world: World, kubelet: Kubelet
) -> None:
    request.getfixturevalue("kueue")
    world.claim()
    world.operator()
    submit(world, {QUEUE: "research"})
    world.until_condition("Succeeded", "KueueNotInstalled")
    assert "(kueue of the chart)" in world.condition("Succeeded")["message"]
    world.operators[-1].kill()
    world.operator(DISTILL_KUEUE="true")
    Scheduler(world).admits()
    world.until_condition("Succeeded", "Running")


@pytest.mark.usefixtures("kueue")
def test_a_teacher_in_a_queue_serves_while_it_is_admitted(world: World, kubelet: Kubelet) -> None:
    world.operator(DISTILL_KUEUE="true")
    body = teacher("poet", replicas=2)
    body["metadata"]["labels"] = {QUEUE: "research"}
    world.api.call("POST", world.path(TEACHERS), body)
    scheduler = Scheduler(world, "teacher-poet")
    scheduler.wait()

    def ready() -> tuple[str, str]:
        found = world.api.call("GET", world.path(TEACHERS, "poet")).get("status", {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in found if c["type"] == "Ready"), ("", ""))

    world.until("it waits", lambda: ready() == ("False", "WaitingForQuota"))
    assert not world.pods()
    scheduler.admits()
    world.until("it serves", lambda: ready()[0] == "True" and len(world.pods()) == 2)
    assert all(pod["spec"]["nodeSelector"] == POOL for pod in world.pods())
    scheduler.evicts()
    world.until("the quota is free", lambda: scheduler.says("QuotaReserved")[0] == "False")
    assert not world.pods()
    assert scheduler.says("Requeued") == ("True", "Preempted")
