"""Jobs in queues of the real Kueue: quota for one, preemption by priority, a flavor's nodes; nothing is played."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import yaml
from conftest import DEV, LABEL_JOB, REPO, Jobs, run

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(3600, func_only=True)]

Json = dict[str, Any]
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
POOL = "distill.test/pool"
API = "kueue.x-k8s.io/v1beta2"
CHART = REPO / "charts" / "distillation-operator"


def operator(*settings: str) -> None:
    """Upgrade the operator's release with these values."""
    changed = [part for setting in settings for part in ("--set", setting)]
    command = ("helm", "upgrade", "distillation-operator", CHART, "-n", "distillation-system", "--reuse-values")
    run(*command, *changed, "--wait", "--timeout", "3m")


@pytest.fixture(scope="module")
def kueue(jobs: Jobs) -> Iterator[Jobs]:
    """The jobs' namespace, with Kueue in the cluster and the operator told so; both as before afterwards."""
    run(DEV / "tools.sh", "kueue", timeout=3600)
    with ExitStack() as clean_up:
        # From the last to the first, each whatever became of the others: Kueue's webhooks would stay in the way of all
        # other tests.
        clean_up.callback(run, "kubectl", "label", "nodes", "--all", f"{POOL}-")
        clean_up.callback(run, DEV / "cluster" / "kueue.sh", "down")
        clean_up.callback(operator, "kueue=false")
        # What has its pods goes first: without the right to read Workloads nobody would end them.
        clean_up.callback(jobs.kubectl, "delete", "djob", "--all", "--wait")
        run(DEV / "cluster" / "kueue.sh", timeout=1800)
        operator("kueue=true")
        run("kubectl", "label", "nodes", "--all", "--overwrite", f"{POOL}=training")
        yield jobs


def create(*objects: Json) -> None:
    for body in objects:
        command = ["kubectl", "apply", "-f", "-"]
        done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def submit(jobs: Jobs, name: str, labels: dict[str, str], steps: int, **spec: Any) -> None:
    manifest = yaml.safe_load((REPO / "examples/arithmetic-cpu.yaml").read_text())
    manifest["metadata"] |= {"name": name, "labels": labels}
    manifest["spec"] |= spec
    manifest["spec"] |= {"schedule": {"steps": steps, "checkpointEverySteps": steps}, "evaluation": []}
    manifest["spec"]["output"]["volume"]["claimName"] = "output"
    jobs.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))


def workload(jobs: Jobs, name: str) -> Json:
    return jobs.get("workloads.kueue.x-k8s.io", f"distillationjob-{name}")


def says(jobs: Jobs, name: str, kind: str) -> Json:
    """A condition of the Workload of a job."""
    found = workload(jobs, name).get("status", {}).get("conditions", [])
    return next((c for c in found if c["type"] == kind), {"status": "", "message": "", "reason": ""})


def reserved(jobs: Jobs, name: str) -> bool:
    return says(jobs, name, "QuotaReserved")["status"] == "True"


def live_pods(jobs: Jobs, name: str) -> list[str]:
    text = jobs.kubectl("get", "pods", "-l", f"{LABEL_JOB}={name}", "-o", "json")
    ended = ("Succeeded", "Failed")
    return [p["metadata"]["name"] for p in json.loads(text)["items"] if p["status"].get("phase") not in ended]


def queues(jobs: Jobs, quota: dict[str, str]) -> None:
    """One ClusterQueue over the labelled nodes, reached by the LocalQueues `research` and `production`."""
    resources = [{"name": name, "nominalQuota": amount} for name, amount in quota.items()]
    flavor = {"name": "training", "resources": resources}
    create(
        {
            "apiVersion": API,
            "kind": "ResourceFlavor",
            "metadata": {"name": "training"},
            "spec": {"nodeLabels": {POOL: "training"}},
        },
        {
            "apiVersion": API,
            "kind": "ClusterQueue",
            "metadata": {"name": "gpus"},
            "spec": {
                "namespaceSelector": {},
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [{"coveredResources": list(quota), "flavors": [flavor]}],
            },
        },
        *(
            {
                "apiVersion": API,
                "kind": "LocalQueue",
                "metadata": {"name": name, "namespace": jobs.namespace},
                "spec": {"clusterQueue": "gpus"},
            }
            for name in ("research", "production")
        ),
    )


