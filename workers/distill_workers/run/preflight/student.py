"""Whether the engines generate, and with the weights that the trainer has."""

import asyncio
import logging
import statistics
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from distill_api.spec.job_spec import NamedTeacherSource, Spec
from distill_workers.data.cursor import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.engine import EngineRefused
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import sample_seed
from distill_workers.run.preflight.check import Check
from distill_workers.run.trainer_ranks import TrainerRanks

log = logging.getLogger(__name__)

PROBE_PROMPTS, PROBE_RESPONSE_TOKENS = 2, 16
"""Prompts that the student answers for the checks, and the longest answer. A teacher scores as many responses at most.
"""
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15}
"""Mean difference of two computations of one log-probability: by other kernels, in the precision of the weights."""
GROSS = 4
"""A difference of so many times that is no matter of kernels."""
ENGINE_GENERATES = Check(
    "EngineGenerates",
    promise="The engines answer the first prompts of the data.",
    cost=f"{PROBE_PROMPTS} responses of up to {PROBE_RESPONSE_TOKENS} tokens, at least one of each engine, and one to "
    "a prompt of each teacher where one has a tokenizer of its own",
)
RESPONSES_END = Check(
    "ResponsesEnd",
    promise="A response that the engine calls finished ends by a token that ends responses.",
    cost="none beside EngineGenerates",
)
ENGINE_MATCHES_TRAINER = Check(
    "EngineMatchesTrainer",
    promise="After a weight sync, trainer and engines give the same tokens the same log-probabilities.",
    cost="one forward pass of the trainer over the probe",
)


def probed_prompts(spec: Spec, cursor: Cursor) -> list[Prompt]:
    """Return the first prompts of the data; where a teacher has a tokenizer of its own, also the first of each teacher
    that would have none among them: such a teacher can score no prompt of another's."""
    prompts = cursor.peek(PROBE_PROMPTS)
    if has_other_tokenizers(spec):
        of_teacher: dict[str, Prompt] = {}
        for prompt in [*prompts, *cursor.prompts]:
            of_teacher.setdefault(prompt.teacher, prompt)
        prompts += [prompt for prompt in of_teacher.values() if prompt not in prompts]
    return prompts


def has_other_tokenizers(spec: Spec) -> bool:
    """Return whether a teacher of the job has a tokenizer of its own."""
    return any(teacher.tokenizer is not None for teacher in spec.all_teachers)


async def probe(spec: Spec, engines: EnginePool, cursor: Cursor) -> list[Sample]:
    """Return short responses of the engines to the first prompts of the data, of each engine at least one.

    They are drawn at once: the pool gives each to the least busy engine.
    """
    prompts = probed_prompts(spec, cursor)

    async def draw(prompt: Prompt, number: int) -> list[Sample]:
        try:
            [response] = await engines.sample(
                prompt.ids,
                max_new_tokens=min(PROBE_RESPONSE_TOKENS, spec.rollout.max_response_tokens),
                temperature=1.0,
                top_p=1.0,
                seeds=[sample_seed(spec.seed, -3, prompt.index, number)],
            )
        except EngineRefused as error:
            raise ENGINE_GENERATES.failure(f"the engine would not answer the prompt {prompt.index}: {error}") from None
        if not response.ids:
            return []
        said = (response.ids, response.logprobs, response.versions, response.truncated)
        sample = Sample(prompt.index, number, prompt.ids, *said, privileged_ids=prompt.privileged_ids)
        sample.teacher = prompt.teacher
        return [sample]

    places = [divmod(i, len(prompts)) for i in range(max(len(prompts), engines.count_placed()))] if prompts else []
    drawn = await asyncio.gather(*(draw(prompts[at], number) for number, at in places))
    samples = [sample for part in drawn for sample in part]
    if not samples:
        raise ENGINE_GENERATES.failure("the student answered the first prompts with nothing; check its chat template")
    return samples


def probe_of(spec: Spec, samples: list[Sample], teacher: NamedTeacherSource) -> list[Sample]:
    """Return the samples of a probe that a teacher can be asked about: all, or those of its own prompts where a teacher
    has a tokenizer of its own. One with the student's tokenizer and no prompt there is asked the student's."""
    if not has_other_tokenizers(spec):
        return samples
    own = [sample for sample in samples if sample.teacher == teacher.name]
    if own or teacher.tokenizer is not None:
        return own
    return [replace(sample, privileged_ids=None) for sample in samples]


async def responses_end(samples: list[Sample], tokenizer: Any, ends: Collection[int]) -> None:
    """A response that was cut off and counts as finished is trained on as if the student had ended there.

    ends: the ids that end responses, besides the tokenizer's special tokens.
    """
    known = {*tokenizer.all_special_ids, *ends}
    for sample in samples:
        last = sample.response_ids[-1]
        if not sample.truncated and last not in known:
            raise RESPONSES_END.failure(
                f"the engine says that a response of {len(sample.response_ids)} tokens is finished, and its last token "
                f"is {tokenizer.decode([last])!r} (id {last}), which ends none (they end by {sorted(known)}); it was "
                "cut off, and would be trained on as finished: use the image's own SGLang, or name the id in "
                "rollout.stopTokenIds"
            )


async def engine_matches_trainer(
    spec: Spec, samples: list[Sample], ranks: TrainerRanks, *, trained: bool = False
) -> None:
    """After a weight sync the two hold the same weights, so their log-probabilities agree, of every engine.

    `trained`: in a run that goes on only a gross difference is a failure. It has come so far with what its kernels
    differ by, and must not end by that because a pod was lost.
    """
    tolerance = TOLERANCE_NATS[spec.dtype] * (GROSS if trained else 1)
    trainer = await ranks.logprobs(samples)
    gaps = [
        [abs(t - e) for t, e in zip(own, sample.engine_logprobs, strict=True)]
        for sample, own in zip(samples, trainer, strict=True)
    ]
    # Not the mean of all: one stale engine among many would be lost in it. Nor their maximum, which NaN may not be.
    means = [statistics.fmean(of_response) for of_response in gaps]
    gap = next((mean for mean in means if not mean <= tolerance), max(means))
    log.info(
        "preflight: trainer and engine differ by %.2e nats on average at most, %.2e at a token",
        gap,
        max(map(max, gaps)),
    )
    if not gap <= tolerance:
        raise ENGINE_MATCHES_TRAINER.failure(
            f"trainer and engine log-probabilities differ by {gap:.4f} nats on average (allowed {tolerance}) over a "
            "response; the weights in an engine are not the trainer's, or it samples at another temperature",
        )
