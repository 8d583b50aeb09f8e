"""Copies of the numbers, with the real packages: TensorBoard's files, W&B offline, MLflow in a folder."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from runs import arithmetic

from distill_api.job import DistillationJob, parse_job
from distill_workers.metrics import Metrics
from distill_workers.reporting import trackers
from distill_workers.reporting.progress import ProgressReporter
from distill_workers.reporting.trackers import Trackers, scalars
from distill_workers.run_folder.run_folder import RunFolder

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first import of a tracker may take longer on a busy machine than it is given at the end of a run."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 100.0)


def step(number: int, **numbers: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "time": 1e9 + number, "reverse_kl": 1.0 / number, **numbers}


def evaluation(number: int, score: float) -> dict[str, Any]:
    return {"kind": "evaluation", "name": "heldout", "step": number, "time": 1e9 + number, "score": score}


def job(folder: Path, **tracking: Any) -> DistillationJob:
    return parse_job(arithmetic(folder, "tracked", tracking={"tensorboard": False, **tracking}))


def written(of: DistillationJob, folder: Path, *lines: dict[str, Any]) -> Metrics:
    """As one attempt does."""
    metrics = Metrics()
    folder.mkdir(exist_ok=True)
    copies = Trackers(of, folder, metrics)
    for line in lines:
        copies.put(line)
    copies.close()
    return metrics


def errors(metrics: Metrics, tracker: str) -> float:
    return metrics.registry.get_sample_value("distill_tracker_errors_total", {"tracker": tracker}) or 0.0


def test_a_line_is_its_numbers_by_name() -> None:
    nested = {"token_kl": {"p95": 2.0}, "reward": None, "loss": float("nan"), "stages": {"rollout": 0.5}}
    named = {"reward_by_source": {"math, hard": 1}}
    assert scalars(step(4, **nested, **named)) == {
        "train/reverse_kl": 0.25,
        "train/token_kl/p95": 2.0,
        "train/stages/rollout": 0.5,
        "train/reward_by_source/math_ hard": 1.0,
    }
    assert scalars(evaluation(4, 0.5)) == {"evaluation/heldout/score": 0.5}
    assert scalars({"kind": "guard", "step": 4, "time": 0.0, "coefficient_factor": 0.5}) == {}


def events(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            # A TFRecord: length, its checksum, data, its checksum.
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(v.tag, event.step, round(v.simple_value, 4)) for v in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_has_the_curve_in_the_run_folder(tmp_path: Path) -> None:
    metrics = written(job(tmp_path, tensorboard=True), tmp_path, step(1), step(2), evaluation(2, 0.5))
    assert events(tmp_path) == [
        ("train/reverse_kl", 1, 1.0),
        ("train/reverse_kl", 2, 0.5),
        ("evaluation/heldout/score", 2, 0.5),
    ]
    assert errors(metrics, "tensorboard") == 0


async def test_what_the_reporter_is_told_is_written_by_the_time_it_is_closed(tmp_path: Path) -> None:
    of = job(tmp_path, tensorboard=True)
    folder, metrics = RunFolder(of), Metrics()
    folder.claim()
    reporter = ProgressReporter(folder, metrics, 40, Trackers(of, folder.root, metrics))
    for line in (step(1), {"kind": "guard", "step": 1, "time": 0.0}, evaluation(1, 0.5)):
        reporter.line(line)
    await reporter.close()
    assert [tag for tag, *_ in events(folder.root)] == ["train/reverse_kl", "evaluation/heldout/score"]
    assert len((folder.root / "metrics.jsonl").read_text().splitlines()) == 3


def test_mlflow_has_one_run_over_all_attempts(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"file://{tmp_path}/mlruns"
    of = job(tmp_path, mlflow={"uri": uri, "experiment": "distillation"})
    for attempt in ((step(1), step(2), evaluation(2, 0.5)), (step(3),)):
        assert errors(written(of, tmp_path / "run", *attempt), "mlflow") == 0
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("distillation")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tracked" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/reverse_kl")
    assert [(m.step, round(m.value, 4)) for m in history] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert run.data.metrics["evaluation/heldout/score"] == 0.5
    assert run.data.params["student"].endswith("arithmetic/student")


def test_wandb_without_a_key_keeps_the_run_offline_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    metrics = written(job(tmp_path, wandb={"project": "distillation"}), tmp_path, step(1), step(2))
    assert errors(metrics, "wandb") == 0
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [file] = run.glob("*.wandb")
    # W&B's own process writes the file, on a busy machine a little after the run has ended for us.
    end = time.monotonic() + 60
    while b"train/reverse_kl" not in (kept := file.read_bytes()) and time.monotonic() < end:
        time.sleep(0.1)
    assert b"train/reverse_kl" in kept and b"distillation" in kept and b"tracked" in kept


def test_a_tracker_that_cannot_be_reached_is_counted_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    of = job(tmp_path, tensorboard=True, mlflow={"uri": f"file://{tmp_path}/file/mlruns", "experiment": "e"})
    with caplog.at_level(logging.WARNING):
        metrics = written(of, tmp_path, *(step(number) for number in range(1, 6)))
    assert errors(metrics, "mlflow") == 5 and errors(metrics, "tensorboard") == 0
    assert len(events(tmp_path)) == 5, "the others go on"
    [said] = [r.getMessage() for r in caplog.records if r.name == "distill_workers.reporting.trackers"]
    assert "tracker mlflow fails, which ends nothing" in said


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung_seconds = 100

    class Hanging:
        def __init__(self, *_: Any) -> None:
            time.sleep(hung_seconds)

    monkeypatch.setattr(trackers, "TensorBoard", Hanging)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "WAITING_LINES", 3)
    begin = time.monotonic()
    metrics = written(job(tmp_path, tensorboard=True), tmp_path, *(step(number) for number in range(1, 10)))
    assert time.monotonic() - begin < hung_seconds, "nobody waited for it"
    assert errors(metrics, "tensorboard") >= 5


def test_a_run_of_a_job_keeps_its_name_elsewhere_whatever_its_attempt(tmp_path: Path) -> None:
    manifest = json.loads(json.dumps(arithmetic(tmp_path, "tracked")))
    manifest["metadata"]["uid"] = "5f0c0a54"
    named = parse_job(manifest)
    assert trackers.run_id(named, tmp_path / "a") == trackers.run_id(named, tmp_path / "b")
    assert trackers.run_id(job(tmp_path), tmp_path / "a") != trackers.run_id(job(tmp_path), tmp_path / "b")