def test_of_two_jobs_with_quota_for_one_the_urgent_one_runs_and_the_other_goes_on_afterwards(kueue: Jobs) -> None:
    jobs, low, high = kueue, "queued-low", "queued-high"
    classes = {"low": 10, "high": 1000}
    for name, value in classes.items():
        create({"apiVersion": API, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value})
    elsewhere = {"managedBy": "kueue.x-k8s.io/multikueue"}
    submit(jobs, "queued-elsewhere", {QUEUE: "research"}, 1, **elsewhere)

    # No queue of that name yet: the job says so, in Kueue's words, and has no pod.
    submit(jobs, low, {QUEUE: "research", PRIORITY: "low"}, 30)
    jobs.wait("the Workload", lambda: workload(jobs, low))
    absent = "LocalQueue research doesn't exist"
    jobs.wait("Kueue's reason", lambda: absent in jobs.condition(low, "Admitted").get("message", ""), 120)
    assert jobs.condition(low, "Succeeded")["reason"] == "WaitingForQuota"
    assert not live_pods(jobs, low) and not jobs.status(low).get("attempts")

    # As many pods as one job has.
    pods = sum(p["count"] for p in workload(jobs, low)["spec"]["podSets"])
    queues(jobs, {"cpu": "64", "memory": "512Gi", "pods": str(pods)})
    jobs.wait("step 2", lambda: jobs.step(low) >= 2, 600)
    assert jobs.condition(low, "Admitted")["status"] == "True"
    jobs.wait("PodsReady", lambda: says(jobs, low, "PodsReady")["status"] == "True", 60)
    for pod in json.loads(jobs.kubectl("get", "pods", "-l", f"{LABEL_JOB}={low}", "-o", "json"))["items"]:
        assert pod["spec"]["nodeSelector"][POOL] == "training", pod["metadata"]["name"]

    # The urgent one gets the quota, and not before the last pod of the other is gone.
    submit(jobs, high, {QUEUE: "production", PRIORITY: "high"}, 4)
    jobs.wait("the eviction", lambda: says(jobs, low, "Evicted")["status"] == "True", 120)
    end = time.monotonic() + 300
    while True:
        # In this order: what has no quota at the first read has no pod at the second.
        holds, others = reserved(jobs, low), live_pods(jobs, low)
        assert not others or holds, f"{others} run without quota"
        if not holds:
            # The reservation ends after that is recorded, and the urgent job has the quota now.
            assert jobs.condition(low, "Succeeded")["reason"] == "WaitingForQuota"
            assert jobs.condition(low, "Admitted")["status"] == "False"
            break
        assert time.monotonic() < end, jobs.picture()
        time.sleep(0.2)
    assert jobs.finish(high)["status"] == "True", jobs.picture()
    status = jobs.status(low)
    assert status["restarts"] == 0, "an eviction is no failure"
    jobs.wait("Finished", lambda: says(jobs, high, "Finished")["reason"] == "Succeeded", 120)

    # By itself, from its checkpoint.
    done = jobs.finish(low, 900)
    assert done["status"] == "True", jobs.picture()
    assert jobs.status(low)["restarts"] == 0
    lines = [json.loads(x) for x in (jobs.output / low / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "step"] == list(range(1, 31))
    jobs.wait("Finished", lambda: says(jobs, low, "Finished")["reason"] == "Succeeded", 120)

    # Another cluster's job: no Workload, no pod, no status.
    assert not workload(jobs, "queued-elsewhere") and not live_pods(jobs, "queued-elsewhere")
    assert not jobs.status("queued-elsewhere")
    for name in (low, high, "queued-elsewhere"):
        jobs.delete(name)
    jobs.wait("no Workload is left", lambda: not jobs.names("workloads.kueue.x-k8s.io"), 60)
