"""The schedule of a run: its length, the periods of checkpoints and evaluations, and what becomes of a stalled one; and
the schedule of a coefficient."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from distill_api.base import Model
from distill_api.rules import Rule


class StallPolicy(StrEnum):
    """What becomes of an attempt that has stalled."""

    RESTART = "Restart"
    """It ends, and the next one goes on from the last checkpoint."""
    REPORT = "Report"
    """The condition Stalled says so, and it goes on."""


class Schedule(Model):
    """The length of the run, and the periods of checkpoints and evaluations, in optimiser steps."""

    rules = (
        Rule(
            "keepEvery must be a multiple of checkpointEverySteps: there is no checkpoint between them",
            "!has(self.keepEvery) || self.keepEvery % self.checkpointEverySteps == 0",
            lambda s: s.keep_every is None or s.keep_every % s.checkpoint_every_steps == 0,
        ),
    )
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(description="Number of optimiser steps of the run.")
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        20, description="Period of checkpoints in optimiser steps."
    )
    keep_last: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="Number of newest checkpoints that are kept; older ones are deleted."
    )
    keep_best: bool = Field(
        True,
        description="Checkpoint at once at a new best step by the first evaluation, and keep that checkpoint until a "
        "better one.",
    )
    keep_every: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None,
        description="Period, in optimiser steps, of checkpoints that are never deleted: a multiple of "
        "checkpointEverySteps. Absent keeps none.",
    )
    evaluate_every_steps: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        20, description="Period of evaluations in optimiser steps; step 0 and the last step are always evaluated."
    )


class Decay(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class CoefficientSchedule(Model):
    """Schedule of a coefficient: it changes from its own value to another over the first steps."""

    rules = (
        Rule(
            "steps goes with decay linear or cosine, and only with them",
            "(self.decay == 'constant') == !has(self.steps)",
            lambda schedule: (schedule.decay is Decay.CONSTANT) == (schedule.steps is None),
        ),
    )
    decay: Decay = Field(Decay.CONSTANT, description="Shape of the change: constant, linear or cosine.")
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = Field(
        None, description="Optimiser steps until endValue is reached; it is constant from then on."
    )
    end_value: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="Value of the coefficient after steps optimiser steps."
    )
