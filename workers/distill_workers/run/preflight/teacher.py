"""Whether a teacher scores, and scores as a teacher of this student would; and whether its stored scores do."""

import asyncio
import contextlib
import logging
import math
import random
import statistics
from collections.abc import AsyncIterator
from typing import Any

from distill_api.spec.job_spec import RewardSource, Spec
from distill_api.teacher.student import teaches_itself
from distill_api.training_phases import teacher_top_k
from distill_workers.data.dataset_responses import supervised_sample
from distill_workers.data.sample import Prompt, Sample
from distill_workers.run.preflight.check import Check
from distill_workers.teacher.pool import BadScore, TeacherPool
from distill_workers.teacher.stored_scores.identity import ScoreIdentity
from distill_workers.teacher.stored_scores.label import stored_labels
from distill_workers.teacher.stored_scores.store import ScoreStore

TEACHER_ANSWERS = Check(
    "TeacherAnswers",
    promise="The endpoint that a job names scores a request.",
    cost="two tokens scored",
)
TEACHER_SCORES = Check(
    "TeacherScores",
    promise="The teacher scores the student's own responses, with the top-k that the objective needs.",
    cost="that of TeacherSane and ReplicasAgree, which find it out",
)
TEACHER_SANE = Check(
    "TeacherSane",
    promise="The student's tokens are likelier to the teacher than far below chance.",
    cost="two short responses scored",
)
ONE_NATS, SURE_NATS, FEW_TOKENS = 1e-4, 0.1, 3
"""Difference of log-probs below which different tokens have one; unless the teacher is sure of each, as one may be, or
they are so few that it may be chance."""
TEACHER_DIFFERS = Check(
    "TeacherDiffers",
    promise="A teacher is another model than the student, or there is a reward to learn from.",
    cost="none beside TeacherSane",
)
SCORES_STORED = Check(
    "ScoresStored",
    promise="Each response of the data set has precomputed scores of its teacher, of which a thousand are undamaged.",
    cost="each response looked up in the index, 1,000 stored scores read",
)
STORED_SCORES_AGREE = Check(
    "StoredScoresAgree",
    promise="A live teacher scores stored responses, if some are found, as it did then, within maxDisagreement.",
    cost="two responses of the data set scored",
)
COMPARED_RESPONSES, LOOKED_UP, READ_RESPONSES, NAMED_PROMPTS = 2, 1000, 1000, 5
"""Stored responses that are scored again, prompts among whose they are sought, precomputed ones that are read, since
a million on a network's volume take an hour, and prompts that a message names."""
PORTION = 100
"""Responses that a thread tokenizes at a time."""
SAME_NATS = {"float32": 1e-4, "bfloat16": 5e-3}
"""Mean difference below which teacher and student are one model: kernels of other shapes differ by as much."""

log = logging.getLogger(__name__)


async def teacher_answers(teacher: TeacherPool) -> None:
    """An endpoint is somebody else's, and may be another than the job says."""
    try:
        # Not token 0: SGLang takes a prompt of nothing else for an empty one.
        await teacher.score([1], [1], None)
    except BadScore as error:
        raise TEACHER_ANSWERS.failure(
            f"{named(teacher)} does not score a request of two tokens: {error}; check url, protocol, model and "
            f"keySecret of {teacher.teacher.path}.endpoint",
        ) from None


async def teacher_is_sane(
    spec: Spec, samples: list[Sample], teacher: TeacherPool, vocabulary: int, *, trained: bool = False
) -> list[list[float]]:
    """Return the log-probs of each sample's tokens, nats: scored as training will ask for it, and no nonsense.

    To a teacher that is sure of its answers, those of a `trained` student may have probability 1.
    """
    top_k = teacher_top_k(spec)
    try:
        scores = [await teacher.score(s.teacher_prompt_ids, s.response_ids, top_k) for s in samples]
    except BadScore as error:
        hint = "" if top_k is None else f" (it must give {top_k} likeliest tokens, objective.topK)"
        raise TEACHER_SCORES.failure(f"{named(teacher)} scored a probe unusably{hint}: {error}") from None
    logprobs = [x for s in scores for x in s.logprobs]
    mean = statistics.fmean(logprobs)
    if mean < -3 * math.log(vocabulary):
        raise TEACHER_SANE.failure(
            f"{named(teacher)} gives the student's tokens {mean:.1f} nats on average, far below chance "
            f"({-math.log(vocabulary):.1f}); is it the right model?",
        )
    if mean == 0 and not trained:
        raise TEACHER_SANE.failure(
            f"{named(teacher)} gives each of the student's tokens probability 1: its server writes 0 for a "
            "log-probability that it did not compute; serve it by another version",
        )
    different = {token for s in samples for token in s.response_ids}
    if len(different) >= FEW_TOKENS and mean < -SURE_NATS and max(logprobs) - min(logprobs) < ONE_NATS:
        raise TEACHER_SANE.failure(
            f"{named(teacher)} gives each of the student's tokens the same {mean:.2f} nats, whatever they are, so it "
            "teaches nothing but to be less sure; its weights were not loaded, or its server does not compute them",
        )
    return [s.logprobs for s in scores]


def gap_nats(samples: list[Sample], scores: list[list[float]]) -> float:
    """Return the mean absolute difference of a teacher's log-probs and the student's own, per token."""
    pairs = zip(samples, scores, strict=True)
    return statistics.fmean(abs(t - e) for s, own in pairs for t, e in zip(own, s.engine_logprobs, strict=True))


