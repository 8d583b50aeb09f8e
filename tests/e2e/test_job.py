"""One job of the release before, to its end: real kubelet, KubeRay, SGLang, Megatron, Prometheus; nothing is played.

While it trains, `make demo CONTEXT=…` upgrades the operator and runs the demo beside it. Then the job is suspended and
resumed, its trainer is killed, and it succeeds. What is done to it is a fixture each, which asks for those before; a
test says what must be so afterwards. In the order of this file one job proves what five would.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CACHE, DEV, LABEL_JOB, LABEL_ROLE, REPO, Jobs, prometheus, run, timed
from release import (
    BEFORE,
    OPERATOR,
    WORKERS,
    Pods,
    children_of,
    images_of,
    install_release,
    installed,
    pods_of,
    present_version,
    tag,
)

from run_evidence import steps_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800, func_only=True)]

NAME, STEPS = "learns", 100
UPGRADED_AT, PAUSED_AT, KILLED_AT = 60, 75, 90
"""The last steps at which the job is still in the middle: what comes after takes a few more."""
SOMEBODYS = "somebodys"
"""The namespace of the demo, on a cluster that somebody else made. The embedded one plays that part here."""
REWARD = {"reward": {"source": "exact-match"}, "rewardCoefficient": 0.0}
"""Graded, for the metric; without weight, so that the curve is the KL's alone."""
TWO_PODS = {"nodes": 2}
FEWER = {"promptsPerStep": 32}
"""Half of the example's: more steps, in which to meet what is done to the job."""
READERS = "app.kubernetes.io/name=distillation-reader"


@dataclass(frozen=True)
class Begun:
    """The job in its first steps: its pods, and its other children."""

    jobs: Jobs
    pods: Pods
    children: dict[str, tuple[str, int]]
    said: str
    """The log of its trainer until then."""

    @property
    def folder(self) -> Path:
        return self.jobs.output / NAME

    @property
    def log(self) -> str:
        return (self.folder / "logs" / "rank-0.log").read_text()


@dataclass(frozen=True)
class Demo:
    process: subprocess.Popen[bytes]
    jobs: Jobs
    output: Path
    """What it has printed."""

    def said(self, text: str) -> bool:
        """Whether it has printed a text. Fails where it has ended without."""
        ended, found = self.process.poll() is not None, text in self.output.read_text()
        assert found or not ended, self.output.read_text()
        return found


@dataclass(frozen=True)
class Paused:
    """The job after it was suspended and resumed: what it had done then, and the checkpoint that `latest` named."""

    steps: list[int]
    latest: str


@pytest.fixture(scope="module")
def somebodys(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Jobs, Path]]:
    """The demo's namespace with its claims, and its own example, of which two steps are done."""
    for image in (OPERATOR, WORKERS):  # as if they had been pushed to a registry of that cluster
        tag(image, present_version())
    manifest = yaml.safe_load((REPO / "examples" / "smollm2-cpu.yaml").read_text())
    manifest["spec"]["schedule"] = {"steps": 2}
    manifest["spec"]["evaluation"][0]["maxPrompts"] = 4
    job = tmp_path_factory.mktemp("demo") / "job.yaml"
    job.write_text(yaml.safe_dump(manifest))
    jobs = Jobs(SOMEBODYS, CACHE / "e2e-somebodys")
    shutil.rmtree(jobs.output, ignore_errors=True)
    run("kubectl", "delete", "namespace", SOMEBODYS, "--ignore-not-found", "--wait")
    run("kubectl", "create", "namespace", SOMEBODYS)
    run(DEV / "cluster" / "volume.sh", SOMEBODYS, "models", CACHE / "models")
    run(DEV / "cluster" / "volume.sh", SOMEBODYS, "smollm2-output", jobs.output)
    yield jobs, job
    run("kubectl", "delete", "namespace", SOMEBODYS, "--wait")
    shutil.rmtree(jobs.output, ignore_errors=True)


