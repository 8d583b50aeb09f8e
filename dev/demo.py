"""`make demo`: one real distillation on a real cluster, from nothing, with what it reached at the end.

Needs `make setup tools models` (the target calls them). Uses the embedded cluster, or the kubectl context named by
CONTEXT (then REGISTRY must hold the images of `make images`, and the claims `models` and the job's output claim must
exist there). JOB names another example. Running it again reuses everything but the job itself.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from distill_api import names
from distill_api.job import DistillationJob, parse_job

REPO = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache" / "distillation-operator"))
CONTEXT = os.environ.get("CONTEXT")
NAMESPACE = os.environ.get("NAMESPACE", "distill-demo")
JOB_FILE = Path(os.environ.get("JOB", REPO / "examples" / "smollm2-cpu.yaml"))
OUTPUT = CACHE / "demo" / "output"
LIMIT_SECONDS = 45 * 60
PROMETHEUS = "http://127.0.0.1:9090"

begin = time.monotonic()
spent: dict[str, float] = {}


class DemoFailed(Exception):
    """One sentence: what went wrong, and what to look at."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - begin:6.1f} s] {text}", flush=True)


def stage(name: str, *command: str | Path, **environment: str) -> None:
    """One step by an outside command, timed under `name`; its own output is shown."""
    say(name)
    start = time.monotonic()
    done = subprocess.run([str(c) for c in command], env={**os.environ, **environment}, check=False)
    spent[name] = time.monotonic() - start
    if done.returncode:
        raise DemoFailed(f"{name} failed (exit code {done.returncode} of {' '.join(str(c) for c in command)})")


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    context = ["--context", CONTEXT] if CONTEXT else []
    done = subprocess.run(["kubectl", *context, *arguments], input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise DemoFailed(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def get(kind: str, name: str) -> dict[str, Any] | None:
    text = kubectl("-n", NAMESPACE, "get", kind, name, "-o", "json", "--ignore-not-found")
    return json.loads(text) if text.strip() else None


def cluster(job: DistillationJob) -> None:
    """A cluster with KubeRay, our chart, the images and the volumes of the job."""
    dev = REPO / "dev"
    if CONTEXT:
        stage("chart", dev / "install.sh")
        kubectl("apply", "-f", "-", stdin=json.dumps(namespace()))
        kubectl("-n", NAMESPACE, "delete", "djob", job.metadata.name, "--ignore-not-found", "--wait", "--timeout=120s")
        return
    os.environ["KUBECONFIG"] = str(CACHE / "cluster" / "pki" / "admin.conf")
    stage("cluster", dev / "cluster" / "up.sh")
    stage("images", dev / "images.sh", "all")
    stage("KubeRay", dev / "cluster" / "kuberay.sh")
    stage("operator chart", dev / "install.sh")
    kubectl("apply", "-f", "-", stdin=json.dumps(namespace()))
    remove_earlier_run(job)
    assert job.spec.output.volume is not None
    stage("volumes", dev / "cluster" / "volume.sh", NAMESPACE, "models", CACHE / "models")
    stage("output volume", dev / "cluster" / "volume.sh", NAMESPACE, job.spec.output.volume.claim_name, OUTPUT)
    stage("Prometheus", dev / "cluster" / "prometheus.sh", "start")


def namespace() -> dict[str, Any]:
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": restricted}}


def remove_earlier_run(job: DistillationJob) -> None:
    """The demo always shows a whole run: an earlier one of the same name would only be taken up at its end."""
    kubectl("-n", NAMESPACE, "delete", "djob", job.metadata.name, "--ignore-not-found", "--wait", "--timeout=120s")
    kubectl(
        "-n",
        NAMESPACE,
        "wait",
        "--for=delete",
        "pod",
        "-l",
        f"{names.LABEL_JOB}={job.metadata.name}",
        "--timeout=120s",
        check=False,
    )
    shutil.rmtree(OUTPUT / job.metadata.name, ignore_errors=True)


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


def follow(job: DistillationJob) -> dict[str, Any]:
    """Shows the job until it has succeeded; returns its status. Notes when each role was first ready."""
    start, shown = time.monotonic(), ""
    while time.monotonic() - start < LIMIT_SECONDS:
        found = get("distillationjob", job.metadata.name)
        status = (found or {}).get("status", {})
        for name, kind in (
            ("teacher ready", "TeacherReady"),
            ("engines ready", "RolloutReady"),
            ("preflight", "Preflight"),
        ):
            if condition(status, kind).get("status") == "True":
                spent.setdefault(f"job to {name}", time.monotonic() - start)
        progress = status.get("progress", {})
        if progress.get("step"):
            spent.setdefault("job to first step", time.monotonic() - start)
        summary = condition(status, "Succeeded")
        line = " ".join(filter(None, (summary.get("reason", "Pending"), progress_line(progress), waiting(status))))
        if line != shown:
            say(line)
            shown = line
        if summary.get("status") == "True":
            spent["job"] = time.monotonic() - start
            return status
        if summary.get("status") == "False":
            raise DemoFailed(f"the job failed: {summary['reason']}: {summary.get('message', '')}")
        time.sleep(1)
    raise DemoFailed(
        f"the job was not done after {LIMIT_SECONDS} s; see kubectl -n {NAMESPACE} describe djob {job.metadata.name}"
    )


def progress_line(progress: dict[str, Any]) -> str:
    if not progress.get("step"):
        return ""
    parts = [f"step {progress['step']}/{progress['totalSteps']}", f"reverse KL {progress.get('reverseKL')}"]
    if progress.get("reward") is not None:
        parts.append(f"reward {progress['reward']}")
    if progress.get("estimatedRemainingSeconds"):
        parts.append(f"{progress['estimatedRemainingSeconds']} s to go")
    return ", ".join(parts)


def waiting(status: dict[str, Any]) -> str:
    if (status.get("progress") or {}).get("step"):
        return ""
    return " ".join(f"{r['name']} {r.get('ready', 0)}/{r.get('desired', 0)}" for r in status.get("roles", []))


def show_result(job: DistillationJob, status: dict[str, Any]) -> None:
    print("\nresult")
    for e in status["progress"].get("evaluations", []):
        print(f"  {e['name']:<12} reverse KL {e.get('firstReverseKL')} -> {e.get('reverseKL')} nats per token")
        if e.get("score") is not None:
            print(f"  {'':<12} score {e.get('firstScore')} -> {e['score']} (teacher {e.get('teacherScore')})")
    print("\nwall time")
    for name, seconds in spent.items():
        print(f"  {name:<24} {seconds:7.1f} s")
    print(f"  {'all':<24} {time.monotonic() - begin:7.1f} s")
    print("\nwhere")
    for name, place in places(job, status).items():
        print(f"  {name:<20} {place}")


def places(job: DistillationJob, status: dict[str, Any]) -> dict[str, str]:
    """What the run left, and where it can be looked at."""
    if CONTEXT:
        assert job.spec.output.volume is not None
        claim = f"claim {job.spec.output.volume.claim_name} of namespace {NAMESPACE}"
        return {"Hugging Face model": f"{status['result']['modelPath']} on {claim}"}
    folder = OUTPUT / job.metadata.name
    subprocess.run(
        [str(REPO / "workers/.venv/bin/distill"), "report", str(folder)], check=True, stdout=subprocess.DEVNULL
    )
    query = urllib.parse.quote(f'distill_reverse_kl_nats{{distillation_job="{job.metadata.name}"}}')
    return {
        "Hugging Face model": str(folder / "model"),
        "curve": f"{folder / 'report.html'}, {folder / 'curve.png'}",
        "Prometheus": f"{PROMETHEUS}/graph?g0.expr={query}&g0.tab=0",
        "cluster": f"export KUBECONFIG={os.environ['KUBECONFIG']} (make cluster-down stops it)",
    }


def main() -> int:
    job = parse_job(yaml.safe_load(JOB_FILE.read_text()))
    try:
        cluster(job)
        say(f"kubectl apply -f {JOB_FILE.relative_to(REPO) if JOB_FILE.is_relative_to(REPO) else JOB_FILE}")
        kubectl("-n", NAMESPACE, "apply", "-f", str(JOB_FILE))
        show_result(job, follow(job))
    except DemoFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
