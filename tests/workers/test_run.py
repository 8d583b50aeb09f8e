"""What a whole run promises: the student learns, a kill costs nothing, and bad input ends in one sentence."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from runs import MODELS, Outcome, Run, arithmetic, servers_of

import soak
from distill_api.protocol import ExitCode, ExitReason
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer

pytestmark = pytest.mark.timeout(2400)

DETERMINISTIC: dict[str, Any] = {
    "deterministic": True,
    "rollout": {"promptsPerStep": 4, "samplesPerPrompt": 2},
    "schedule": {"steps": 10, "checkpointEverySteps": 5, "evaluateEverySteps": 5},
    "evaluation": [
        {
            "name": "heldout",
            "prompts": {"path": str(MODELS / "arithmetic" / "test.jsonl"), "promptField": "prompt"}
            | {"answerField": "answer", "applyChatTemplate": False},
            "reward": {"source": "exact-match"},
            "maxPrompts": 8,
        }
    ],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of the arithmetic teacher."""
    scratch = tmp_path_factory.mktemp("teacher")
    from distill_api.job import parse_job

    spec = parse_job(arithmetic(scratch, "teacher")).spec
    server = SGLangServer(spec.teacher.model, spec, "teacher", port=reserve_port(), log=scratch / "teacher.log")
    server.start()
    try:
        server.wait_ready(300)
        yield f"127.0.0.1:{server.port}"
    finally:
        server.stop()


def model_hash(outcome: Outcome) -> str:
    return hashlib.sha256((outcome.folder / "model" / "model.safetensors").read_bytes()).hexdigest()


# Three seeds, and between them both layouts of two ranks, both ways of weight sync, and strict and lagging policy.
VARIANTS: dict[str, dict[str, Any]] = {
    "one-rank": {"seed": 0},
    "data-parallel": {
        "seed": 1,
        "rollout": {"maxPolicyLag": 1},
        "trainer": {"gpusPerNode": 2, "weightSync": "disk"},
    },
    "tensor-parallel": {
        "seed": 2,
        "rollout": {"maxPolicyLag": 1, "partial": True},
        "trainer": {"gpusPerNode": 2, "parallelism": {"tensor": 2}},
    },
}


FEWER = {"promptsPerStep": 32}
"""Half the responses of the example a step; `make soak` takes all of them."""


def test_distillation_lifts_the_students_accuracy_and_halves_its_reverse_kl(teacher: str, tmp_path: Path) -> None:
    first, last = whole_run("one-rank", teacher, tmp_path, rollout=FEWER)
    assert last["score"] >= first["score"] + 0.15
    assert last["reverse_kl"] < first["reverse_kl"] / 2


def test_a_tensor_parallel_trainer_learns_too(teacher: str, tmp_path: Path) -> None:
    """A part of the schedule; `make soak` runs all of it. The data parallel one runs whole in tests/e2e/test_job.py."""
    rollout = VARIANTS["tensor-parallel"]["rollout"] | FEWER
    first, last = whole_run("tensor-parallel", teacher, tmp_path, steps=16, rollout=rollout)
    assert last["reverse_kl"] < 0.8 * first["reverse_kl"]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_three_seeds_of_every_layout_lift_the_accuracy_and_halve_the_reverse_kl(teacher: str, tmp_path: Path) -> None:
    for seed in soak.seeds(0.2, at_least=3):
        for name in VARIANTS:
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            first, last = whole_run(name, teacher, folder, seed=seed)
            assert last["score"] >= first["score"] + 0.15
            assert last["reverse_kl"] < first["reverse_kl"] / 2


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_runs_that_are_killed_at_any_time_count_every_step_once(teacher: str, tmp_path: Path) -> None:
    for seed in soak.seeds(0.2, at_least=3):
        rng, kills = random.Random(seed), 0
        folder = tmp_path / str(seed)
        folder.mkdir()
        schedule = {"steps": 12, "checkpointEverySteps": rng.choice([1, 3, 5])}
        manifest = arithmetic(folder, "killed", seed=seed, schedule=schedule, evaluation=[])
        for _ in range(rng.randint(1, 3)):
            run = Run(manifest, teacher, folder)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(rng.uniform(1, 60))
            if run.process.poll() is None:
                run.kill()
                kills += 1
        outcome = Run(manifest, teacher, folder).wait()
        print(f"seed {seed}: {kills} kills, {schedule}", flush=True)
        assert outcome.code == ExitCode.DONE, outcome.log
        assert [line["step"] for line in outcome.lines("step")] == list(range(1, 13))


