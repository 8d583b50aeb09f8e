"""How far a run has come."""

from dataclasses import dataclass
from typing import Any


@dataclass
class RunState:
    """The step that a run has reached, and the prompts that it has used up by then: what a checkpoint is of."""

    cursor: dict[str, Any]
    """State of the prompt cursor after the batches of `step` steps; the cursor itself may be ahead."""
    step: int = 0
    """Optimiser steps done, which is the version of the weights."""
