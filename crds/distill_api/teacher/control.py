"""The control of a job: the same job with a teacher that teaches nothing, and the rule of an objective for it."""

from enum import StrEnum

from distill_api.rules import Rule


class Control(StrEnum):
    NONE = "none"
    FIXED_ADVANTAGE = "fixed-advantage"


# A sequence of the data set has no policy gradient, and so nothing that a fixed advantage could weigh.
ON_POLICY = Rule(
    "control goes with datasetShare 0 only: a fixed advantage is of the student's own samples",
    "self.control == 'none' || self.datasetShare == 0.0",
    lambda o: o.control is Control.NONE or o.dataset_share == 0,
)
"""The rule of an objective."""
