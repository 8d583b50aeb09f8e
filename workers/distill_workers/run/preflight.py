"""Named checks before the first step: a student that cannot learn from this teacher is found in seconds, not hours."""

import logging
import math
import random
import statistics
from typing import Any

import numpy as np

from distill_api.spec import Spec, Support
from distill_workers.data.prompts import Cursor
from distill_workers.data.sample import Sample
from distill_workers.engine.engine import EngineRefused
from distill_workers.failures import PreflightFailed
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import sample_seed
from distill_workers.run.team import Team
from distill_workers.teacher.pool import BadScore, TeacherPool
from distill_workers.teacher.teachers import Teachers

log = logging.getLogger(__name__)

PROBE_TOKENS = 384
"""Ids whose text is compared between the two tokenizers, besides the special ones."""
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15}
"""Mean difference of two computations of one log-probability: by other kernels, in the precision of the weights."""
TIMES = 2
"""That each replica scores the probe."""
TIMES_BEHIND_ONE_ADDRESS = 4
"""Of servers that somebody else runs: a load balancer may hide several, and gives each connection to one of them."""


async def preflight(
    spec: Spec, tokenizer: Any, team: Team, engines: EnginePool, teachers: Teachers, cursor: Cursor
) -> None:
    """Raises PreflightFailed with the name of the check, what was expected, what came and what to do."""
    for teacher in teachers.pools.values():
        await teacher_answers(teacher)
        await same_vocabulary(tokenizer, teacher)
    samples = await probe(spec, engines, cursor)
    for teacher in teachers.pools.values():
        await teacher_is_sane(spec, samples, teacher, len(tokenizer))
        await replicas_agree(spec, samples, teacher)
    await engine_matches_trainer(spec, samples, team)


def fail(check: str, message: str) -> PreflightFailed:
    return PreflightFailed(f"{check}: {message}")


async def teacher_answers(teacher: TeacherPool) -> None:
    """An endpoint is somebody else's, and may be another than the job says."""
    if teacher.teacher.endpoint is None:
        return
    try:
        # Not token 0: SGLang takes a prompt of nothing else for an empty one.
        await teacher.score([1], [1], None)
    except BadScore as error:
        raise fail(
            "TeacherAnswers",
            f"{named(teacher)} does not score a request of two tokens: {error}; check url, protocol, model and "
            f"keySecret of {teacher.teacher.path}.endpoint",
        ) from None


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
            f"{named(teacher)} refused token ids that the student's tokenizer has ({size} tokens): {error}; "
            "teacher and student must share one tokenizer, so choose models of one family",
        ) from None
    for token, theirs in zip(ids, texts, strict=True):
        mine = tokenizer.decode([token])
        if "\ufffd" in mine and teacher.teacher.endpoint is not None:
            continue  # a part of a character, which servers write in ways of their own
        if theirs is not None and theirs != mine:
            raise fail(
                "SameVocabulary",
                f"token {token} is {mine!r} to the student and {theirs!r} to {named(teacher)}; "
                "they must share one tokenizer, so choose models of one family",
            )


async def probe(spec: Spec, engines: EnginePool, cursor: Cursor) -> list[Sample]:
    """A few short responses of the engines, to the first prompts of the data."""
    samples = []
    for prompt in cursor.peek(2):
        try:
            [response] = await engines.sample(
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
    """It scores as training will ask it to, and what it says of the student's tokens is no nonsense."""
    top_k = spec.objective.top_k if spec.objective.support is Support.TOP_K else None
    try:
        scores = [await teacher.score(s.prompt_ids, s.response_ids, top_k) for s in samples]
    except BadScore as error:
        hint = "" if top_k is None else f" (it must give {top_k} likeliest tokens, objective.topK)"
        raise fail("TeacherScores", f"{named(teacher)} scored a probe unusably{hint}: {error}") from None
    mean = statistics.fmean(x for s in scores for x in s.logprobs)
    if mean < -3 * math.log(vocabulary):
        raise fail(
            "TeacherSane",
            f"{named(teacher)} gives the student's tokens {mean:.1f} nats on average, far below chance "
            f"({-math.log(vocabulary):.1f}); is it the right model?",
        )


async def replicas_agree(spec: Spec, samples: list[Sample], teacher: TeacherPool) -> None:
    """The same tokens, scored by each replica more than once, have the same log-probabilities."""
    own = teacher.teacher.model is not None
    found: dict[tuple[str, int], list[float]] = {}
    try:
        for sample in samples:
            # One after the other: where an address is a load balancer, they go to different servers.
            for time in range(TIMES if own else TIMES_BEHIND_ONE_ADDRESS):
                for address, scores in await teacher.score_everywhere(sample.prompt_ids, sample.response_ids, None):
                    found.setdefault((address, time), []).extend(scores.logprobs)
    except BadScore as error:
        raise fail("TeacherScores", f"{named(teacher)} scored a probe unusably: {error}") from None
    # One that came or went meanwhile has not seen all of the probe.
    whole = max(map(len, found.values()))
    runs = [(address, values) for (address, _), values in found.items() if len(values) == whole]
    logprobs = np.array([values for _, values in runs])
    gaps = np.abs(logprobs[:, None] - logprobs[None])  # [runs, runs, tokens]
    means, most = gaps.mean(axis=-1), teacher.teacher.max_disagreement
    i, j = map(int, np.unravel_index(means.argmax(), means.shape))
    where = f"at {runs[i][0]} and at {runs[j][0]}" if runs[i][0] != runs[j][0] else f"twice at {runs[i][0]}"
    log.info("preflight: teacher %s: scores differ by %.2e nats at most, %s", teacher.teacher.name, means[i, j], where)
    if means[i, j] > most:
        raise fail(
            "ReplicasAgree",
            f"{named(teacher)} scored the same {gaps.shape[-1]} tokens {where}, and the two differ by "
            f"{means[i, j]:.4f} nats per token on average (allowed {most}, maxDisagreement); all of its servers must "
            "hold the same weights in the same precision",
        )
    places = np.array([address for address, _ in runs])
    twice = float(gaps[places[:, None] == places[None]].max())
    if own and twice > TOLERANCE_NATS[spec.dtype]:
        raise fail(
            "TeacherDeterministic",
            f"the same request twice to {named(teacher)} differed by {twice:.4f} nats at a token (allowed "
            f"{TOLERANCE_NATS[spec.dtype]})",
        )


def named(teacher: TeacherPool) -> str:
    return f"teacher {teacher.teacher.name} ({teacher.teacher.title})"


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
