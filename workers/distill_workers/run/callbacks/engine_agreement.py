"""Whether the engines follow the trainer, which no check before the first step can see: nothing has changed yet."""

from distill_api.spec.job_spec import Spec
from distill_workers.failures import PreflightFailed
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.preflight.student import TOLERANCE_NATS

FIRST_STEPS = 10
"""Steps that are looked at. Later ones are a matter for monitoring (distill_policy_rollout_kl_nats)."""


class EngineAgreementCallback:
    """Ends a run whose engines sample with other weights than the trainer has after its first updates.

    An adapter that is merged by another scale than it is trained with, or a part of the weights that no push brings,
    is right before the first update and wrong after it.
    """

    def __init__(self, spec: Spec) -> None:
        self._tolerance = TOLERANCE_NATS[spec.dtype]

    async def after_step(self, step: TrainStep) -> None:
        """Raises PreflightFailed. Samples of older weights differ for good reason: their step is not looked at."""
        if step.index >= FIRST_STEPS or any(v != step.index for s in step.samples for v in s.token_versions):
            return
        gap = step.stats.get("trainer_engine_gap", 0.0)
        if not gap <= self._tolerance:
            raise PreflightFailed(
                f"EngineFollowsTrainer: after {step.index} steps trainer and engine log-probabilities of the same "
                f"tokens differ by {gap:.4f} nats on average (allowed {self._tolerance}), though they agreed before "
                "the first; what the engines are sent is not what is trained: see trainer.lora and trainer.weightSync"
            )
