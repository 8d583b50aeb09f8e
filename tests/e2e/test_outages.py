"""Outages of what the operator stands on, on the real cluster: afterwards a new job is noticed within three seconds.

What the operator misses for longer, an operator whose watches are dead notices by its resync, after up to a minute.
"""

import json
import os
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CACHE, DEV, REPO, Jobs, run
from fault_injection import daemon

from api_server_proxy import Proxy
from distill_cli.cluster import Cluster, connect
from distill_workers.serving.ports import reserve_port
from run_evidence import steps_of

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(1800, func_only=True)]

SYSTEM, RELEASE = "distillation-system", "distillation-operator"
OUTAGE_SECONDS = 60
RECOVERY_SECONDS = 60.0
"""Only what has not recovered takes longer to notice the first job."""
NOTICED_SECONDS = 3.0
NEW_JOBS = 3


def notice_seconds(cluster: Cluster, name: str) -> float:
    """Return how long it takes until a new job has conditions. It is suspended, so that it needs no room."""
    manifest = yaml.safe_load((REPO / "examples" / "arithmetic-cpu.yaml").read_text())
    manifest["metadata"]["name"] = name
    manifest["spec"]["suspend"] = True
    cluster.apply_job(manifest, dry_run=False)
    began = time.monotonic()
    while not cluster.job(name).get("status", {}).get("conditions"):
        assert time.monotonic() - began < RECOVERY_SECONDS, f"{name} is not noticed"
        time.sleep(0.05)
    return time.monotonic() - began


def check_that_jobs_are_noticed(cluster: Cluster, name: str) -> None:
    """The first new job may meet what still recovers. Of those after it the median counts: with dead watches a resync
    may come by chance."""
    first, *others = [notice_seconds(cluster, f"{name}-{number}") for number in range(1 + NEW_JOBS)]
    text = ", ".join(f"{seconds:.2f}" for seconds in others)
    print(f"\n{name}: noticed after {first:.2f} s, and then {text} s", end="", flush=True)
    assert statistics.median(others) <= NOTICED_SECONDS


def forget(jobs: Jobs, name: str) -> None:
    names = [f"{name}-{number}" for number in range(1 + NEW_JOBS)]
    jobs.kubectl("delete", "djob", *names, "--ignore-not-found", "--wait")


def operator_pods() -> dict[str, int]:
    """Return how often the container of each pod of the operator was started again, by the pod's uid."""
    label = f"app.kubernetes.io/name={RELEASE}"
    pods = json.loads(run("kubectl", "-n", SYSTEM, "get", "pods", "-l", label, "-o", "json"))["items"]
    return {p["metadata"]["uid"]: p["status"].get("containerStatuses", [{}])[0].get("restartCount", 0) for p in pods}


def api_server_is_ready() -> bool:
    command = ["kubectl", "get", "--raw", "/readyz", "--request-timeout=3s"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass
class ProxiedOperator:
    """The operator of this tree as a process on this machine, with the rights of the one in the cluster."""

    proxy: Proxy
    process: subprocess.Popen[bytes]
    health_port: int
    log: Path

    def check(self) -> None:
        """It runs, and /healthz passes."""
        tail = self.log.read_text(errors="replace")[-4000:]
        assert self.process.poll() is None, tail
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/healthz", timeout=20) as answer:
            assert answer.status == 200, tail


@pytest.fixture
def proxied(jobs: Jobs, tmp_path: Path) -> Iterator[ProxiedOperator]:
    """In place of the cluster's own operator: the API server is away for it alone."""
    deployment = json.loads(run("kubectl", "-n", SYSTEM, "get", "deployment", RELEASE, "-o", "json"))
    spec = deployment["spec"]["template"]["spec"]
    variables = {e["name"]: e["value"] for e in spec["containers"][0]["env"] if "value" in e}
    token = run("kubectl", "-n", SYSTEM, "create", "token", spec["serviceAccountName"], "--duration=6h").strip()
    proxy = Proxy(CACHE / "cluster" / "pki" / "admin.conf")
    kubeconfig, log, port = tmp_path / "through-the-proxy", tmp_path / "operator.log", reserve_port()
    names = {"cluster": "proxy", "user": "operator"}
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{proxy.port}"}}],
        "users": [{"name": "operator", "user": {"token": token}}],
        "contexts": [{"name": "proxy", "context": names}],
        "current-context": "proxy",
    }
    kubeconfig.write_text(json.dumps(config))
    environment = {
        **os.environ,
        **{name: value for name, value in variables.items() if name.startswith("DISTILL_")},
        "KUBECONFIG": str(kubeconfig),
        "DISTILL_HEALTH_PORT": str(port),
        "DISTILL_METRICS_PORT": str(reserve_port()),
        # So that only a watch can notice a new job in time.
        "DISTILL_RESYNC_SECONDS": "600",
        "DISTILL_LOG_FORMAT": "text",
        "PYTHONPATH": f"{REPO}/crds:{REPO}/operator",
    }
    process: subprocess.Popen[bytes] | None = None
    try:
        scale(0)
        jobs.wait("the cluster's operator is gone", lambda: not operator_pods(), 120)
        with log.open("wb") as file:
            command = [str(REPO / "operator" / ".venv" / "bin" / "python"), "-m", "distill_operator"]
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=tmp_path)
        yield ProxiedOperator(proxy, process, port, log)
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            print(f"\nthe end of {log}:\n{log.read_text(errors='replace')[-1500:]}", flush=True)
        proxy.stop()
        scale(1)
        run("kubectl", "-n", SYSTEM, "rollout", "status", f"deployment/{RELEASE}", "--timeout=180s")


