"""Whole jobs on the embedded cluster: real kubelet, KubeRay, SGLang, Megatron, Prometheus; nothing is played."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import LABEL_JOB, REPO, Jobs, prometheus, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400, func_only=True)]

REWARD = {"reward": {"source": "exact-match"}, "rewardCoefficient": 0.0}
"""Graded, for the metric; without weight, so that the curve is the KL's alone."""
TWO_PODS = {"nodes": 2}
READERS = "app.kubernetes.io/name=distillation-reader"


def results_come_out_of_the_cluster(jobs: Jobs, name: str, folder: Path) -> None:
    """By `kubectl distill` and the API server alone, from a namespace that enforces Pod Security `restricted`."""
    distill = REPO / "operator/.venv/bin/distill"
    exported, page = folder / "model", folder / "page.html"
    run(distill, "export", name, exported, "-n", jobs.namespace)
    of_the_job = jobs.output / name / "model"
    files = [path.relative_to(of_the_job) for path in of_the_job.rglob("*") if path.is_file()]
    assert files and all((exported / path).read_bytes() == (of_the_job / path).read_bytes() for path in files)
    run(distill, "report", name, "--html", page, "-n", jobs.namespace)
    assert f"<title>Distillation {name}</title>" in page.read_text() and "<svg" in page.read_text()
    last = json.loads(run(distill, "samples", name, "-n", jobs.namespace, "--output", "json"))
    assert last and last[0]["step"] == jobs.status(name)["progress"]["step"]
    jobs.wait("the pods that read it are gone", lambda: not jobs.names("pods", READERS), 60)


