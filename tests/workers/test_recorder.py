"""What is kept of a step: how far single tokens are from the teacher, two rollouts to read, and what guards did."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import tiny_tokenizer
from runs import arithmetic

from distill_api.job import parse_job
from distill_api.metrics import StepStage
from distill_api.spec.guards import GuardAction
from distill_api.spec.job_spec import Schedule
from distill_workers.data.sample import Sample
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.evaluation.guards import Decision
from distill_workers.metrics import Metrics
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.progress_server import ProgressServer
from distill_workers.reporting.recorder import GUARD_EVENTS, Recorder
from distill_workers.reporting.sample_lines import TOKENS, picked_samples, sample_line, token_texts
from distill_workers.reporting.samples_file import Rollout, newest_lines, rollouts_in
from distill_workers.reporting.step_line import Step
from distill_workers.reporting.token_kl import source_kl, summary
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.serving.ports import reserve_port

TRAINED = {
    name: 0.25
    for name in ("reverse_kl", "loss", "grad_norm", "entropy", "trainer_engine_gap", "importance_capped_ratio")
} | {"learning_rate": 1e-5}


def sample(kl: list[float], **changes: Any) -> Sample:
    """A sample whose tokens have these differences of log-probs."""
    numbers: dict[str, Any] = {
        "prompt_index": 0,
        "index_in_group": 0,
        "token_versions": [3] * len(kl),
        "truncated": False,
    }
    ids = {"prompt_ids": [65, 66], "response_ids": [67 + i % 20 for i in range(len(kl))]}
    teacher = [-1.5 - one for one in kl]
    logprobs = {"engine_logprobs": [-1.5] * len(kl), "teacher_logprobs": teacher}
    return Sample(**{**numbers, **ids, **logprobs, **changes})


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(parse_job(arithmetic(tmp_path, "recorder")))
    folder.claim()
    return folder


def recorder(folder: RunFolder) -> tuple[Recorder, ProgressReporter]:
    reporter = ProgressReporter(folder, Metrics(), 40)
    record = Recorder(folder, reporter, parse_job(arithmetic(folder.root, "recorder")).spec, decode)
    record.spent(StepStage.TRAIN, 1.0)
    return record, reporter


def lines(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder.root / name).read_text().splitlines()]


def step(number: int, *samples: Sample) -> Step:
    return Step(number, list(samples), TRAINED, policy_lag=0.0, seconds=2.0)


def test_the_distribution_is_over_all_tokens_that_the_student_drew() -> None:
    drawn = [sample([0.0] * 18), sample([0.5, 3.0]), sample([100.0], supervised=True)]
    found = summary(drawn)
    assert found is not None
    assert found == pytest.approx({"mean": 0.175, "p50": 0.0, "p95": 0.625, "max": 3.0, "high_ratio": 0.05})
    assert summary([sample([1.0], supervised=True)]) is None


def test_the_reverse_kl_of_a_source_is_the_mean_over_its_tokens() -> None:
    drawn = [
        sample([1.0, 1.0, 1.0], source="sums"),
        sample([5.0], source="sums"),
        sample([0.5], source="words"),
        sample([9.0]),
    ]
    assert source_kl(drawn) == pytest.approx({"sums": 2.0, "words": 0.5})


def test_a_step_tells_its_token_kl_in_metrics_and_in_its_line(folder: RunFolder) -> None:
    record, reporter = recorder(folder)
    returned = record.step(step(1, sample([0.0, 2.0], source="sums")))
    [line] = lines(folder, "metrics.jsonl")
    assert line == returned
    assert line["token_kl"]["max"] == 2.0 and line["token_kl"]["high_ratio"] == 0.5
    assert line["reverse_kl_by_source"] == {"sums": 1.0}
    text = reporter.metrics.text().decode()
    assert 'distill_token_kl_nats{statistic="max"} 2.0' in text
    assert 'distill_source_reverse_kl_nats{source="sums"} 1.0' in text
    assert "distill_token_kl_high_ratio 0.5" in text


def test_progress_says_what_holds_the_steps_up_and_what_to_change(folder: RunFolder) -> None:
    record, reporter = recorder(folder)
    record.spent(StepStage.ROLLOUT, 3.0)
    record.step(step(1, sample([0.0])))
    progress = reporter.report.progress
    assert progress.bottleneck == "rollout"
    assert progress.advice is not None and "75 % of the step; raise rollout.replicas" in progress.advice
    for number in range(2, 13):
        record.begin_step()
        record.spent(StepStage.TRAIN, 1.0)
        record.step(step(number, sample([0.0])))
    assert reporter.report.progress.bottleneck == "trainer", "by the last ten steps, not by the first"


def test_what_the_roles_hold_is_paid_for_by_the_second(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    record, reporter = recorder(folder)
    begin = record._paid_until
    monkeypatch.setattr("time.monotonic", lambda: begin + 5.0)
    record.step(step(1, sample([0.0])))
    monkeypatch.setattr("time.monotonic", lambda: begin + 7.5)
    record.evaluation(Measurement("heldout", 1, score=0.5))
    text = reporter.metrics.text().decode()
    for part in ("teacher", "rollout", "trainer"):
        assert f'distill_accelerator_seconds_total{{part="{part}"}} 7.5' in text


def test_engines_that_join_a_running_job_are_paid_for_from_then_on(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, reporter = recorder(folder)
    begin, placed = record._paid_until, 1
    record.engines = lambda: placed
    monkeypatch.setattr("time.monotonic", lambda: begin + 5.0)
    record.step(step(1, sample([0.0])))
    placed = 3
    monkeypatch.setattr("time.monotonic", lambda: begin + 7.0)
    record.step(step(2, sample([0.0])))
    assert 'distill_accelerator_seconds_total{part="rollout"} 11.0' in reporter.metrics.text().decode()


async def test_the_trainer_serves_its_newest_rollouts(folder: RunFolder) -> None:
    record, reporter = recorder(folder)
    port = reserve_port()
    server = ProgressServer(reporter, folder)
    await server.start(port)
    try:
        async with aiohttp.ClientSession() as session:

            async def served() -> list[Rollout]:
                async with session.get(f"http://127.0.0.1:{port}/samples") as answer:
                    assert answer.status == 200 and answer.content_type == "application/x-ndjson"
                    return list(rollouts_in((await answer.text()).splitlines()))

            assert await served() == [], "before the first step"
            record.step(step(1, sample([0.5, 2.0])))
            record.evaluation(Measurement("heldout", 1, score=0.5, examples=[{"prompt": "a"}]))
            record.step(step(2, sample([0.25])))
            assert [(r.step, r.kl) for r in await served()] == [(1, [0.5, 2.0]), (2, [0.25])]
    finally:
        await server.close()


def test_of_a_long_file_the_last_whole_lines_are_served(tmp_path: Path) -> None:
    (tmp_path / "samples.1.jsonl").write_text("aaaa\nbbbb\n")
    (tmp_path / "samples.jsonl").write_text("cccc\ndddd\neee")
    assert newest_lines(tmp_path) == b"aaaa\nbbbb\ncccc\ndddd\n", "a line without an end is being written"
    assert newest_lines(tmp_path, 13) == b"cccc\ndddd\n"
    assert newest_lines(tmp_path, 12) == b"dddd\n"
    assert newest_lines(tmp_path, 18) == b"bbbb\ncccc\ndddd\n"
    assert newest_lines(tmp_path, 2) == b""


def test_a_gauge_is_exported_from_its_first_value_on(folder: RunFolder) -> None:
    record, reporter = recorder(folder)
    assert "distill_reverse_kl_nats" not in reporter.metrics.text().decode()
    record.step(step(1, sample([0.0])))
    assert "distill_reverse_kl_nats 0.25" in reporter.metrics.text().decode()


def test_a_guard_that_has_not_acted_counts_from_0(tmp_path: Path) -> None:
    guard = {"name": "diverges", "watch": "reverse-kl", "above": 5, "action": "lower-coefficient"}
    guarded = parse_job(arithmetic(tmp_path, "guarded", guards=[guard]))
    folder, metrics = RunFolder(guarded), Metrics()
    Recorder(folder, ProgressReporter(folder, metrics, 40), guarded.spec, decode)
    text = metrics.text().decode()
    for action in ("lower-coefficient", "stop"):
        assert f'distill_guard_decisions_total{{action="{action}",guard="diverges"}} 0.0' in text


def test_the_first_rollout_and_the_one_furthest_from_the_teacher_are_kept(folder: RunFolder) -> None:
    record, _ = recorder(folder)
    far = sample([2.0, 1.0, 0.0], reward=1.0, index_in_group=2)
    drawn = [sample([9.0], supervised=True), sample([0.0], index_in_group=1), far, sample([0.1, 0.2])]
    record.step(step(7, *drawn))
    first, furthest = lines(folder, "samples.jsonl")
    assert (first["picked"], first["kl"], first["tokens"]) == ("first", [0.1, 0.2], ["C", "D"])
    assert (furthest["picked"], furthest["kl"], furthest["reward"]) == ("furthest", [2.0, 1.0, 0.0], 1.0)
    assert first["step"] == 7 and first["prompt"] == "AB" and first["kind"] == "rollout"
    assert [why for why, _ in picked_samples([sample([1.0])])] == ["first"]
    assert picked_samples([sample([9.0], supervised=True)]) == []


def test_a_long_rollout_is_cut_off_and_says_how_long_it_was() -> None:
    line = sample_line(1, "first", sample([0.5] * (TOKENS + 100)), decode)
    assert len(line["tokens"]) == len(line["kl"]) == TOKENS  # type: ignore[arg-type]
    assert line["response_tokens"] == TOKENS + 100


@pytest.mark.parametrize("text", ["sum is 12", "naïve €5", "数学, 🙂!"])
def test_the_texts_of_tokens_make_up_the_response_whatever_they_split(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, tokenizer.decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_file_that_has_grown_is_rotated(folder: RunFolder) -> None:
    for number in range(50):
        folder.append("samples.jsonl", {"step": number, "text": "x" * 80}, limit_bytes=1000)
    sizes = [(folder.root / name).stat().st_size for name in ("samples.jsonl", "samples.1.jsonl")]
    assert all(size < 1200 for size in sizes)
    assert lines(folder, "samples.jsonl")[-1]["step"] == 49
    assert {p.name for p in folder.root.glob("samples*")} == {"samples.jsonl", "samples.1.jsonl"}


def test_a_resumed_run_writes_its_later_rollouts_again(folder: RunFolder) -> None:
    record, _ = recorder(folder)
    for number in (1, 2, 3):
        record.step(step(number, sample([0.5])))
    folder.trim(2)
    assert [line["step"] for line in lines(folder, "samples.jsonl")] == [1, 2]


def decision(at: int, action: GuardAction = GuardAction.LOWER_COEFFICIENT) -> Decision:
    return Decision("diverges", action, at, "reverse-kl 9 is above 5 nats")


def test_what_a_guard_decides_is_in_progress_metrics_and_the_curve(folder: RunFolder) -> None:
    record, reporter = recorder(folder)
    for at in range(1, 8):
        record.guard(decision(at), at, 0.5)
    events = reporter.report.progress.guard_events
    assert [event.step for event in events] == list(range(8 - GUARD_EVENTS, 8))
    assert events[-1].action == "lower-coefficient" and events[-1].message == "reverse-kl 9 is above 5 nats"
    counted = 'distill_guard_decisions_total{action="lower-coefficient",guard="diverges"} 7.0'
    assert counted in reporter.metrics.text().decode()
    assert lines(folder, "metrics.jsonl")[-1] | {"time": 0} == {
        "kind": "guard",
        "step": 7,
        "time": 0,
        "at_step": 7,
        "action": "lower-coefficient",
        "guard": "diverges",
        "message": "reverse-kl 9 is above 5 nats",
        "coefficient_factor": 0.5,
    }


def test_a_roll_back_takes_the_curve_back_and_keeps_what_was_seen_elsewhere(folder: RunFolder) -> None:
    record, reporter = recorder(folder)
    saved: dict[int, dict[str, Any]] = {}
    for number in range(1, 7):
        record.step(step(number, sample([0.5])))
        if number % 2 == 0:
            record.evaluation(Measurement("heldout", number, score=1.0 / number))
            saved[number] = {"step": number, **record.state()}
            folder.publish_checkpoint(folder.checkpoint_aside(number), saved[number], Schedule(steps=9, keep_last=9))
    record.guard(decision(5), 5, 0.5)
    best = folder.best_checkpoint()
    assert best is not None and best[1]["step"] == 2
    record.rolled_back(best[1], 2)
    record.guard(decision(6, GuardAction.ROLL_BACK), 2, 1.0)
    folder.roll_back(best[0], {"step": 2, **record.state()})
    curve = [(line["kind"], line["step"]) for line in lines(folder, "metrics.jsonl")]
    assert curve == [("step", 1), ("step", 2), ("evaluation", 2), ("guard", 2)]
    assert [line["step"] for line in lines(folder, "rolled-back.jsonl") if line["kind"] == "step"] == [3, 4, 5, 6]
    newest = folder.latest_checkpoint()
    assert newest is not None and newest[0] == best[0] and newest[1]["step"] == 2
    events = [(event["step"], event["action"]) for event in newest[1]["progress"]["guardEvents"]]
    assert events == [(5, "lower-coefficient"), (6, "roll-back")], "what was done stays known"
    assert [p.name for p in folder.checkpoints.glob("step-*")] == ["step-000002"]
    assert reporter.report.progress.step == 2 and reporter.report.progress.evaluations[0].step == 2
