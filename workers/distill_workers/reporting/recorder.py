"""What is remembered of a run: each step and each evaluation, in metrics, progress and the files of the run folder."""

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distill_api.metrics import StepStage
from distill_api.spec.guards import GuardAction
from distill_api.spec.job_spec import Spec
from distill_api.status import EvaluationScore, GuardEvent, Progress
from distill_workers.evaluation.evaluator import Measurement
from distill_workers.evaluation.guards import Decision
from distill_workers.evaluation.status_entry import decimal, updated_entry
from distill_workers.reporting.bottleneck import bottleneck
from distill_workers.reporting.cost import accelerators
from distill_workers.reporting.progress import ProgressReporter, utc
from distill_workers.reporting.sample_lines import LIMIT_BYTES, picked_samples, sample_line
from distill_workers.reporting.step_line import Step, step_line
from distill_workers.run_folder.run_folder import RunFolder

log = logging.getLogger(__name__)

RECENT_STEPS = 10
"""Steps by whose durations the remaining time is estimated, and what holds them up."""
GUARD_EVENTS = 4
"""Kept in progress: they must fit a termination message together with everything else."""
EVENT_CHARACTERS = 300
GAUGES = {
    "distill_train_step": "step",
    "distill_objective_phase_number": "phase_number",
    "distill_last_step_timestamp_seconds": "time",
    "distill_reverse_kl_nats": "reverse_kl",
    "distill_policy_rollout_kl_nats": "trainer_engine_gap",
    "distill_entropy_nats": "entropy",
    "distill_loss": "loss",
    "distill_grad_norm": "grad_norm",
    "distill_learning_rate": "learning_rate",
    "distill_reverse_kl_k2_nats": "reverse_kl_k2",
    "distill_reverse_kl_k3_nats": "reverse_kl_k3",
    "distill_divergence_nats": "divergence",
    "distill_forward_kl_nats": "forward_kl",
    "distill_student_mass_ratio": "student_mass",
    "distill_teacher_mass_ratio": "teacher_mass",
    "distill_overlap_ratio": "overlap_ratio",
    "distill_coefficient": "coefficient",
    "distill_reward_coefficient": "reward_coefficient",
    "distill_importance_weight_mean": "importance_weight",
    "distill_importance_capped_ratio": "importance_capped_ratio",
    "distill_importance_gated_ratio": "importance_gated_ratio",
    "distill_sequence_masked_ratio": "sequence_masked_ratio",
    "distill_ratio_clipped_ratio": "ratio_clipped_ratio",
    "distill_advantage_clipped_ratio": "advantage_clipped_ratio",
    "distill_advantage_square_nats2": "advantage_square",
    "distill_baseline_nats": "baseline",
    "distill_reference_kl_nats": "reference_kl",
    "distill_implicit_reward_nats": "implicit_reward",
    "distill_tokens_aligned_ratio": "aligned_ratio",
    "distill_divergence_weight_mean": "divergence_weight",
    "distill_divergence_selected_ratio": "selected_ratio",
    "distill_teacher_entropy_nats": "teacher_entropy",
    "distill_forward_kl_added_ratio": "uncertain_ratio",
    "distill_truncated_ratio": "truncated_ratio",
    "distill_privileged_copied_ratio": "copied_ratio",
    "distill_policy_lag_steps": "policy_lag",
    "distill_teacher_lag_steps": "teacher_lag",
}
"""Gauges by the field of a step's line that they show."""


