"""Jobs in queues of Kueue's own manager, its scheduler and the webhooks of its Workloads; only nodes are played."""

import base64
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_world import JOBS, Api, Kubelet, Trainer, World, api_of, manifest

from distill_workers.serving.ports import reserve_port
from go_modules import downloaded

pytest_plugins = ["operator_fixtures"]
# Kueue's manager is built from its module, which takes minutes the first time.
pytestmark = pytest.mark.soak

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distillation-operator")
KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
WORKLOADS = KUEUE + "/namespaces/{ns}/workloads"
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
POOL = {"example.com/pool": "training"}
GATES = {"VisibilityOnDemand": False}
CERTIFICATES = "/etc/kueue/metrics/certs"
"""Where the manager looks for a certificate that it does not make itself; in a file system of its own."""


@pytest.fixture(scope="module")
def manager(crds_installed: Any, ray_crd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The API server with Kueue's CRDs, its manager as a process, and the webhooks of Workloads."""
    if os.geteuid() != 0:
        pytest.skip("the manager's certificates need a mount, which needs root")
    subprocess.run([ROOT / "dev/tools.sh", "kueue"], check=True, timeout=3600)
    module = Path(downloaded("sigs.k8s.io/kueue", ROOT / "dev/tools/kueue")["Dir"])
    api, folder = api_of(crds_installed.kubeconfig), tmp_path_factory.mktemp("kueue")
    crds_installed.kubectl("apply", "--server-side", "-f", str(ray_crd))
    names = []
    for path in sorted((module / "config/components/crd/bases").glob("*.yaml")):
        found = yaml.safe_load(path.read_text())
        # Each object is written in the version that is stored.
        found["spec"]["conversion"] = {"strategy": "None"}
        names.append(found["metadata"]["name"])
        crds_installed.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(found))
    for name in names:
        crds_installed.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{name}")
    crds_installed.kubectl("create", "namespace", "kueue-system", check=False)
    # The API server's own, which it made for 127.0.0.1.
    cluster = json.loads(crds_installed.kubeconfig.read_text())["clusters"][0]["cluster"]
    certificates = Path(cluster["certificate-authority"])
    key = certificates.with_suffix(".key")
    port, health = reserve_port(), reserve_port()
    serving = folder / "serving"
    serving.mkdir()
    for source, target in ((certificates, "tls.crt"), (key, "tls.key")):
        (serving / target).write_bytes(source.read_bytes())
    config = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": port, "certDir": str(serving)},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "integrations": {"frameworks": ["batch/job", "ray.io/raycluster"]},
        "featureGates": GATES,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    script = (
        f"mount -t tmpfs none /etc && mkdir -p {CERTIFICATES} && cp {serving}/tls.* {CERTIFICATES} && "
        f"exec {CACHE}/bin/kueue-manager --config={folder}/config.yaml"
    )
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, "KUBECONFIG": str(crds_installed.kubeconfig)}
        process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        deadline = time.monotonic() + 120
        while not ready(health):
            text = (folder / "log").read_text(errors="replace")
            assert process.poll() is None and time.monotonic() < deadline, text[-6000:]
            time.sleep(0.2)
        for body in webhooks(port, certificates):
            crds_installed.kubectl("apply", "-f", "-", stdin=json.dumps(body))
        yield api
    finally:
        for body in webhooks(port, certificates):
            crds_installed.kubectl("delete", body["kind"], body["metadata"]["name"], check=False)
        process.terminate()
        process.wait(30)
        print((folder / "log").read_text(errors="replace")[-4000:])
        crds_installed.kubectl("delete", "crd", *names, "--wait=false")


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def webhooks(port: int, certificate: Path) -> list[Json]:
    """Those of Workloads, and of their status."""
    found = []
    bundle = base64.b64encode(certificate.read_bytes()).decode()
    for verb, kind in (("mutate", "Mutating"), ("validate", "Validating")):
        url = f"https://127.0.0.1:{port}/{verb}-kueue-x-k8s-io-v1beta2-workload"
        resources = ["workloads"] if verb == "mutate" else ["workloads", "workloads/status"]
        operations = ["CREATE"] if verb == "mutate" else ["CREATE", "UPDATE"]
        rule = {"apiGroups": ["kueue.x-k8s.io"], "apiVersions": ["v1beta2"], "resources": resources}
        hook = {
            "name": f"{verb}.workload.test.io",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "clientConfig": {"url": url, "caBundle": bundle},
            "rules": [{**rule, "operations": operations}],
        }
        meta = {"name": f"kueue-{verb}"}
        kind = f"{kind}WebhookConfiguration"
        found.append(
            {"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": meta, "webhooks": [hook]}
        )
    return found


