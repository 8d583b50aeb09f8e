"""Guards: bounds on measured values, and the action where one is broken: stop, lower the coefficient, or roll back."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import Rule, matching

GuardName = Annotated[
    str,
    Field(max_length=40),
    matching(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "must be lower-case letters, digits and dashes, with no dash at an end"
    ),
]
Limit = Annotated[float, Field(gt=0, le=1_000_000)]


class Watch(StrEnum):
    REVERSE_KL = "reverse-kl"
    """The mean reverse KL over the response tokens of a step, in nats."""
    ENTROPY = "entropy"
    """The mean entropy of the student over the response tokens of a step, in nats."""
    RESPONSE_LENGTH = "response-length"
    """The mean length of the responses of a step, in tokens."""
    EVALUATION = "evaluation"
    """The score of an evaluation; or, of one without a score, its reverse KL, where more is worse."""


class GuardAction(StrEnum):
    LOWER_COEFFICIENT = "lower-coefficient"
    ROLL_BACK = "roll-back"
    STOP = "stop"


_BOUNDS = ("above", "below", "aboveRatio", "belowRatio")


class Guard(Model):
    """A bound on a measured value of the training, and the action where it is broken."""

    rules = (
        Rule(
            "evaluation and drop go with watch evaluation, and only with it",
            "(self.watch == 'evaluation') == has(self.evaluation) && (self.watch == 'evaluation') == has(self.drop)",
            lambda g: (g.watch is Watch.EVALUATION) == (g.evaluation is not None) == (g.drop is not None),
        ),
        Rule(
            "watch reverse-kl, entropy and response-length need above, below, aboveRatio or belowRatio, "
            "and watch evaluation takes none of them",
            f"(self.watch != 'evaluation') == ({' || '.join(f'has(self.{bound})' for bound in _BOUNDS)})",
            lambda g: (
                (g.watch is not Watch.EVALUATION)
                == any(bound is not None for bound in (g.above, g.below, g.above_ratio, g.below_ratio))
            ),
        ),
        Rule(
            "below must be less than above",
            "!has(self.above) || !has(self.below) || self.below < self.above",
            lambda g: g.above is None or g.below is None or g.below < g.above,
        ),
        Rule(
            "factor goes with action lower-coefficient only",
            "self.action == 'lower-coefficient' || self.factor == 0.5",
            lambda g: g.action is GuardAction.LOWER_COEFFICIENT or g.factor == 0.5,
        ),
        Rule(
            "maxTimes goes with action lower-coefficient or roll-back only: stop acts once",
            "self.action != 'stop' || self.maxTimes == 3",
            lambda g: g.action is not GuardAction.STOP or g.max_times == 3,
        ),
    )
    name: GuardName = Field(
        description="Name of the guard in Events and metrics: lower-case letters, digits and dashes."
    )
    watch: Watch = Field(
        description="Value that is watched: reverse-kl or entropy (nats per token, mean of a step), response-length "
        "(tokens, mean of a step), or the score of an evaluation.",
    )
    above: Limit | None = Field(None, description="Upper bound of the value; by default none.")
    below: Limit | None = Field(None, description="Lower bound of the value; by default none.")
    above_ratio: Annotated[float, Field(gt=1, le=1000)] | None = Field(
        None, description="Upper bound as a multiple of the lowest median of window steps so far; by default none."
    )
    below_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Lower bound as a share of the highest median of window steps so far; by default none."
    )
    window: Annotated[int, Field(ge=1, le=1000)] = Field(
        20,
        description="Optimiser steps of a median; aboveRatio and belowRatio apply once the first window is complete.",
    )
    evaluation: GuardName | None = Field(None, description="Name of the evaluation whose score is watched.")
    drop: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None,
        description="Upper bound of the drop of the score below its best; of an evaluation without a score, of the "
        "rise of its reverse KL above its lowest.",
    )
    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="Number of steps, or evaluations, out of bounds in a row before the guard acts."
    )
    action: GuardAction = Field(
        GuardAction.STOP,
        description="Action of the guard. stop: export the best checkpoint and end the run; lower-coefficient: "
        "multiply objective.coefficient by factor; roll-back: continue from the best checkpoint with the next prompts.",
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Factor by which lower-coefficient multiplies, each time the guard acts."
    )
    max_times: Annotated[int, Field(ge=1, le=100)] = Field(
        3,
        description="Upper bound of how often the guard lowers the coefficient or rolls back in a run; after that it "
        "stops the run.",
    )