def whole_run(
    name: str, teacher: str, folder: Path, *, steps: int = 40, **changes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of a variant, all of whose promises are checked but what it learns: its first and last evaluation."""
    manifest = arithmetic(folder, name, **{**VARIANTS[name], **changes}, schedule={"steps": steps})
    outcome = Run(manifest, teacher, folder).wait()
    assert outcome.code == ExitCode.DONE, outcome.log
    first, *_, last = outcome.lines("evaluation")
    print(
        f"\n{name}: greedy accuracy {first['score']:.3f} -> {last['score']:.3f}, "
        f"teacher's {first['teacher_score']:.3f}, "
        f"reverse KL {first['reverse_kl']:.3f} -> {last['reverse_kl']:.3f}"
    )
    assert first["teacher_score"] >= 0.97
    done = outcome.lines("step")
    assert [s["step"] for s in done] == list(range(1, steps + 1))
    lag = VARIANTS[name].get("rollout", {}).get("maxPolicyLag", 0)
    assert max(s["trainer_engine_gap"] for s in done) < (1.0 if lag else 1e-3)
    assert max(s["policy_lag"] for s in done) <= lag
    state = json.loads((outcome.folder / "state.json").read_text())
    assert state["phase"] == "Done" and state["progress"]["step"] == steps
    assert state["result"]["modelPath"] == str(outcome.folder / "model")
    assert "is lost" not in (outcome.folder / "logs" / "rank-0.log").read_text(), (
        "no engine had a reason to be restarted"
    )
    exported_model_is_what_was_measured(outcome, last["score"])
    return first, last


def exported_model_is_what_was_measured(outcome: Outcome, score: float) -> None:
    """transformers loads the export and answers as well as the engines did."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = outcome.folder / "model"
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert score in [pytest.approx(result.metric_value, abs=1e-4) for result in results]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(x) for x in (MODELS / "arithmetic" / "test.jsonl").read_text().splitlines()[:64]]
    ids = torch.tensor([tokenizer(x["prompt"])["input_ids"] for x in lines])
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    accuracy = sum(t.strip() == x["answer"] for t, x in zip(texts, lines, strict=True)) / len(lines)
    assert abs(accuracy - score) < 0.2  # 64 of the 256 prompts


def test_a_killed_run_goes_on_to_the_same_last_bit(tmp_path: Path) -> None:
    """Ten steps = five steps, kill -9, resume, five steps. The teacher is deterministic too, and so its own."""
    from distill_api.job import parse_job

    whole = arithmetic(tmp_path / "whole", "same", **DETERMINISTIC)
    parts = arithmetic(tmp_path / "parts", "same", **DETERMINISTIC)
    spec = parse_job(whole).spec
    server = SGLangServer(spec.teacher.model, spec, "teacher", port=reserve_port(), log=tmp_path / "teacher.log")
    server.start()
    try:
        server.wait_ready(300)
        address = f"127.0.0.1:{server.port}"
        uninterrupted = Run(whole, address, tmp_path).wait()
        assert uninterrupted.code == ExitCode.DONE, uninterrupted.log
        first = Run(parts, address, tmp_path)
        first.wait_for_step(7)
        latest = tmp_path / "parts" / "same" / "checkpoints" / "latest"
        first.wait_until("its checkpoint is published, which happens beside the next steps", latest.exists)
        first.kill()
        assert latest.read_text() == "step-000005"
        resumed = Run(parts, address, tmp_path).wait()
        assert resumed.code == ExitCode.DONE, resumed.log
    finally:
        server.stop()
    assert "resumed from" in resumed.log

    def curve(outcome: Outcome) -> list[tuple[int, float, float, float]]:
        return [(s["step"], s["loss"], s["reverse_kl"], s["grad_norm"]) for s in outcome.lines("step")]

    def measured(outcome: Outcome) -> list[tuple[int, float, float]]:
        return [(e["step"], e["score"], e["reverse_kl"]) for e in outcome.lines("evaluation")]

    assert curve(resumed) == curve(uninterrupted)
    assert measured(resumed) == measured(uninterrupted) and [e[0] for e in measured(resumed)] == [0, 5, 10]
    assert model_hash(resumed) == model_hash(uninterrupted)


