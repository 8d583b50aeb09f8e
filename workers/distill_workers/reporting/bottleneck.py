"""What holds the steps up, by the measured seconds of their stages, and what to change about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distill_api.metrics import StepStage
from distill_api.spec.job_spec import Recompute, Spec, WeightSync
from distill_api.teacher.student import engines_score

PARTS = {
    StepStage.ROLLOUT: "rollout",
    StepStage.ENVIRONMENT: "environment",
    StepStage.TEACHER_SCORE: "teacher",
    StepStage.TRAIN: "trainer",
    StepStage.WEIGHT_SYNC: "sync",
}
"""The part of the system that a stage waits for. A checkpoint or an evaluation is wanted, and holds nothing up."""


@dataclass(frozen=True)
class Bottleneck:
    part: str
    """rollout, environment, teacher, trainer or sync."""
    share: float
    """Of the seconds of these stages, 0 to 1."""
    advice: str
    """One sentence: what takes how much of the step, and what to change."""


def bottleneck(seconds: Mapping[str, float], spec: Spec) -> Bottleneck | None:
    """The stage with most of the seconds (by stage, of one step or several); None before any is measured."""
    spent = {part: seconds.get(stage.value, 0.0) for stage, part in PARTS.items()}
    total = sum(spent.values())
    if total <= 0:
        return None
    part = max(spent, key=lambda one: spent[one])
    share = spent[part] / total
    what, change = ADVICE[part](spec)
    return Bottleneck(part, share, f"{part}: {what} {100 * share:.0f} % of the step; {change}")


def _rollout(spec: Spec) -> tuple[str, str]:
    what = "the trainer waits for the engines"
    if spec.deterministic:
        return what, "deterministic draws one response at a time: leave it off where the last bit does not matter"
    if spec.rollout.max_policy_lag == 0:
        return what, "raise rollout.replicas, or set rollout.maxPolicyLag 1 so that they draw while it trains"
    if not spec.rollout.partial:
        return what, "raise rollout.replicas, or set rollout.partial so that no response is waited for"
    return what, "raise rollout.replicas, or lower rollout.maxResponseTokens"


def _environment(spec: Spec) -> tuple[str, str]:
    what = "the trainer waits for rollout.environment"
    if spec.rollout.max_policy_lag == 0 and not spec.deterministic:
        return what, "make reset and step faster, or set rollout.maxPolicyLag 1 so that they answer while it trains"
    return what, "make reset and step faster, or lower rollout.environment.maxTurns; more engines do not help"


def _teacher(spec: Spec) -> tuple[str, str]:
    what = "the trainer waits for scores"
    if engines_score(spec):
        return what, "the engines give them (teacher.student): raise rollout.replicas, or rollout.maxConcurrentRequests"
    if not spec.live_teachers:
        return what, "they are stored, and read from the output volume (output.path): use one that answers faster"
    if spec.deterministic:
        return what, "deterministic scores one response at a time: leave it off where the last bit does not matter"
    return what, "raise teacher.replicas, or teacher.maxConcurrentRequests while SGLang's queue there is empty"


def _trainer(spec: Spec) -> tuple[str, str]:
    what = "forward and backward take"
    if spec.trainer.recompute is Recompute.FULL:
        return what, "set trainer.recompute selective if memory allows, or raise trainer.gpusPerNode or nodes"
    return what, "raise trainer.gpusPerNode or nodes, or trainer.maxTokensPerMicroBatch while memory is left"


def _sync(spec: Spec) -> tuple[str, str]:
    what = "handing weights to the engines takes"
    if spec.trainer.weight_sync is WeightSync.DISK:
        return what, "set trainer.weightSync distributed, or use a faster volume"
    return what, "raise rollout.promptsPerStep, so that a step is worth the hand-over, or use fewer rollout.replicas"


ADVICE: dict[str, Callable[[Spec], tuple[str, str]]] = {
    "rollout": _rollout,
    "environment": _environment,
    "teacher": _teacher,
    "trainer": _trainer,
    "sync": _sync,
}
"""What is waited for, and what to change, by part."""