@pytest.fixture(scope="module")
def begun(namespace: Jobs, somebodys: tuple[Jobs, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begun]:
    """Two trainer pods, data parallel, under the operator of the release before. It saves nothing by itself, so what it
    goes on from is SIGTERM's. Leaves the present chart installed."""
    schedule = {"steps": STEPS, "checkpointEverySteps": STEPS, "keepBest": False}
    # As users had written it: the release does not know podTemplate.
    example = "tests/releases/examples-0.2.0/arithmetic-cpu"
    try:
        with timed("release before"):
            install_release(tmp_path_factory.mktemp("release"))
        chart, image, _ = installed()
        assert (chart, image) == (f"distillation-operator-{BEFORE}", f"{OPERATOR}:{BEFORE}")
        with timed("apply to the second step"):
            namespace.arithmetic(NAME, example, objective=REWARD, trainer=TWO_PODS, schedule=schedule, rollout=FEWER)
            namespace.wait("the first steps", lambda: namespace.step(NAME) >= 2, 600)
        log = (namespace.output / NAME / "logs" / "rank-0.log").read_text()
        yield Begun(namespace, pods_of(namespace, NAME), children_of(namespace, NAME), log)
    finally:
        run(DEV / "install.sh")


@pytest.fixture(scope="module")
def demo(begun: Begun, somebodys: tuple[Jobs, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """`make demo CONTEXT=…` under way, with the present chart installed by it."""
    jobs, job = somebodys
    named = {
        "CONTEXT": run("kubectl", "config", "current-context").strip(),
        "REGISTRY": "local.test",
        "NAMESPACE": SOMEBODYS,
        "JOB": str(job),
    }
    output = tmp_path_factory.mktemp("demo") / "output"
    command = [REPO / "operator/.venv/bin/python", DEV / "demo.py"]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **named}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        found = Demo(process, jobs, output)
        with timed("helm upgrade"):
            begun.jobs.wait("the demo has installed the chart", lambda: found.said("kubectl apply -f"))
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # helm too, or the chart could not be installed after it
        process.wait()


@pytest.fixture(scope="module")
def paused(begun: Begun, demo: Demo) -> Paused:
    """Suspended until no pod is left, and resumed until steps go on."""
    jobs = begun.jobs
    assert steps_of(begun.folder)[-1] <= PAUSED_AT, "the job must be in the middle when it is suspended"
    with timed("suspended, until no pod is left"):
        jobs.suspend(NAME, True)
        jobs.wait("no pod is left", lambda: not jobs.pods_of(NAME), 180)
        jobs.wait("Suspended", lambda: jobs.condition(NAME, "Suspended")["status"] == "True", 30)
    found = Paused(steps_of(begun.folder), (begun.folder / "checkpoints" / "latest").read_text())
    with timed("resumed, until steps go on"):
        jobs.suspend(NAME, False)
        jobs.trains(NAME, seconds=600)
    return found


@pytest.fixture(scope="module")
def finished(begun: Begun, paused: Paused) -> dict[str, Any]:
    """The status at the end, after the trainer was killed in between."""
    jobs = begun.jobs
    status = jobs.status(NAME)
    assert status["restarts"] == 0 and steps_of(begun.folder)[-1] <= KILLED_AT, "the job must be in the middle"
    with timed("trainer killed, until the next attempt begins"):
        jobs.kill(f"{LABEL_JOB}={NAME},{LABEL_ROLE}=trainer")
        jobs.wait("the next attempt", lambda: jobs.status(NAME).get("attempts") == status["attempts"] + 1, 240)
    with timed("until the job has ended"):
        assert jobs.finish(NAME, 900)["status"] == "True", jobs.picture()
    return jobs.status(NAME)


def test_a_running_job_goes_on_untouched_through_an_upgrade(begun: Begun, demo: Demo) -> None:
    """`helm upgrade` from the release before, under a job that runs: nothing of it is touched."""
    jobs, version = begun.jobs, present_version()
    assert images_of(begun.pods) == {f"{WORKERS}:{BEFORE}"}
    chart, image, schema = installed()
    assert (chart, image) == (f"distillation-operator-{version}", f"{OPERATOR}:{version}")
    crd = yaml.safe_load((REPO / "charts/distillation-operator/files/crds/distillationjobs.yaml").read_text())
    assert schema == crd["spec"]["versions"][0]["schema"]
    assert jobs.step(NAME) <= UPGRADED_AT, "the job must be in the middle when the new operator takes it up"
    jobs.trains(NAME, 5)
    assert (pods_of(jobs, NAME), children_of(jobs, NAME)) == (begun.pods, begun.children)
    status = jobs.status(NAME)
    assert (status["attempts"], status["restarts"]) == (1, 0)
    assert "is lost" not in begun.said, "no engine had a reason to be restarted"


def test_what_the_student_writes_is_shown_while_it_trains(begun: Begun) -> None:
    """As a user would look in: the trainer serves it, the API server brings it."""
    command = [REPO / "operator/.venv/bin/distill", "samples", NAME, "-n", begun.jobs.namespace, "--output", "json"]
    [first, *_] = json.loads(run(*command))
    assert first["step"] >= 1 and first["tokens"], "decoded, with the KL of each token"
    events = json.loads(begun.jobs.kubectl("get", "events", "-o", "json"))["items"]
    assert not [e for e in events if "-reader-" in e["involvedObject"]["name"]], "no pod had to read the volume"


def test_the_next_job_is_of_the_new_version(demo: Demo) -> None:
    demo.jobs.wait("its teacher and its engines have pods", lambda: len(demo.jobs.pods_of("smollm2")) >= 3)
    assert images_of(pods_of(demo.jobs, "smollm2")) == {f"{WORKERS}:{present_version()}"}


def test_a_pause_costs_no_step_and_no_attempt_that_counts(begun: Begun, paused: Paused) -> None:
    saved = int(paused.latest.removeprefix("step-"))
    assert saved == paused.steps[-1] > 0, "SIGTERM must have saved what was trained"
    assert f"resumed from /output/{NAME}/checkpoints/{paused.latest}" in begun.log
    assert begun.jobs.status(NAME)["restarts"] == 0, "a pause is no failure"
    images = images_of(pods_of(begun.jobs, NAME))
    assert images == {f"{WORKERS}:{present_version()}"}, "the next attempt is the new operator's, image and all"


def test_a_killed_trainer_costs_one_attempt_and_each_step_is_counted_once(
    begun: Begun, paused: Paused, finished: dict[str, Any]
) -> None:
    assert finished["restarts"] == 1 and finished["progress"]["step"] == STEPS
    assert steps_of(begun.folder) == list(range(1, STEPS + 1))
    # Even without a grace period the kubelet gives a pod two seconds: a quick trainer uses them for another checkpoint.
    first, second = re.findall(rf"resumed from /output/{NAME}/checkpoints/step-(\d+)", begun.log)
    assert f"step-{first}" == paused.latest and int(second) >= int(first)


def test_the_student_has_learned(begun: Begun, finished: dict[str, Any]) -> None:
    [heldout] = finished["progress"]["evaluations"]
    print(
        f"\nscore {heldout['firstScore']} -> {heldout['score']}, "
        f"reverse KL {heldout['firstReverseKL']} -> {heldout['reverseKL']}"
    )
    assert float(heldout["score"]) >= float(heldout["firstScore"]) + 0.15
    assert float(heldout["reverseKL"]) < float(heldout["firstReverseKL"]) / 2
    model = begun.folder / "model"
    assert finished["result"]["modelPath"] == f"/output/{NAME}/model"
    assert (model / "model.safetensors").exists() and (model / "config.json").exists()


def test_teacher_and_engines_go_at_once_and_the_trainers_record_stays(begun: Begun, finished: dict[str, Any]) -> None:
    """They hold accelerators. What is in status, on the volume and in Prometheus is the same run."""
    jobs = begun.jobs
    jobs.wait("roles are released", lambda: not jobs.of_job("deployments,rayclusters", NAME), 60)
    lines = [json.loads(x) for x in (begun.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if x["kind"] == "step"]
    # By its pod: an earlier run of this test may have left series of the same job.
    of_rank_0 = f"{LABEL_JOB}={NAME},batch.kubernetes.io/job-completion-index=0"
    [trainer] = [name.removeprefix("pod/") for name in jobs.names("pods", of_rank_0)]
    for metric, field, key in (
        ("distill_reverse_kl_nats", "reverseKL", "reverse_kl"),
        ("distill_reward_mean", "reward", "reward"),
    ):
        [series] = prometheus(f'last_over_time({metric}{{pod="{trainer}"}}[30m])')
        assert series["metric"]["distillation_job"] == NAME
        assert series["metric"]["namespace"] == jobs.namespace and series["metric"]["role"] == "trainer"
        assert float(series["value"][1]) in [pytest.approx(x[key]) for x in steps[-3:]]
        assert float(finished["progress"][field]) == pytest.approx(steps[-1][key], abs=1e-4)
    for sglang in ("teacher", "rollout"):
        # The colon of SGLang's names is an underscore for a Prometheus before 3, which negotiates another format.
        name = '__name__=~"sglang[:_]prompt_tokens_total"'
        query = f'last_over_time({{{name},distillation_job="{NAME}",role="{sglang}"}}[30m])'
        assert prometheus(query), f"no SGLang metric of the {sglang}"
    assert prometheus("distill_operator_reconcile_total")


def test_results_come_out_of_the_cluster(begun: Begun, finished: dict[str, Any], tmp_path: Path) -> None:
    """By `kubectl distill` and the API server alone, from a namespace that enforces Pod Security `restricted`."""
    jobs, name = begun.jobs, NAME
    distill = REPO / "operator/.venv/bin/distill"
    exported, page = tmp_path / "model", tmp_path / "page.html"
    run(distill, "export", name, exported, "-n", jobs.namespace)
    of_the_job = jobs.output / name / "model"
    files = [path.relative_to(of_the_job) for path in of_the_job.rglob("*") if path.is_file()]
    assert files and all((exported / path).read_bytes() == (of_the_job / path).read_bytes() for path in files)
    run(distill, "report", name, "--html", page, "-n", jobs.namespace)
    assert f"<title>Distillation {name}</title>" in page.read_text() and "<svg" in page.read_text()
    last = json.loads(run(distill, "samples", name, "-n", jobs.namespace, "--output", "json"))
    assert last and last[0]["step"] == finished["progress"]["step"]
    jobs.wait("the pods that read it are gone", lambda: not jobs.names("pods", READERS), 60)


def test_the_demo_runs_on_a_cluster_that_is_named_to_it(demo: Demo) -> None:
    with timed("until the demo has ended"):
        code = demo.process.wait(900)
    said = demo.output.read_text()
    assert code == 0, said
    assert re.search(r"heldout +reverse KL [\d.]+ -> [\d.]+ nats per token", said)
    assert f"claim smollm2-output of namespace {SOMEBODYS}" in said
    assert json.loads((demo.jobs.output / "smollm2" / "state.json").read_text())["phase"] == "Done"


def test_a_job_that_is_deleted_leaves_nothing(begun: Begun, finished: dict[str, Any]) -> None:
    begun.jobs.delete(NAME)