def test_an_applied_job_succeeds_and_the_student_has_learned(jobs: Jobs, tmp_path: Path) -> None:
    """Two trainer pods, data parallel. What is in status, on the volume and in Prometheus is the same run."""
    jobs.arithmetic("learns", objective=REWARD, trainer=TWO_PODS)
    jobs.wait("step 2", lambda: jobs.step("learns") >= 2)
    # As a user would look in: the trainer serves it, the API server brings it.
    command = [REPO / "operator/.venv/bin/distill", "samples", "learns", "-n", jobs.namespace, "--output", "json"]
    [first, *_] = json.loads(run(*command))
    assert first["step"] >= 1 and first["tokens"], "decoded, with the KL of each token"
    done = jobs.finish("learns")
    assert done["status"] == "True", jobs.picture()
    status = jobs.status("learns")
    [heldout] = status["progress"]["evaluations"]
    print(
        f"\nscore {heldout['firstScore']} -> {heldout['score']}, "
        f"reverse KL {heldout['firstReverseKL']} -> {heldout['reverseKL']}"
    )
    assert float(heldout["score"]) >= float(heldout["firstScore"]) + 0.15
    assert float(heldout["reverseKL"]) < float(heldout["firstReverseKL"]) / 2
    assert status["restarts"] == 0 and status["progress"]["step"] == 40
    model = jobs.output / "learns" / "model"
    assert status["result"]["modelPath"] == "/output/learns/model"
    assert (model / "model.safetensors").exists() and (model / "config.json").exists()
    lines = [json.loads(x) for x in (jobs.output / "learns" / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if x["kind"] == "step"]
    assert [x["step"] for x in steps] == list(range(1, 41))
    log = (jobs.output / "learns" / "logs" / "rank-0.log").read_text()
    assert "is lost" not in log, "no engine had a reason to be restarted"
    results_come_out_of_the_cluster(jobs, "learns", tmp_path)
    # The teacher and the engines hold accelerators: they go at once, the trainer's record stays.
    jobs.wait("roles are released", lambda: not jobs.names("deployments") and not jobs.names("rayclusters"), 60)
    # By its pod: an earlier run of this test may have left series of the same job.
    of_rank_0 = f"{LABEL_JOB}=learns,batch.kubernetes.io/job-completion-index=0"
    [trainer] = [name.removeprefix("pod/") for name in jobs.names("pods", of_rank_0)]
    for metric, field, key in (
        ("distill_reverse_kl_nats", "reverseKL", "reverse_kl"),
        ("distill_reward_mean", "reward", "reward"),
    ):
        [series] = prometheus(f'last_over_time({metric}{{pod="{trainer}"}}[30m])')
        assert series["metric"]["distillation_job"] == "learns"
        assert series["metric"]["namespace"] == jobs.namespace and series["metric"]["role"] == "trainer"
        assert float(series["value"][1]) in [pytest.approx(x[key]) for x in steps[-3:]]
        assert float(status["progress"][field]) == pytest.approx(steps[-1][key], abs=1e-4)
    for sglang in ("teacher", "rollout"):
        # The colon of SGLang's names is an underscore for a Prometheus before 3, which negotiates another format.
        name = '__name__=~"sglang[:_]prompt_tokens_total"'
        query = f'last_over_time({{{name},distillation_job="learns",role="{sglang}"}}[30m])'
        assert prometheus(query), f"no SGLang metric of the {sglang}"
    assert prometheus("distill_operator_reconcile_total")
    jobs.delete("learns")


def test_a_job_survives_the_loss_of_every_role_in_turn_and_a_pause(jobs: Jobs) -> None:
    """Operator, engine and teacher pods are killed, the job is suspended and resumed, and its trainer is killed: the
    steps are counted once and the job succeeds. It saves nothing by itself, so what it goes on from is SIGTERM's."""
    name, steps = "survives", 48
    jobs.arithmetic(name, schedule={"steps": steps, "checkpointEverySteps": 50}, evaluation=[])
    log = jobs.output / name / "logs" / "rank-0.log"

    def later(steps: int = 3, seconds: float = 480) -> None:
        target = jobs.step(name) + steps
        jobs.wait(f"step {target}", lambda: jobs.step(name) >= target, seconds)

    def kill(selector: str, namespace: str = jobs.namespace) -> None:
        command = ["kubectl", "-n", namespace, "delete", "pod", "-l", selector]
        subprocess.run([*command, "--grace-period=0", "--force", "--wait=false"], check=True, capture_output=True)

    def suspend(value: str) -> None:
        jobs.kubectl("patch", "djob", name, "--type=merge", "-p", f'{{"spec":{{"suspend":{value}}}}}')

    of_job = f"distillation-operator.io/job={name}"
    later(3)
    before = jobs.get("job", f"{name}-trainer-1")["metadata"]["uid"]
    kill("app.kubernetes.io/name=distillation-operator", "distillation-system")
    later()
    kill(f"{of_job},distillation-operator.io/role=teacher")
    later()
    kill(f"{of_job},ray.io/node-type=worker")
    later()
    assert jobs.get("job", f"{name}-trainer-1")["metadata"]["uid"] == before, "none of this may cost an attempt"

    suspend("true")
    jobs.wait("no pod is left", lambda: not jobs.pods_of(name), 120)
    jobs.wait("Suspended", lambda: jobs.condition(name, "Suspended")["status"] == "True", 30)
    saved = (jobs.output / name / "checkpoints" / "latest").read_text()
    assert int(saved.removeprefix("step-")) >= 12, "SIGTERM must have saved what was trained"
    suspend("false")
    later()
    resumed = f"resumed from /output/{name}/checkpoints/{saved}"
    assert resumed in log.read_text()
    assert jobs.status(name)["restarts"] == 0, "a pause is no failure"
    attempts = jobs.status(name)["attempts"]

    kill(f"{of_job},distillation-operator.io/role=trainer")
    jobs.wait("the next attempt", lambda: jobs.status(name).get("attempts") == attempts + 1, 120)
    assert jobs.finish(name)["status"] == "True", jobs.picture()
    status = jobs.status(name)
    assert status["restarts"] == 1 and status["progress"]["step"] == steps
    lines = [json.loads(x) for x in (jobs.output / name / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "step"] == list(range(1, steps + 1))
    # Even without a grace period the kubelet gives a pod two seconds: a quick trainer uses them for another checkpoint.
    first, second = re.findall(rf"resumed from /output/{name}/checkpoints/step-(\d+)", log.read_text())
    assert f"step-{first}" == saved and int(second) >= int(first)
    jobs.delete(name)


def test_bad_input_ends_in_a_condition_that_says_what_to_do_and_leaves_no_pod(jobs: Jobs) -> None:
    missing_model = {"student": {"model": "/models/nowhere"}}
    jobs.arithmetic("no-model", **missing_model)
    jobs.arithmetic("no-volume", output={"volume": {"claimName": "absent"}})
    # The student has no chat template, which would be said first.
    nowhere = {"path": "/models/nowhere.jsonl", "applyChatTemplate": False}
    jobs.arithmetic("no-prompts", data={"prompts": nowhere})
    for name, sentence in (
        ("no-model", "spec.student.model: /models/nowhere is no Hugging Face checkpoint"),
        ("no-prompts", "/models/nowhere.jsonl: does not exist"),
    ):
        failed = jobs.finish(name)
        assert failed["status"] == "False" and failed["reason"] == "ConfigurationError", jobs.picture()
        assert sentence in failed["message"]
        assert jobs.status(name)["restarts"] == 0
        jobs.wait(
            f"no running pod of {name}",
            lambda n=name: (
                not jobs.kubectl(
                    "get",
                    "pods",
                    "-l",
                    f"distillation-operator.io/job={n}",
                    "--field-selector=status.phase=Running",
                    "-o",
                    "name",
                )
            ),
            60,
        )
    waiting = jobs.condition("no-volume", "TrainerReady")
    assert waiting["reason"] == "VolumeNotBound" and "absent" in waiting["message"]
    assert not jobs.pods_of("no-volume")
    for name in ("no-model", "no-volume", "no-prompts"):
        jobs.delete(name)
