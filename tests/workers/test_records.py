"""The run folder, the recorder and the exit report: what outlives a process is whole, and says the right thing."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import arithmetic

from distill_api.job import DistillationJob, parse_job
from distill_api.metrics import StepStage
from distill_api.protocol import ExitReason, ExitReport, Phase, ProgressReport
from distill_api.status import EvaluationScore, Progress
from distill_workers.data.sample import Sample
from distill_workers.evaluation.estimates import Estimate
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.evaluation.status_entry import updated_entry
from distill_workers.metrics import Metrics
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.recorder import Recorder
from distill_workers.reporting.step_line import TRAINED, Step
from distill_workers.run.exit_report import MESSAGE_BYTES, exit_report
from distill_workers.run_folder.run_folder import ForeignRun, RunFolder, fingerprint


def job(output: Path, **changes: Any) -> DistillationJob:
    return parse_job(arithmetic(output, "records", **changes))


def test_a_checkpoint_is_the_newest_only_once_it_is_whole(tmp_path: Path) -> None:
    folder = RunFolder(job(tmp_path))
    folder.claim()
    schedule = job(tmp_path, schedule={"keepLast": 2}).spec.schedule
    assert folder.latest_checkpoint() is None
    folder.publish_checkpoint(folder.checkpoint_aside(5), {"step": 5}, schedule)
    (folder.checkpoint_aside(10) / "rank-0.pt").write_bytes(b"half")  # and here the process is killed
    newest = folder.latest_checkpoint()
    assert newest is not None and newest[1] == {"step": 5}
    folder.publish_checkpoint(folder.checkpoint_aside(10), {"step": 10}, schedule)
    folder.publish_checkpoint(folder.checkpoint_aside(15), {"step": 15}, schedule)
    assert sorted(p.name for p in folder.checkpoints.glob("step-*")) == ["step-000010", "step-000015"]


def test_a_resumed_run_writes_the_later_lines_again(tmp_path: Path) -> None:
    folder = RunFolder(job(tmp_path))
    folder.claim()
    for step in range(1, 5):
        folder.append("metrics.jsonl", {"kind": "step", "step": step})
    with (folder.root / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # a kill in the middle of a line
    folder.trim(2)
    lines = (folder.root / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2]


def test_a_folder_is_taken_up_by_the_same_curve_alone(tmp_path: Path) -> None:
    RunFolder(job(tmp_path)).claim()
    RunFolder(job(tmp_path, schedule={"steps": 80}, teacher={"replicas": 2})).claim()
    moved = {"nodes": 2, "parallelism": {"tensor": 2}, "gpusPerNode": 2, "maxTokensPerMicroBatch": 999}
    optimizer = job(tmp_path).spec.trainer.optimizer.model_dump(by_alias=True) | {"distributed": True}
    RunFolder(job(tmp_path, trainer={**moved, "optimizer": optimizer, "weightSync": "disk"})).claim()
    with pytest.raises(ForeignRun):
        RunFolder(job(tmp_path, trainer={"optimizer": optimizer | {"learningRate": 0.5}})).claim()
    other = job(tmp_path, seed=7)
    assert fingerprint(other) != fingerprint(job(tmp_path))
    with pytest.raises(ForeignRun, match=r"holds another run.*choose another spec.output.path"):
        RunFolder(other).claim()


def test_a_step_says_nothing_of_what_had_no_token_to_be_measured_at(tmp_path: Path) -> None:
    folder, metrics = RunFolder(job(tmp_path)), Metrics()
    folder.claim()
    recorder = Recorder(folder, ProgressReporter(folder, metrics, 5), job(tmp_path).spec, str)
    sample = Sample(0, 0, [1], [2, 3], [0.0, 0.0], [0, 0], False, [-1.0, -1.0], supervised=True)
    trained = {name: 0.5 for name in TRAINED if name != "reverse_kl"}

    recorder.begin_step()
    recorder.spent(StepStage.TRAIN, 1.0)
    recorder.step(Step(3, [sample], trained, 0.0, 1.0))

    line = json.loads((folder.root / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["reverse_kl"] is None and line["divergence"] == 0.5
    scraped = metrics.text().decode().splitlines()
    assert "distill_reverse_kl_nats NaN" in scraped and "distill_divergence_nats 0.5" in scraped


def measured(step: int, score: float | None, kl: float | None) -> Measurement:
    return Measurement("heldout", step, score=score, reverse_kl=kl)


@pytest.mark.parametrize(
    ("series", "best"),
    [
        ([(0.1, 2.0), (0.5, 1.0), (0.3, 0.5)], 1),
        ([(None, 2.0), (None, 0.5), (None, 1.0), (None, 0.7)], 1),
    ],
    ids=["by score", "by KL without one"],
)
def test_the_best_step_is_the_best_of_all(series: list[tuple[float | None, float]], best: int) -> None:
    entry: EvaluationScore | None = None
    for step, (score, kl) in enumerate(series):
        entry = updated_entry(entry, measured(step, score, kl))
    assert entry is not None and entry.best_step == best
    assert entry.best_reverse_kl == f"{series[best][1]:.5f}"
    assert entry.first_reverse_kl == "2.00000" and entry.step == len(series) - 1


def test_the_newest_entry_has_the_interval_and_pass_at_the_largest_k() -> None:
    passes = {1: Estimate(0.5, 0.4, 0.6), 4: Estimate(0.75, 0.6, 0.9)}
    entry = updated_entry(None, Measurement("heldout", 0, score=0.5, score_low=0.4, score_high=0.6, pass_at=passes))
    assert (entry.score_low, entry.score_high, entry.pass_at_k) == ("0.40000", "0.60000", "0.75000")


def test_an_evaluation_whose_rewards_all_failed_is_not_the_best() -> None:
    entry = updated_entry(updated_entry(None, measured(0, 0.5, 2.0)), measured(1, None, 0.1))
    assert (entry.best_step, entry.best_score, entry.best_reverse_kl) == (0, "0.50000", "2.00000")
    assert entry.score is None and entry.step == 1


def test_the_exit_report_fits_a_termination_message_whatever_was_measured(tmp_path: Path) -> None:
    this = job(tmp_path)
    folder = RunFolder(this)
    folder.claim()
    scores = [
        EvaluationScore(name=f"evaluation-{n:02d}-{'x' * 20}", step=40, score="0.12345", reverse_kl="1.23456")
        for n in range(16)
    ]
    wide = [s.model_copy(update={"best_score": "0.5", "first_score": "0.1", "teacher_score": "0.9"}) for s in scores]
    report = ProgressReport(phase=Phase.DONE, progress=Progress(step=40, total_steps=40, evaluations=wide))
    (folder.root / "state.json").write_text(report.model_dump_json(by_alias=True))
    text = exit_report(this, ExitReason.COMPLETED, "m" * 5000)
    assert len(text.encode()) <= MESSAGE_BYTES
    found = ExitReport.model_validate_json(text)
    assert found.final is not None and found.final.progress.step == 40 and found.step == 40
    assert 0 < len(found.final.progress.evaluations) < 16
