"""What a metric is, and the stages of a step by which one is labelled."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """A metric; `name` is without the suffix _total that a counter is exposed with."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


STEP_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
PHASE_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400, 604800)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class StepStage(StrEnum):
    """A stage of an optimiser step: the label `stage` of distill_step_duration_seconds."""

    ROLLOUT = "rollout"
    """Waiting for the samples of the step: the generation that did not overlap with training."""
    ENVIRONMENT = "environment"
    """The part of that wait in which rollout.environment answered: its share of the conversation that took longest,
    counted from when that had a process to run in."""
    TEACHER_SCORE = "teacher_score"
    """Waiting for scores after the last sample of the step was generated."""
    TRAIN = "train"
    WEIGHT_SYNC = "weight_sync"
    CHECKPOINT = "checkpoint"
    EVALUATE = "evaluate"
    """Waiting for an evaluation after the gradient of the next step was complete."""


def scraped_name(metric: Metric) -> str:
    """Return the name of a metric as it is scraped: that of a counter ends in _total."""
    return f"{metric.name}_total" if metric.kind is Kind.COUNTER else metric.name
