"""Named checks before the first step: a student that cannot learn from this teacher is found in seconds, not hours."""

import logging
import math
import random
import statistics
from typing import Any

from distill_api.spec import Spec
from distill_workers.engine import EngineRefused
from distill_workers.failures import PreflightFailed
from distill_workers.fleet import Fleet
from distill_workers.prompts import Cursor
from distill_workers.rollouts import sample_seed
from distill_workers.sample import Sample
from distill_workers.teacher import BadScore, TeacherPool
from distill_workers.team import Team

log = logging.getLogger(__name__)

PROBE_TOKENS = 384
"""Ids whose text is compared between the two tokenizers, besides the special ones."""
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15}
"""Mean difference of two computations of one log-probability: by other kernels, in the precision of the weights."""


async def preflight(spec: Spec, tokenizer: Any, team: Team, fleet: Fleet, teacher: TeacherPool, cursor: Cursor) -> None:
    """Raises PreflightFailed with the name of the check, what was expected, what came and what to do."""
    await same_vocabulary(tokenizer, teacher)
    samples = await probe(spec, fleet, cursor)
    await teacher_is_sane(spec, samples, teacher, len(tokenizer))
    await engine_matches_trainer(spec, samples, team)


def fail(check: str, message: str) -> PreflightFailed:
    return PreflightFailed(f"{check}: {message}")


async def same_vocabulary(tokenizer: Any, teacher: TeacherPool) -> None:
    """The teacher that serves, not its files, is asked what each probed id means."""
    size = len(tokenizer)
    special = [i for i in tokenizer.all_special_ids if i < size]
    ids = list(dict.fromkeys([*special, size - 1, *random.Random(0).sample(range(size), min(size, PROBE_TOKENS))]))
    try:
        texts = await teacher.token_texts(ids)
    except BadScore as error:
        raise fail(
            "SameVocabulary",
            f"the teacher refused token ids that the student's tokenizer has ({size} tokens): {error}; "
            "teacher and student must share one tokenizer, so choose models of one family",
        ) from None
    for token, theirs in zip(ids, texts, strict=True):
        mine = tokenizer.decode([token])
        if theirs is not None and theirs != mine:
            raise fail(
                "SameVocabulary",
                f"token {token} is {mine!r} to the student and {theirs!r} to the teacher; "
                "they must share one tokenizer, so choose models of one family",
            )


async def probe(spec: Spec, fleet: Fleet, cursor: Cursor) -> list[Sample]:
    """A few short responses of the engines, to the first prompts of the data."""
    samples = []
    for prompt in cursor.peek(2):
        try:
            [response] = await fleet.generate(
                prompt.ids,
                max_new_tokens=min(16, spec.rollout.max_response_tokens),
                temperature=1.0,
                top_p=1.0,
                seeds=[sample_seed(spec.seed, -3, prompt.index, 0)],
            )
        except EngineRefused as error:
            raise fail("EngineGenerates", f"the engine would not answer the prompt {prompt.index}: {error}") from None
        if response.ids:
            samples.append(
                Sample(prompt.index, 0, prompt.ids, response.ids, response.logprobs, response.versions, False)
            )
    if not samples:
        raise fail("EngineGenerates", "the student answered the first prompts with nothing; check its chat template")
    return samples


async def teacher_is_sane(spec: Spec, samples: list[Sample], teacher: TeacherPool, vocabulary: int) -> None:
    tolerance = TOLERANCE_NATS[spec.dtype]
    try:
        first = [await teacher.score(s.prompt_ids, s.response_ids, None) for s in samples]
        second = [await teacher.score(s.prompt_ids, s.response_ids, None) for s in samples]
    except BadScore as error:
        raise fail("TeacherScores", f"the teacher's answer to a probe was unusable: {error}") from None
    a = [x for s in first for x in s.logprobs]
    b = [x for s in second for x in s.logprobs]
    gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
    if gap > tolerance:
        raise fail("TeacherDeterministic", f"the same request twice differed by {gap:.4f} nats (allowed {tolerance})")
    if statistics.fmean(a) < -3 * math.log(vocabulary):
        raise fail(
            "TeacherSane",
            f"the teacher gives the student's tokens {statistics.fmean(a):.1f} nats on average, far below chance "
            f"({-math.log(vocabulary):.1f}); is it the right model?",
        )


async def engine_matches_trainer(spec: Spec, samples: list[Sample], team: Team) -> None:
    """After a weight sync the two hold the same weights, so their log-probabilities agree."""
    tolerance = TOLERANCE_NATS[spec.dtype]
    trainer = await team.run(team.logprobs, samples)
    gaps = [
        abs(t - e)
        for sample, own in zip(samples, trainer, strict=True)
        for t, e in zip(own, sample.engine_logprobs, strict=True)
    ]
    gap = statistics.fmean(gaps)
    log.info("preflight: trainer and engine differ by %.2e nats on average, %.2e at most", gap, max(gaps))
    if gap > tolerance:
        raise fail(
            "EngineMatchesTrainer",
            f"trainer and engine log-probabilities differ by {gap:.4f} nats on average (allowed {tolerance}); "
            "the weights in the engines are not the trainer's",
        )
