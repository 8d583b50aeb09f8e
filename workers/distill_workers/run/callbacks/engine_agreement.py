"""Whether the engines follow the trainer, which no check before the first step can see: nothing has changed yet."""

from distill_api.spec.job_spec import Spec
from distill_workers.data.cursor import Cursor
from distill_workers.failures import PreflightFailed
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.run.callbacks.base import TrainStep
from distill_workers.run.preflight.student import TOLERANCE_NATS, engine_matches_trainer, probe
from distill_workers.run.trainer_ranks import TrainerRanks

FIRST_STEPS = 10
"""Steps that are looked at. Later ones are a matter for monitoring (distill_policy_rollout_kl_nats)."""
ADVICE = "what the engines are sent is not what is trained: see trainer.lora and trainer.weightSync"


class EngineAgreementCallback:
    """Ends a run whose engines sample with other weights than the trainer has after its first updates.

    An adapter that is merged by another scale than it is trained with, or a part of the weights that no push brings,
    is right before the first update and wrong after it. The samples of a step show it; with maxPolicyLag they are of
    older weights, and a first phase may have the data set's responses alone: then a probe is sampled and computed once,
    after the last of the first steps.
    """

    def __init__(self, spec: Spec, engines: EnginePool, cursor: Cursor, trainer: TrainerRanks) -> None:
        self._spec, self._tolerance = spec, TOLERANCE_NATS[spec.dtype]
        self._engines, self._cursor, self._trainer = engines, cursor, trainer
        self._compared = False
        """Whether this attempt has seen a step of the student's own samples, of the newest weights."""

    async def after_step(self, step: TrainStep) -> None:
        """Raises PreflightFailed. Samples of older weights differ for good reason: their step is not looked at."""
        done, last = step.index + 1, min(FIRST_STEPS, self._spec.schedule.steps)
        if done <= FIRST_STEPS and all(v == step.index for s in step.samples for v in s.token_versions):
            self._compare(step.index, step.stats.get("trainer_engine_gap"))
        # A first phase on the data set's responses has no samples of the engines to compare.
        if done == last and (self._spec.rollout.max_policy_lag > 0 or (self._spec.phases and not self._compared)):
            await self._probe(done)

    def _compare(self, steps: int, gap: float | None) -> None:
        if gap is None:
            return
        self._compared = True
        if not gap <= self._tolerance:
            raise PreflightFailed(
                f"EngineFollowsTrainer: after {steps} steps trainer and engine log-probabilities of the same "
                f"tokens differ by {gap:.4f} nats on average (allowed {self._tolerance}), though they agreed before "
                f"the first; {ADVICE}"
            )

    async def _probe(self, steps: int) -> None:
        """Compare the two as before the first step: no weights change until this callback has ended."""
        try:
            samples = await probe(self._spec, self._engines, self._cursor)
            await engine_matches_trainer(self._spec, samples, self._trainer)
        except PreflightFailed as error:
            raise PreflightFailed(f"EngineFollowsTrainer: after {steps} steps: {error}; {ADVICE}") from None
