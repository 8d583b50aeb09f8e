"""Copies of what metrics.jsonl holds for TensorBoard, Weights & Biases and MLflow, as spec.tracking asks.

Each has a thread of its own, since a server that does not answer must cost no step. What cannot be written is dropped,
counted in distill_tracker_errors and logged once: a tracker never ends a run.
"""

import hashlib
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from distill_api.job import DistillationJob
from distill_api.protocol import Variable
from distill_workers.metrics import Metrics

log = logging.getLogger(__name__)

Line = Mapping[str, Any]
WAITING_LINES = 1000
RETRY_SECONDS = 300.0
"""After which one that could not be opened is opened again."""
CLOSE_SECONDS = 20.0
"""For all of them together to write what is left."""


class Tracker(Protocol):
    """An open run somewhere. Raises whatever its package does."""

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """`seconds` is Unix time."""

    def close(self) -> None: ...


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name: train/reverse_kl, train/stages/rollout, evaluation/NAME/score."""
    kind = line["kind"]
    if kind not in ("step", "evaluation"):
        return {}
    begin = "train" if kind == "step" else f"evaluation/{line['name']}"
    left_out = {"kind", "name", "step", "time"}
    return dict(_numbers(begin, {key: value for key, value in line.items() if key not in left_out}))


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in _numbers(f"{name}/{key}", inner)]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        # The narrowest of the three is MLflow.
        return [(re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII), float(value))]
    return []


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        # A resumed run writes steps again: those of the killed one are not shown.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step, flush_secs=10)

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run over all attempts. Without a key it is offline, in the run folder."""

    def __init__(self, job: DistillationJob, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = job.spec.tracking.wandb
        assert settings is not None
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=job.metadata.name,
            id=run_id(job, folder),
            resume="allow",
            mode=None if os.environ.get(Variable.WANDB_KEY) else "offline",
            dir=str(folder),
            config=job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own step may not go back, and that of a run that is resumed or rolled back does.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        self._run.log({"step": step, "_timestamp": seconds, **values})

    def close(self) -> None:
        self._run.finish()


class MLflowRun:
    """One run over all attempts, found again by a tag."""

    def __init__(self, job: DistillationJob, folder: Path) -> None:
        settings = job.spec.tracking.mlflow
        assert settings is not None
        if settings.uri.startswith("file:"):
            # MLflow would rather have a database, and refuses a folder that is not asked for twice.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=settings.uri)
        found = self._client.get_experiment_by_name(settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(settings.experiment)
        mark = run_id(job, folder)
        runs = self._client.search_runs([experiment], f"tags.distillation_run = '{mark}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"distillation_run": mark, "namespace": job.metadata.namespace}
            self._id = self._client.create_run(experiment, tags=tags, run_name=job.metadata.name).info.run_id
            for name, value in (
                ("student", job.spec.student.model),
                ("teacher", ", ".join(t.title for t in job.spec.routed_teachers)),
            ):
                self._client.log_param(self._id, name, value)

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        at = int(1000 * seconds)
        self._client.log_batch(self._id, metrics=[Metric(name, value, at, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def run_id(job: DistillationJob, folder: Path) -> str:
    """The same in every attempt: of the job's uid, or of the folder where no cluster gave one."""
    return hashlib.sha256((job.metadata.uid or str(folder.resolve())).encode()).hexdigest()[:16]


class Background:
    """A tracker behind a queue: `put` never waits and never raises."""

    def __init__(self, name: str, opened: Callable[[int], Tracker], metrics: Metrics) -> None:
        self._name, self._opened, self._metrics = name, opened, metrics
        self._tracker: Tracker | None = None
        self._open_again = 0.0
        self._complained = False
        self._lines: queue.Queue[Line | None] = queue.Queue(WAITING_LINES)
        metrics.add("distill_tracker_errors", 0, tracker=name)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, line: Line) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._failed(f"{WAITING_LINES} lines wait to be written")

    def finish(self) -> None:
        """No line comes after this."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            self._failed("what waits to be written is lost")

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failed("it did not end in time")

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
            except Exception as error:
                self._failed(f"{type(error).__name__}: {error}")
        try:
            if self._tracker is not None:
                self._tracker.close()
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _write(self, line: Line) -> None:
        if self._tracker is None:
            if time.monotonic() < self._open_again:
                raise ConnectionError("it could not be opened")
            self._open_again = time.monotonic() + RETRY_SECONDS
            self._tracker = self._opened(line["step"])
        self._tracker.write(line["step"], line["time"], scalars(line))

    def _failed(self, why: str) -> None:
        self._metrics.add("distill_tracker_errors", tracker=self._name)
        if not self._complained:
            self._complained = True
            log.warning("tracker %s fails, which ends nothing; distill_tracker_errors counts on: %s", self._name, why)


class Trackers:
    """All that a job asks for."""

    def __init__(self, job: DistillationJob, folder: Path, metrics: Metrics) -> None:
        settings = job.spec.tracking
        ways: dict[str, Callable[[int], Tracker]] = {}
        if settings.tensorboard:
            ways["tensorboard"] = lambda step: TensorBoard(folder, step)
        if settings.wandb is not None:
            ways["wandb"] = lambda step: WeightsAndBiases(job, folder)
        if settings.mlflow is not None:
            ways["mlflow"] = lambda step: MLflowRun(job, folder)
        self._all = [Background(name, way, metrics) for name, way in ways.items()]

    def put(self, line: Line) -> None:
        """A line of metrics.jsonl."""
        for one in self._all if line["kind"] in ("step", "evaluation") else ():
            one.put(line)

    def close(self) -> None:
        """Waits for what is left to be written, but not for long."""
        end = time.monotonic() + CLOSE_SECONDS
        for one in self._all:
            one.finish()
        for one in self._all:
            one.join(max(0.0, end - time.monotonic()))
