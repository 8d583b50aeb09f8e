"""The step's metrics, and its line of metrics.jsonl."""

import statistics

from distill_workers.reporting.recorder import Recorder
from distill_workers.reporting.step_line import ObjectivePhase, Step
from distill_workers.run.callbacks.base import TrainStep


class MetricsCallback:
    """Records every step that is done."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def after_step(self, step: TrainStep) -> None:
        assert step.batch is not None  # a step that is done had one
        longest = step.batch.longest
        share = longest.environment_share if longest is not None else 0.0
        for stage, seconds in step.clock.stages(step.batch.generated_at, share).items():
            self._recorder.spent(stage, seconds)
        lag = statistics.fmean(step.index - sample.weight_version for sample in step.samples)
        phase = None if step.phase is None else ObjectivePhase(step.phase, step.coefficients.phase + 1)
        scored = [step.index - s.teacher_version for s in step.samples if s.teacher_version is not None]
        teacher_lag = statistics.fmean(scored) if scored else None
        done = Step(
            step.index + 1, step.samples, step.stats, lag, step.clock.seconds, phase=phase, teacher_lag=teacher_lag
        )
        step.line = self._recorder.step(done)
