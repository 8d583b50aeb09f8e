"""Whether the engines generate, and with the weights that the trainer has."""

import logging
import statistics

from distill_api.spec.job_spec import Spec
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Sample
from distill_workers.engine.engine import EngineRefused
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import sample_seed
from distill_workers.run.preflight.check import Check
from distill_workers.run.trainer_ranks import TrainerRanks

log = logging.getLogger(__name__)

PROBE_PROMPTS, PROBE_RESPONSE_TOKENS = 2, 16
"""Prompts that the student answers for the checks, and the longest answer."""
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15}
"""Mean difference of two computations of one log-probability: by other kernels, in the precision of the weights."""
ENGINE_GENERATES = Check(
    "EngineGenerates",
    promise="The engines answer the first prompts of the data.",
    cost=f"{PROBE_PROMPTS} responses of up to {PROBE_RESPONSE_TOKENS} tokens",
)
ENGINE_MATCHES_TRAINER = Check(
    "EngineMatchesTrainer",
    promise="After a weight sync, trainer and engines give the same tokens the same log-probabilities.",
    cost="one forward pass of the trainer over the probe",
)


async def probe(spec: Spec, engines: EnginePool, cursor: Cursor) -> list[Sample]:
    """Return short responses of the engines to the first prompts of the data, at most one to each."""
    samples = []
    for prompt in cursor.peek(PROBE_PROMPTS):
        try:
            [response] = await engines.sample(
                prompt.ids,
                max_new_tokens=min(PROBE_RESPONSE_TOKENS, spec.rollout.max_response_tokens),
                temperature=1.0,
                top_p=1.0,
                seeds=[sample_seed(spec.seed, -3, prompt.index, 0)],
            )
        except EngineRefused as error:
            raise ENGINE_GENERATES.failure(f"the engine would not answer the prompt {prompt.index}: {error}") from None
        if response.ids:
            samples.append(
                Sample(prompt.index, 0, prompt.ids, response.ids, response.logprobs, response.versions, False)
            )
    if not samples:
        raise ENGINE_GENERATES.failure("the student answered the first prompts with nothing; check its chat template")
    return samples


async def engine_matches_trainer(spec: Spec, samples: list[Sample], ranks: TrainerRanks) -> None:
    """After a weight sync the two hold the same weights, so their log-probabilities agree."""
    tolerance = TOLERANCE_NATS[spec.dtype]
    trainer = await ranks.logprobs(samples)
    gaps = [
        abs(t - e)
        for sample, own in zip(samples, trainer, strict=True)
        for t, e in zip(own, sample.engine_logprobs, strict=True)
    ]
    gap = statistics.fmean(gaps)
    log.info("preflight: trainer and engine differ by %.2e nats on average, %.2e at most", gap, max(gaps))
    if gap > tolerance:
        raise ENGINE_MATCHES_TRAINER.failure(
            f"trainer and engine log-probabilities differ by {gap:.4f} nats on average (allowed {tolerance}); "
            "the weights in the engines are not the trainer's",
        )
