"""Guards: what ends, softens or takes back a training that goes wrong, decided by numbers that are measured anyway."""

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
    """Mean over the step's response tokens, nats."""
    ENTROPY = "entropy"
    """Of the student, mean over the step's response tokens, nats."""
    RESPONSE_LENGTH = "response-length"
    """Mean of the step's responses, tokens."""
    EVALUATION = "evaluation"
    """Score of an evaluation; the reverse KL of one that has no score, where more is worse."""


class GuardAction(StrEnum):
    LOWER_COEFFICIENT = "lower-coefficient"
    ROLL_BACK = "roll-back"
    STOP = "stop"


_BOUNDS = ("above", "below", "aboveRatio", "belowRatio")


class Guard(Model):
    """One thing that must not happen to the training, and what is done when it does."""

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
    )
    name: GuardName = Field(description="Name in events and metrics: lower-case letters, digits and dashes.")
    watch: Watch = Field(
        description="reverse-kl or entropy (nats per token), response-length (tokens, mean of the step), evaluation."
    )
    above: Limit | None = Field(None, description="Out of bounds above this value.")
    below: Limit | None = Field(None, description="Out of bounds below this value.")
    above_ratio: Annotated[float, Field(gt=1, le=1000)] | None = Field(
        None, description="Out of bounds above so many times the lowest median that window steps have had so far."
    )
    below_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Out of bounds below this share of the highest median that window steps have had so far."
    )
    window: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="Steps of a median; the ratios hold from the first whole window on."
    )
    evaluation: GuardName | None = Field(None, description="Name of the evaluation that is watched.")
    drop: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None,
        description="Out of bounds when the score is more than this below its best; without a score, the KL above.",
    )
    patience: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="Steps, or evaluations, out of bounds in a row before the guard acts."
    )
    action: GuardAction = Field(
        GuardAction.STOP,
        description="stop: export the best checkpoint and end; lower-coefficient: multiply objective.coefficient by "
        "factor; roll-back: go on from the best checkpoint with the prompts that come next.",
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="What lower-coefficient multiplies by, each time."
    )
    max_times: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="Times that the guard lowers or rolls back in a run; the time after that it stops the run."
    )