def scale(replicas: int) -> None:
    run("kubectl", "-n", SYSTEM, "scale", f"deployment/{RELEASE}", f"--replicas={replicas}")


@pytest.mark.parametrize("code", [503, 403])
def test_after_a_minute_without_an_answer_new_jobs_are_noticed(code: int, jobs: Jobs, proxied: ProxiedOperator) -> None:
    cluster, name = connect(jobs.namespace, None, None), f"after-{code}"
    notice_seconds(cluster, f"{name}-0")  # the operator has begun
    forget(jobs, name)
    proxied.proxy.fault = code
    end = time.monotonic() + OUTAGE_SECONDS
    while time.monotonic() < end:
        proxied.check()
        time.sleep(1)
    proxied.proxy.fault = 0
    check_that_jobs_are_noticed(cluster, name)
    proxied.check()
    forget(jobs, name)


def test_a_job_trains_on_without_etcd_and_afterwards_new_jobs_are_noticed(jobs: Jobs) -> None:
    cluster, name = connect(jobs.namespace, None, None), "etcd-away"
    folder = jobs.output / name
    jobs.arithmetic(name, schedule={"steps": 10_000, "checkpointEverySteps": 50}, evaluation=[])
    jobs.wait("step 2", lambda: jobs.step(name) >= 2, 480)
    before = operator_pods()
    daemon("stop", "etcd")
    try:
        done = len(steps_of(folder))
        time.sleep(OUTAGE_SECONDS)
        trained = len(steps_of(folder)) - done
        print(f"\n{trained} steps without etcd", end="", flush=True)
    finally:
        daemon("start", "etcd")
    assert trained > 0
    began = time.monotonic()
    while not api_server_is_ready():
        assert time.monotonic() - began < 180, "the API server does not come back"
        time.sleep(0.5)
    print(f", which the API server has again {time.monotonic() - began:.0f} s after its start", end="", flush=True)
    check_that_jobs_are_noticed(cluster, "after-etcd")
    target = len(steps_of(folder))
    jobs.wait(f"step {target} in the status", lambda: jobs.step(name) >= target, 120)
    status = jobs.status(name)
    assert (status["attempts"], status["restarts"]) == (1, 0), jobs.picture()
    steps = steps_of(folder)
    assert steps == list(range(1, len(steps) + 1))
    assert operator_pods() == before, "the operator's process stays"
    forget(jobs, "after-etcd")
    jobs.delete(name)


def watch_namespaces(*names: str) -> None:
    """As its administrator does: Helm makes the roles in each of them, also where a namespace was made again."""
    chart = REPO / "charts" / RELEASE
    options = ("--reuse-values", "--set", f"watchNamespaces={{{','.join(names)}}}", "--wait", "--timeout", "3m")
    run("helm", "upgrade", RELEASE, chart, "--namespace", SYSTEM, *options)


def test_a_watched_namespace_that_is_deleted_and_made_again_costs_no_job_a_second(jobs: Jobs) -> None:
    other = f"{jobs.namespace}-b"
    here, there = connect(jobs.namespace, None, None), connect(other, None, None)
    run("kubectl", "delete", "namespace", other, "--ignore-not-found", "--wait")
    run("kubectl", "create", "namespace", other)
    try:
        watch_namespaces(jobs.namespace, other)
        before = operator_pods()
        for cluster in (here, there):
            notice_seconds(cluster, "before-0")
        run("kubectl", "delete", "namespace", other, "--wait")
        check_that_jobs_are_noticed(here, "while-the-other-is-gone")
        run("kubectl", "create", "namespace", other)
        watch_namespaces(jobs.namespace, other)
        check_that_jobs_are_noticed(there, "made-again")
        check_that_jobs_are_noticed(here, "meanwhile")
        assert operator_pods() == before, "the operator's process stays"
        for name in ("before", "while-the-other-is-gone", "meanwhile"):
            forget(jobs, name)
    finally:
        run(DEV / "install.sh")
        run("kubectl", "delete", "namespace", other, "--ignore-not-found", "--wait")