def test_a_killed_engine_costs_the_run_nothing_and_sigterm_saves_a_checkpoint(teacher: str, tmp_path: Path) -> None:
    """Of the example whose teacher is an endpoint: that of the job, not one that the operator would tell of."""
    endpoint, schedule = {"endpoint": {"url": f"http://{teacher}"}}, {"steps": 100_000}
    manifest = arithmetic(tmp_path, "stopped", example="endpoint-cpu", teacher=endpoint, schedule=schedule)
    run = Run(manifest, "", tmp_path)
    run.wait_for_step(2)
    servers = servers_of(tmp_path / "stopped")
    assert servers
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    run.wait_for_step(6)
    metrics = run.get("/metrics")
    assert "distill_train_step" in metrics and "distill_reverse_kl_nats" in metrics
    run.process.send_signal(signal.SIGTERM)
    outcome = run.wait(180)
    assert outcome.code == ExitCode.TEMPORARY
    assert outcome.report is not None and outcome.report.reason is ExitReason.STOPPED
    log = (outcome.folder / "logs" / "rank-0.log").read_text()
    assert "is lost" in log and "is back" in log
    saved = int((outcome.folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert saved >= 6
    done = outcome.lines("step")
    assert [s["step"] for s in done] == list(range(1, saved + 1))
    assert len({s["samples"] for s in done}) == 1, "what the engine lost is sampled again"


def test_bad_input_is_never_retried_and_says_what_to_do(teacher: str, tmp_path: Path) -> None:
    """Where model or prompts are missing: tests/e2e/test_job.py."""
    train = str(MODELS / "arithmetic" / "train.jsonl")
    prompts = {"path": train, "promptField": "question", "applyChatTemplate": False}
    outcome = Run(arithmetic(tmp_path, "no-field", data={"prompts": prompts}), teacher, tmp_path).wait(120)
    assert outcome.code == ExitCode.CONFIGURATION, outcome.log
    assert outcome.report is not None and outcome.report.reason is ExitReason.CONFIGURATION_ERROR
    assert "train.jsonl:1: has no field question" in outcome.report.message
    assert "Traceback" not in outcome.log


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return {'score': 1.0}", "returned a dict with 'score' (return its 'score'); it must return a number"),
        ("return None", "returned None; it must return a number"),
        ("async def later(): return 1.0\n    return later()", "returned a coroutine; it must return a number"),
    ],
)
def test_a_reward_function_that_returns_wrongly_ends_the_trainer_for_good(
    body: str, what: str, teacher: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(f"def reward(response, answer, metadata):\n    {body}\n")
    manifest = arithmetic(
        tmp_path,
        "wrong-reward",
        objective={"reward": {"source": "python", "function": "mine:reward"}, "rewardCoefficient": 1.0},
        rollout={"promptsPerStep": 2, "samplesPerPrompt": 2},
        evaluation=[],
    )
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    outcome = Run(manifest, teacher, tmp_path, PYTHONPATH=path).wait(300)
    assert outcome.code == ExitCode.CONFIGURATION, outcome.log
    assert outcome.report is not None and outcome.report.reason is ExitReason.CONFIGURATION_ERROR
    assert outcome.report.message.startswith(f"reward.function mine:reward: {what}")
    assert "Traceback" not in outcome.log


def test_a_teacher_of_another_vocabulary_fails_the_preflight(teacher_server: Any, tmp_path: Path) -> None:
    address = f"127.0.0.1:{teacher_server.port}"
    outcome = Run(arithmetic(tmp_path, "vocabulary"), address, tmp_path).wait(300)
    assert outcome.code == ExitCode.CONFIGURATION, outcome.log
    assert outcome.report is not None and outcome.report.reason is ExitReason.PREFLIGHT_FAILED
    assert "SameVocabulary" in outcome.report.message and "one family" in outcome.report.message


def test_a_teacher_that_never_answers_ends_the_attempt_with_its_address(tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{reserve_port()}"
    outcome = Run(arithmetic(tmp_path, "lonely", preRunningDeadlineSeconds=5), nobody, tmp_path).wait(300)
    assert outcome.code == ExitCode.TEMPORARY, outcome.log
    assert outcome.report is not None and outcome.report.reason is ExitReason.TEACHER_UNREACHABLE
    assert nobody in outcome.report.message


def test_another_run_in_the_folder_is_refused(teacher: str, tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"fingerprint": "another", "job": {}}))
    outcome = Run(arithmetic(tmp_path, "taken"), teacher, tmp_path).wait(120)
    assert outcome.code == ExitCode.CONFIGURATION, outcome.log
    assert outcome.report is not None and "holds another run" in outcome.report.message