def create(manager: Api, path: str, kind: str, name: str, **body: Any) -> None:
    """Make an object of Kueue's."""
    manager.call(
        "POST", path, {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}, **body}
    )


def submit(world: World, name: str, queue: str, priority: str) -> None:
    body = manifest(name)
    body["metadata"]["labels"] = {QUEUE: queue, PRIORITY: priority}
    world.api.call("POST", world.path(JOBS), body)


def says(world: World, name: str, kind: str) -> tuple[str, str]:
    found = world.api.find(world.path(WORKLOADS, f"distillationjob-{name}")) or {}
    conditions = found.get("status", {}).get("conditions", [])
    return next(((c["status"], c["reason"]) for c in conditions if c["type"] == kind), ("", ""))


def pods_of(world: World, name: str) -> list[Json]:
    label = "distillation-operator.io/job"
    return [
        p
        for p in world.pods()
        if p["metadata"]["labels"].get(label) == name and p["status"].get("phase") not in ("Succeeded", "Failed")
    ]


def test_of_two_jobs_with_quota_for_one_the_urgent_one_runs_first_and_the_other_goes_on(
    manager: Api, world: World, kubelet: Kubelet
) -> None:
    for name, value in (("low", 10), ("high", 1000)):
        create(manager, f"{KUEUE}/workloadpriorityclasses", "WorkloadPriorityClass", name, value=value)
    create(manager, f"{KUEUE}/resourceflavors", "ResourceFlavor", "training", spec={"nodeLabels": POOL})
    world.claim()
    world.operator(DISTILL_KUEUE="true")
    submit(world, "job", "research", "low")
    world.until("Kueue's reason", lambda: "LocalQueue research doesn't exist" in world.condition("Admitted")["message"])
    assert world.condition("Succeeded")["reason"] == "WaitingForQuota" and not world.pods()

    found = world.api.call("GET", world.path(WORKLOADS, "distillationjob-job"))
    pods = sum(p["count"] for p in found["spec"]["podSets"])
    amounts = [("cpu", "64"), ("memory", "512Gi"), ("pods", str(pods))]
    flavor = {"name": "training", "resources": [{"name": n, "nominalQuota": a} for n, a in amounts]}
    spec = {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": [n for n, _ in amounts], "flavors": [flavor]}],
    }
    create(manager, f"{KUEUE}/clusterqueues", "ClusterQueue", "all", spec=spec)
    for name in ("research", "production"):
        path = world.path(KUEUE + "/namespaces/{ns}/localqueues")
        create(manager, path, "LocalQueue", name, spec={"clusterQueue": "all"})
    world.until_condition("Succeeded", "Running")
    world.until("PodsReady", lambda: says(world, "job", "PodsReady") == ("True", "Started"))
    assert all(p["spec"]["nodeSelector"] == POOL for p in pods_of(world, "job"))

    submit(world, "urgent", "production", "high")
    world.until("the eviction", lambda: says(world, "job", "Evicted")[0] == "True")
    kubelet.trainers[1] = Trainer(exit_code=0)

    def given_back() -> bool:
        # In this order: what has no quota at the first read has no pod at the second.
        holds, left = says(world, "job", "QuotaReserved")[0] == "True", pods_of(world, "job")
        assert holds or not left, "a pod without quota"
        return not holds

    world.until("the quota is given back", given_back)
    world.until_condition("Succeeded", "Completed", name="urgent")
    world.until("Finished", lambda: says(world, "urgent", "Finished") == ("True", "Succeeded"))
    kubelet.trainers[2] = Trainer(exit_code=0)
    world.until_condition("Succeeded", "Completed")
    status = world.job()["status"]
    assert (status["attempts"], status.get("restarts", 0)) == (2, 0)
    world.until("Finished", lambda: says(world, "job", "Finished") == ("True", "Succeeded"))