async def teacher_differs(spec: Spec, gaps: dict[str, float]) -> None:
    """A teacher whose path was mistyped is often the student itself: the divergence is 0 from the start.

    gaps: `gap_nats` by teacher. The student as it was is an anchor beside a reward, or beside another teacher.
    """
    rewarded = any((s.reward or spec.objective.reward).source is not RewardSource.NONE for s in spec.data.all_sources)
    if not rewarded and max(gaps.values()) < SAME_NATS[spec.dtype]:
        if teaches_itself(spec):
            raise TEACHER_DIFFERS.failure(
                f"the student gives its tokens the log-probabilities that it gives them with the teacher's prompt "
                f"(mean difference {max(gaps.values()):.1e} nats), and there is no reward, so there is nothing to "
                "learn; what does prompts.teacherPrompt add for these rows (`distill prompts` shows it)?",
            )
        raise TEACHER_DIFFERS.failure(
            f"teacher {', '.join(gaps)} gives the student's tokens the log-probabilities that the student gives them "
            f"(mean difference {max(gaps.values()):.1e} nats), and there is no reward, so there is nothing to learn; "
            f"is its model the student, {spec.student.model}?",
        )


def named(teacher: TeacherPool) -> str:
    """The teacher's name and model or address, as messages call it."""
    return f"teacher {teacher.teacher.name} ({teacher.teacher.title})"


async def scores_stored(spec: Spec, prompts: list[Prompt], tokenizer: Any, store: ScoreStore) -> None:
    """Without a live teacher nobody can score what is missing, and the run would end at the first such response.

    READ_RESPONSES, drawn by chance, are read; of the others the index alone is, and what is damaged ends the run when
    it is trained on. Raises OSError where the volume does not answer.
    """
    read = {prompt.index for prompt in _drawn(prompts, READ_RESPONSES, spec.seed)}
    missing = []
    async for prompt, sample in _samples(spec, prompts, tokenizer):
        asked = (sample.teacher_prompt_ids, sample.response_ids)
        if not store.has(*asked) or (prompt.index in read and await store.read(*asked) is None):
            missing.append(prompt)
    if not missing:
        return
    rows = ", ".join(f"{p.index} (response {p.response or '':.30}…)" for p in missing[:NAMED_PROMPTS])
    more = f" and {len(missing) - NAMED_PROMPTS} more" if len(missing) > NAMED_PROMPTS else ""
    others = list[ScoreIdentity]()
    with contextlib.suppress(OSError):
        others = [x.identity for x in stored_labels(store.folder.parent) if x.identity != store.identity]
    there = f"; what is stored there is of {'; '.join(map(str, others[:NAMED_PROMPTS]))}" if others else ""
    raise SCORES_STORED.failure(
        f"{len(missing)} of {len(prompts)} responses of the data set have no undamaged scores of {store.identity} in "
        f"{store.folder}: those of the prompts {rows}{more}, counted from 0{there}; run the job once, over the whole "
        "data set, with objective.teacherLogprobs cached"
    )


async def stored_scores_agree(
    spec: Spec, prompts: list[Prompt], tokenizer: Any, store: ScoreStore, teacher: TeacherPool
) -> list[str]:
    """What serves under the same name may be another model by now, and its files are not always here to be compared.

    Returns a note where there are stored scores, and none of the LOOKED_UP responses, drawn from all sources, has some.
    """
    if not len(store):
        return []
    compared, gaps = 0, list[float]()
    drawn = _drawn(prompts, LOOKED_UP, spec.seed)
    async for _, sample in _samples(spec, drawn, tokenizer):
        asked = (sample.teacher_prompt_ids, sample.response_ids)
        scores = await store.read(*asked) if store.has(*asked) else None
        if scores is None:
            continue
        try:
            live = await teacher.score(*asked, spec.objective.teacher_top_k)
        except BadScore as error:
            raise TEACHER_SCORES.failure(f"{named(teacher)} scored a stored response unusably: {error}") from None
        gaps += [abs(x - y) for x, y in zip(live.logprobs, scores.logprobs, strict=True)]
        compared += 1
        if compared == COMPARED_RESPONSES:
            break
    if gaps and not statistics.fmean(gaps) <= teacher.teacher.max_disagreement:
        raise STORED_SCORES_AGREE.failure(
            f"{named(teacher)} scores {compared} responses otherwise than it did when they were stored in "
            f"{store.folder}, by {statistics.fmean(gaps):.4f} nats per token on average (allowed "
            f"{teacher.teacher.max_disagreement}, maxDisagreement); it is another model by now: remove that folder, or "
            "serve the model that it is of"
        )
    if compared:
        return []
    return [
        f"{STORED_SCORES_AGREE.name}: none of {len(drawn)} responses that were drawn from the data set has undamaged "
        f"scores among the {len(store)} in {store.folder}, so {named(teacher)} was not compared with what it gave then"
    ]


def _drawn(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """Return as many prompts at most, from anywhere: they come source by source."""
    return random.Random(f"{seed}/stored").sample(prompts, min(count, len(prompts)))


async def _samples(spec: Spec, prompts: list[Prompt], tokenizer: Any) -> AsyncIterator[tuple[Prompt, Sample]]:
    """Yield each prompt with the data set's response."""
    for begin in range(0, len(prompts), PORTION):
        part = prompts[begin : begin + PORTION]
        for pair in zip(part, await asyncio.to_thread(_tokenized, spec, part, tokenizer), strict=True):
            yield pair


def _tokenized(spec: Spec, prompts: list[Prompt], tokenizer: Any) -> list[Sample]:
    longest = spec.rollout.max_response_tokens
    return [supervised_sample(prompt, tokenizer, longest, weight_version=0) for prompt in prompts]
