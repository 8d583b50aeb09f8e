"""Queueing of a job or a Teacher by Kueue, as far as others than its Workload tell; and why a job is suspended."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from distill_api.status import Reason
from distill_operator.model.conditions import ConditionValue
from distill_operator.model.pod_sets import Placement


@dataclass(frozen=True)
class Priority:
    """The order of a Workload among those of its queue."""

    group: str
    kind: str
    name: str
    value: int


@dataclass(frozen=True)
class Queueing:
    """The queue that an owner names, and what Kueue's other objects say."""

    queue: str = ""
    """Name of the LocalQueue; empty where the owner names none."""
    max_seconds: int | None = None
    """How long Kueue lets it be admitted."""
    priority: Priority | None = None
    placements: Mapping[str, Placement] = field(default_factory=dict)
    """What the admission adds to the pods, by the name of the pod set; empty while nothing is admitted."""
    obstacle: ConditionValue | None = None
    """Why it cannot be queued, or its admission not be carried out."""


@dataclass(frozen=True)
class Suspension:
    """Why a job is to have no pod."""

    reason: Reason
    """Of the summary."""
    message: str
    releasing: str
    """The message while pods are still there."""


BY_USER = Suspension(
    Reason.SUSPENDED,
    "spec.suspend is true: every pod is released, checkpoints stay",
    "spec.suspend is true, and pods are still there: status.active says how many",
)
