"""The control of a job: the same job with a teacher that teaches nothing, and the rule of an objective for it."""

from enum import StrEnum
from typing import Any

from distill_api.rules import Rule


class Control(StrEnum):
    NONE = "none"
    FIXED_ADVANTAGE = "fixed-advantage"


# A sequence of the data set has no policy gradient, and so nothing that a fixed advantage could weigh.
ON_POLICY = Rule(
    "control goes with datasetShare 0 only, but for phases of support target and datasetResponses row: a fixed "
    "advantage is of the student's own samples",
    "self.control == 'none' || self.datasetShare == 0.0",
    lambda o: o.control is Control.NONE or o.dataset_share == 0,
)
"""The rule of an objective."""

ON_POLICY_OF_PHASE = Rule(
    ON_POLICY.message,
    "self.control == 'none' || self.datasetShare == 0.0 || "
    "(self.support == 'target' && self.datasetResponses == 'row')",
    lambda o: ON_POLICY.holds(o) or without_teacher(o),
)
"""The rule of a phase's objective: a phase without a teacher is the same in the job and in its control."""


def without_teacher(objective: Any) -> bool:
    """Return whether nothing of a teacher is in an objective's loss: it is the cross-entropy of the data set's rows."""
    return bool(objective.support == "target" and objective.dataset_responses == "row")
