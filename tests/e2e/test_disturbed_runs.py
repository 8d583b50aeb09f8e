"""A deterministic run exports the same weights, to the last bit, whatever is killed under it and however often.

`make soak` runs it; SOAK_RUNS=30 says how many, SOAK_SEED=17 repeats one. What a run that failed has left is kept under
soak-failures in the cache.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import CACHE, Jobs
from fault_injection import ClusterFaults

import soak
from distill_cli.cluster import Cluster, connect
from distill_cli.failure import CommandFailed
from fault_runner import FaultRunner
from fault_schedule import KILLS, FaultSchedule, fault_schedule
from run_evidence import step_problems, steps_of

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(0)]

STEPS = 40
RUN_SECONDS = 2400.0
"""Only a run that hangs takes longer, also one that starts five times on two busy cores."""
POLL_SECONDS, STATUS_SECONDS = 0.3, 2.0
EVIDENCE = CACHE / "soak-failures"
SPEC: dict[str, Any] = {
    "deterministic": True,
    "rollout": {"promptsPerStep": 4, "samplesPerPrompt": 2},
    "evaluation": [],
    # A kill may cost an attempt, and on a busy machine what follows from it another: how many is not the question here.
    "backoffLimit": 50,
}


def test_a_deterministic_run_exports_the_same_weights_whatever_is_killed(jobs: Jobs) -> None:
    """Three kills, and at most two suspensions, of trainer, engine, teacher, Ray head, operator, kubelet and API
    server, at times that differ with the seed."""
    cluster = connect(jobs.namespace, None, None)
    whole = undisturbed(jobs, cluster)
    failed: dict[int, list[str]] = {}
    counted = early = 0
    for seed in soak.runs(0.2, at_least=3):
        problems, missed = disturbed(jobs, cluster, fault_schedule(seed, STEPS), whole)
        counted, early = counted + (not missed), early + missed
        if problems:
            failed[seed] = problems
        print(
            f"\n{counted + early - len(failed)} of {counted + early} disturbed runs exported the same weights"
            + (f"; {early} ended before all {KILLS} kills" if early else ""),
            end="",
            flush=True,
        )
    assert not failed, f"repeat one with SOAK_SEED; {EVIDENCE} has what they left: {json.dumps(failed, indent=1)}"
    assert counted, "every run ended before all that should disturb it had happened: raise STEPS"


def undisturbed(jobs: Jobs, cluster: Cluster) -> str:
    """Return the hash of the model that a run exports to which nothing happens."""
    name, began = "undisturbed", time.monotonic()
    jobs.arithmetic(name, schedule={"steps": STEPS, "checkpointEverySteps": 7}, **SPEC)
    until_finished(cluster, name, lambda: None)
    assert (found := problems_of(jobs, cluster, name)) == [], f"{found}\n{jobs.picture()}"
    result = exported(jobs, name)
    print(f"\nundisturbed: sha256 {result} in {time.monotonic() - began:.0f} s", end="", flush=True)
    jobs.delete(name)
    return result


def disturbed(jobs: Jobs, cluster: Cluster, schedule: FaultSchedule, whole: str) -> tuple[list[str], bool]:
    """Return what is wrong with a run under a schedule, and whether it ended before all of that had happened."""
    name, began = f"disturbed-{schedule.seed}", time.monotonic()
    saves = schedule.checkpoint_every_steps
    print(f"\nseed {schedule.seed}: checkpoints every {saves}; to come:", end="", flush=True)
    print("".join(f"\n  {disturbance}" for disturbance in schedule.disturbances), end="", flush=True)
    jobs.arithmetic(name, schedule={"steps": STEPS, "checkpointEverySteps": saves}, **SPEC)
    faults, highest, told = FaultRunner(schedule, ClusterFaults(cluster, name).happen), 0, 0

    def tell() -> None:
        nonlocal told
        for line in faults.said[told:]:
            print(f"\n  at {line}", end="", flush=True)
        told = len(faults.said)

    def advance() -> None:
        nonlocal highest
        highest = max([highest, *steps_of(jobs.output / name)])
        faults.advance(highest)
        tell()

    try:
        until_finished(cluster, name, advance)
    finally:
        faults.restore()
        tell()
    problems = problems_of(jobs, cluster, name)
    found = "none" if problems else exported(jobs, name)
    if not problems and found != whole:
        problems.append(f"it exported sha256 {found}, and the undisturbed run {whole}")
    status, seconds = finished(cluster, name) or {}, time.monotonic() - began
    attempts = f"{status.get('attempts')} attempts, {status.get('restarts')} counted restarts"
    print(f"\n  {'; '.join(problems) or 'the same'}: sha256 {found} in {seconds:.0f} s, {attempts}", end="", flush=True)
    if problems:
        keep_evidence(jobs, name, [*problems, *map(str, schedule.disturbances), *faults.said])
    try:
        jobs.delete(name)
    except AssertionError as error:
        problems.append(f"it left something: {str(error)[:300]}")
    shutil.rmtree(jobs.output / name, ignore_errors=True)
    return problems, bool(faults.missed)


def until_finished(cluster: Cluster, name: str, meanwhile: Callable[[], None]) -> None:
    """Wait for the end of a job, RUN_SECONDS at most, while the API server may be away."""
    end, asked = time.monotonic() + RUN_SECONDS, 0.0
    while (now := time.monotonic()) < end:
        meanwhile()
        if now - asked >= STATUS_SECONDS:
            asked = now
            if finished(cluster, name) is not None:
                return
        time.sleep(POLL_SECONDS)


def finished(cluster: Cluster, name: str) -> dict[str, Any] | None:
    """Return the status of a job that has finished; None where it has not, or nobody can say."""
    try:
        status: dict[str, Any] = cluster.job(name).get("status", {})
    except CommandFailed:
        return None
    ended = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
    return status if ended & {"Complete", "Failed"} else None


def problems_of(jobs: Jobs, cluster: Cluster, name: str) -> list[str]:
    """Return what is wrong with a run, but for what it exported."""
    status = finished(cluster, name)
    if status is None:
        return [f"it did not finish within {RUN_SECONDS:.0f} s"]
    succeeded = next(c for c in status["conditions"] if c["type"] == "Succeeded")
    if succeeded["status"] != "True":
        return [f"{succeeded['reason']}: {succeeded['message']}"]
    return step_problems(steps_of(jobs.output / name), STEPS)


def exported(jobs: Jobs, name: str) -> str:
    return hashlib.sha256((jobs.output / name / "model" / "model.safetensors").read_bytes()).hexdigest()


def keep_evidence(jobs: Jobs, name: str, said: list[str]) -> None:
    """Keep what tells how a run failed: its folder without models, the state of the cluster, the daemons' logs."""
    folder = EVIDENCE / name
    shutil.rmtree(folder, ignore_errors=True)
    weights = shutil.ignore_patterns("rank-*", "*.safetensors", "sync")
    if (jobs.output / name).exists():
        shutil.copytree(jobs.output / name, folder / "run", ignore=weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "what-happened.txt").write_text("\n".join(said) + "\n")
    (folder / "cluster.txt").write_text(jobs.picture())
    objects = "djob,pods,jobs,deployments,rayclusters,events"
    (folder / "objects.yaml").write_text(jobs.kubectl("get", objects, "-o", "yaml", check=False))
    logs = ["-n", "distillation-system", "logs", "-l", "app.kubernetes.io/name=distillation-operator", "--tail=2000"]
    (folder / "operator.log").write_text(jobs.kubectl(*logs, check=False))
    for log in (CACHE / "cluster" / "log").glob("*.log"):
        (folder / log.name).write_bytes(log.read_bytes()[-200_000:])
