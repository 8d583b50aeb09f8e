"""`make demo`: one real distillation on a real cluster, from nothing, with what it reached at the end.

Needs `make setup tools models` (the target calls them, and says in DISTILL_STARTED when it began: every time that is
printed counts from there). Uses the embedded cluster, or the kubectl context named by
CONTEXT (then REGISTRY must hold the images of `make images`, and the claims `models` and the job's output claim must
exist there). JOB names another example. Running it again reuses everything but the job itself.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import urllib.parse
from pathlib import Path
from typing import Any

import yaml

from distill_api import names
from distill_api.job import DistillationJob, parse_job
from distill_api.spec.reward import RewardSource

REPO = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("DISTILL_CACHE", Path.home() / ".cache" / "distillation-operator"))
CONTEXT = os.environ.get("CONTEXT")
NAMESPACE = os.environ.get("NAMESPACE", "distill-demo")
JOB_FILE = Path(os.environ.get("JOB", REPO / "examples" / "smollm2-cpu.yaml"))
OUTPUT = CACHE / "demo" / "output"
LIMIT_SECONDS = 45 * 60
PROMETHEUS = "http://127.0.0.1:9090"

EVERY_STEPS_FROM = 3
"""No guess of the time to go before this step: the first waits for the first evaluation and compiles."""
SHARE_OF_RIGHT = (RewardSource.EXACT_MATCH, RewardSource.MATH)

waited = time.time() - float(os.environ.get("DISTILL_STARTED") or time.time())
"""Seconds of setup, tools and models, before this program began."""
begin = time.monotonic() - waited
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
        stage("operator chart", dev / "install.sh")
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


class Pace:
    """The time to go, by the steps that this program has seen end."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._newest: tuple[int, float] = (0, 0.0)

    def see(self, step: int, now: float) -> None:
        """Notes the newest step that has ended, and when (seconds of a monotonic clock)."""
        if step > self._newest[0]:
            self._newest = (step, now)
            self._first = self._first or self._newest

    def remaining_seconds(self, total_steps: int) -> float | None:
        """Of the steps alone; None while too few have ended."""
        if self._first is None or self._newest[0] < EVERY_STEPS_FROM or self._newest[0] == self._first[0]:
            return None
        steps, seconds = (b - a for a, b in zip(self._first, self._newest, strict=True))
        return (total_steps - self._newest[0]) * seconds / steps


def follow(job: DistillationJob) -> dict[str, Any]:
    """Shows the job until it has succeeded; returns its status. Notes when each role was first ready."""
    start, shown, pace = time.monotonic(), "", Pace()
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
        step = status.get("progress", {}).get("step", 0)
        if step:
            spent.setdefault("job to first step", time.monotonic() - start)
        pace.see(step, time.monotonic())
        summary = condition(status, "Succeeded")
        line = doing(job, status, pace)
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


def doing(job: DistillationJob, status: dict[str, Any], pace: Pace) -> str:
    """What the job is at, as one line."""
    state = condition(status, "Succeeded").get("reason", "Pending")
    if state != "Running":
        roles = (f"{r['name']} {r.get('ready', 0)}/{r.get('desired', 0)}" for r in status.get("roles", []))
        return " ".join((state, *roles))
    progress = status.get("progress") or {}
    step, total = progress.get("step", 0), job.spec.schedule.steps
    # The step of the newest values of each evaluation.
    measured = [e.get("step", 0) for e in progress.get("evaluations", [])]
    behind = len(measured) < len(job.spec.evaluation)
    if step == 0:
        if condition(status, "Preflight").get("status") != "True":
            return "preflight: the trainer loads the student, and has one real answer of engines and teacher checked"
        if behind:
            who = "student and teacher" if any(e.score_teacher for e in job.spec.evaluation) else "the student"
            return f"first evaluation, of {who} as they are; the first step runs beside it"
        return "first step"
    text = step_line(job, progress, pace)
    if step < total:
        return text
    if behind or any(at < total for at in measured):
        return f"{text}; last evaluation"
    return f"{text}; export of the Hugging Face model"


def step_line(job: DistillationJob, progress: dict[str, Any], pace: Pace) -> str:
    parts = [f"step {progress['step']}/{job.spec.schedule.steps}", f"reverse KL {progress.get('reverseKL')}"]
    if progress["step"] == 1:
        samples = job.spec.rollout.prompts_per_step * job.spec.rollout.samples_per_prompt
        parts[-1] += f" (of this step's own {samples} samples, so it jumps; the result is measured on held-out prompts)"
    if progress.get("reward") is not None:
        parts.append(f"reward {progress['reward']}")
    if remaining := pace.remaining_seconds(job.spec.schedule.steps):
        parts.append(f"{remaining:.0f} s of steps to go")
    return ", ".join(parts)


def meanings(job: DistillationJob, evaluations: list[dict[str, Any]]) -> list[str]:
    """A sentence for each kind of figure in the result."""
    found = []
    if any(e.get("reverseKL") is not None for e in evaluations):
        found.append(
            "Reverse KL: how far the student is from the teacher, before the first and after the last step, in nats; 0 "
            "is the teacher itself. It is the mean of log p(student) - log p(teacher) over the tokens that the student "
            "samples for held-out prompts."
        )
    if any(e.get("score") is not None for e in evaluations):
        right = all(e.reward.source in (*SHARE_OF_RIGHT, RewardSource.NONE) for e in job.spec.evaluation)
        what = (
            "share of the held-out prompts that the student answers rightly" if right else "mean reward of its answers"
        )
        found.append(f"Score: {what}, before and after; in brackets the teacher's own on the same prompts.")
    return found


def show_result(job: DistillationJob, status: dict[str, Any]) -> None:
    print("\nresult")
    evaluations = status["progress"].get("evaluations", [])
    for e in evaluations:
        print(f"  {e['name']:<12} reverse KL {e.get('firstReverseKL')} -> {e.get('reverseKL')} nats per token")
        if e.get("score") is not None:
            print(f"  {'':<12} score {e.get('firstScore')} -> {e['score']} (teacher {e.get('teacherScore')})")
    for sentence in meanings(job, evaluations):
        print(textwrap.fill(sentence, 100, initial_indent="  ", subsequent_indent="    "))
    print("\nwall time")
    if waited >= 0.05:
        print(f"  {'setup, tools, models':<24} {waited:7.1f} s")
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
