"""Phases: an evaluation that has flattened ends one."""

from distill_workers.objective.phases import Phases
from distill_workers.run.callbacks.base import TrainStep


class PhaseCallback:
    """Shows the phases what was measured, before a guard may send the run back, and before a checkpoint is made."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    async def before_update(self, step: TrainStep) -> None:
        """The step keeps its phase: what is decided is of steps whose batches have no prompts yet."""
        for entry in step.evaluations:
            self._phases.after_evaluation(entry)