class Recorder:
    """Holds what later lines depend on: the stages of the step under way, and the evaluations so far."""

    def __init__(
        self, folder: RunFolder, reporter: ProgressReporter, spec: Spec, decode: Callable[[list[int]], str]
    ) -> None:
        self._folder, self._reporter, self._metrics, self._spec = folder, reporter, reporter.metrics, spec
        self._total, self._decode = spec.schedule.steps, decode
        self._stages: dict[str, float] = {}
        self._recent: list[tuple[float, dict[str, float]]] = []
        """Seconds of the last steps, and those by stage."""
        self.engines: Callable[[], int] = lambda: spec.rollout.replicas
        """How many have a place at this moment: rollout.replicas may change while the job runs."""
        self._paid_until = time.monotonic()
        self._evaluations: dict[str, EvaluationScore] = {}
        self._metrics.set("distill_train_max_steps", self._total)
        for guard in spec.guards:
            # From 0 on, or Prometheus would take the first decision for the beginning of the count.
            for action in {guard.action, GuardAction.STOP}:
                self._metrics.add("distill_guard_decisions", 0, guard=guard.name, action=action.value)

    def begin_step(self) -> None:
        """What was spent since the last step, on a checkpoint, belongs to no step."""
        self._stages = {}

    @contextmanager
    def timed(self, stage: StepStage) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.spent(stage, time.monotonic() - begin)

    def spent(self, stage: StepStage, seconds: float) -> None:
        self._stages[stage.value] = self._stages.get(stage.value, 0.0) + seconds
        self._metrics.observe("distill_step_duration_seconds", seconds, stage=stage.value)

    def step(self, step: Step) -> dict[str, Any]:
        """With the stages that were noted since `begin_step`. Returns the line of metrics.jsonl."""
        line = step_line(step, self._stages)
        self._reporter.line(line)
        self._pay()
        for why, sample in picked_samples(step.samples):
            self._folder.append("samples.jsonl", sample_line(step.number, why, sample, self._decode), LIMIT_BYTES)
        for gauge, key in GAUGES.items():
            self._metrics.set(gauge, math.nan if line[key] is None else line[key])
        self._metrics.set("distill_response_tokens_mean", line["response_tokens"] / line["samples"])
        if line["reward"] is not None:
            self._metrics.set("distill_reward_mean", line["reward"])
            self._metrics.set("distill_reward_stddev", line["reward_stddev"])
        if line["token_kl"] is not None:
            for statistic in ("mean", "p50", "p95", "max"):
                self._metrics.set("distill_token_kl_nats", line["token_kl"][statistic], statistic=statistic)
            self._metrics.set("distill_token_kl_high_ratio", line["token_kl"]["high_ratio"])
        for source, kl in line["reverse_kl_by_source"].items():
            self._metrics.set("distill_source_reverse_kl_nats", kl, source=source)
        for teacher, kl in line["reverse_kl_by_teacher"].items():
            self._metrics.set("distill_teacher_reverse_kl_nats", kl, teacher=teacher)
        for source, mean in line["reward_by_source"].items():
            self._metrics.set("distill_source_reward_mean", mean, source=source)
        self._metrics.add("distill_tokens", line["response_tokens"], kind="train")
        self._recent = [*self._recent[1 - RECENT_STEPS :], (step.seconds, line["stages"])]
        held_up = bottleneck(total([stages for _, stages in self._recent]), self._spec)
        self._reporter.progress(
            step=step.number,
            percent=100 * step.number // self._total,
            objective_phase=line["phase"],
            reverse_kl=decimal(line["reverse_kl"]),
            reward=decimal(line["reward"]),
            tokens_per_second=f"{line['response_tokens'] / step.seconds:.1f}",
            estimated_remaining_seconds=round(
                (self._total - step.number) * statistics.fmean(s for s, _ in self._recent)
            ),
            policy_lag=f"{step.policy_lag:.2f}",
            bottleneck=held_up and held_up.part,
            advice=held_up and held_up.advice,
            last_step_time=utc(line["time"]),
        )
        numbers = (step.number, self._total, decimal(line["reverse_kl"]), line["loss"], step.seconds)
        log.info("step %d/%d: reverse KL %s, loss %.4f, %.1f s", *numbers)
        return line

    def evaluation(self, measured: Measurement) -> EvaluationScore:
        """Returns the evaluation's entry in status."""
        name = measured.name
        self._evaluations[name] = updated_entry(self._evaluations.get(name), measured)
        if measured.score is not None:
            self._metrics.set("distill_evaluation_score", measured.score, evaluation=name)
        for k, estimate in measured.pass_at.items():
            self._metrics.set("distill_evaluation_pass_ratio", estimate.value, evaluation=name, k=str(k))
        if measured.reverse_kl is not None:
            self._metrics.set("distill_evaluation_reverse_kl_nats", measured.reverse_kl, evaluation=name)
        line = dataclasses.asdict(measured)
        for example in line.pop("examples"):
            entry = {"kind": "evaluation", "evaluation": name, "step": measured.step, **example}
            self._folder.append("samples.jsonl", entry, LIMIT_BYTES)
        self._reporter.line({"kind": "evaluation", "time": time.time(), **line})
        self._pay()
        self._reporter.progress(evaluations=list(self._evaluations.values()))
        numbers = (name, measured.step, decimal(measured.score), decimal(measured.reverse_kl))
        log.info("evaluation %s at step %d: score %s, reverse KL %s", *numbers)
        return self._evaluations[name]

    def guard(self, decision: Decision, step: int, coefficient_factor: float) -> None:
        """What a guard decided; `step` is where the run goes on from."""
        now = time.time()
        self._metrics.add("distill_guard_decisions", guard=decision.guard, action=decision.action.value)
        # Of step `step`, so that it stays when the lines of later steps go.
        at = {"kind": "guard", "step": step, "time": now, "at_step": decision.step, "action": decision.action.value}
        line = {**at, "guard": decision.guard, "message": decision.message, "coefficient_factor": coefficient_factor}
        self._reporter.line(line)
        event = GuardEvent(
            guard=decision.guard,
            step=decision.step,
            action=decision.action.value,
            message=decision.message[:EVENT_CHARACTERS],
            time=utc(now),
        )
        events = [*self._reporter.report.progress.guard_events, event][-GUARD_EVENTS:]
        self._reporter.progress(guard_events=events)
        log.warning("guard %s, %s: %s", decision.guard, decision.action.value, decision.message)

    def weights(self, version: int) -> None:
        self._metrics.set("distill_weight_version", version)
        self._reporter.progress(weight_version=version)

    def checkpoint(self, step: int) -> None:
        self._metrics.set("distill_checkpoint_last_success_timestamp_seconds", time.time())
        self._reporter.progress(checkpoint_step=step)

    def _pay(self) -> None:
        """Every part holds its accelerators all the time, whoever waits for whom. Engines that came or went since the
        last payment count as if they had done so then."""
        now = time.monotonic()
        for part, count in accelerators(self._spec, self.engines()).items():
            self._metrics.add("distill_accelerator_seconds", count * (now - self._paid_until), part=part)
        self._paid_until = now

    def best_step(self) -> int | None:
        """By the first evaluation."""
        return next((e.best_step for e in self._evaluations.values()), None)

    def evaluated(self, step: int) -> bool:
        """Whether the newest evaluations are those of `step`."""
        return {e.step for e in self._evaluations.values()} == {step}

    def state(self) -> dict[str, Any]:
        return {"progress": self._reporter.report.progress.model_dump(mode="json", by_alias=True)}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Forgets what came after the checkpoint: those steps are done, and written, again."""
        # At step 0 nothing is trained: its evaluation is made, and written, again.
        self._folder.trim(step or -1)
        self._restore_progress(Progress.model_validate(state["progress"]), step)

    def rolled_back(self, state: dict[str, Any], step: int) -> None:
        """Progress is that of the checkpoint again; what guards did stays known."""
        restored = Progress.model_validate(state["progress"])
        events = self._reporter.report.progress.guard_events
        self._restore_progress(restored.model_copy(update={"guard_events": events}), step)
        self._metrics.set("distill_train_step", step)

    def restore_end(self, state: dict[str, Any]) -> None:
        """Progress is that of a run that has ended: no line of it is written again."""
        restored = Progress.model_validate(state["progress"])
        self._restore_progress(restored, restored.step, restored.checkpoint_step)

    def _restore_progress(self, restored: Progress, step: int, checkpoint_step: int | None = None) -> None:
        self._evaluations = {e.name: e for e in restored.evaluations}
        newest = step if checkpoint_step is None else checkpoint_step
        known = {"total_steps": self._total, "percent": 100 * step // self._total, "checkpoint_step": newest}
        self._reporter.update(progress=restored.model_copy(update=known))


def total(steps: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of several steps by stage."""
    return {stage: sum(one.get(stage, 0.0) for one in steps) for stage in {stage for one in steps for stage in one}}
