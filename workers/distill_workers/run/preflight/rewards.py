"""Whether a reward can be had at all: the reference answers themselves, given as responses, are graded.

A reward that is 0 for a reason of its own, such as a reference in another form than the grader reads, trains for days
(slime's reports).
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from distill_api.spec.job_spec import RewardSource, Spec
from distill_workers.data.sample import Prompt
from distill_workers.evaluation.evaluator import Evaluator
from distill_workers.rewards.base import Reward, RewardError
from distill_workers.run.preflight.check import Check

log = logging.getLogger(__name__)
PROBE_ANSWERS = 4
"""Prompts of a source or an evaluation whose answers are graded."""
REWARD_SCORES = Check(
    "RewardScores",
    promise="A reference answer of each source and evaluation, given as a response, has a reward other than 0.",
    cost=f"up to 4 responses of {PROBE_ANSWERS} prompts graded for each",
)
FORMS = ("{0}", "\\boxed{{{0}}}", "#### {0}", "<answer>{0}</answer>")
"""In which a response may state its answer. One that a grader knows is enough."""
OWN_SOURCES = (RewardSource.EXACT_MATCH, RewardSource.MATH, RewardSource.REASONING_GYM)
"""Rewards that compare with the reference. What another one does with it is its author's business."""


@dataclass(frozen=True)
class Graded:
    """Prompts and the reward that grades responses to them."""

    name: str
    """As messages call them."""
    source: RewardSource
    reward: Reward
    prompts: Iterable[Prompt]


async def reward_scores(
    spec: Spec, prompts: Sequence[Prompt], rewards: Mapping[str, Reward], evaluators: Iterable[Evaluator] = ()
) -> list[str]:
    """Grade answers of each source and evaluation that has a reward. Returns a note about each reward of the user's own
    that gives them 0.

    Raises PreflightFailed where a reward of ours does, and ConfigurationError where a function returns no number.
    """
    graded = [
        Graded(
            f"source {source.name or 'prompts'}",
            (source.reward or spec.objective.reward).source,
            rewards[source.name],
            [p for p in prompts if p.source == source.name],  # a generator would look at the last source
        )
        for source in spec.data.all_sources
        if source.name in rewards
    ]
    graded += [
        Graded(f"evaluation {e.name}", e.reward_source, e.reward, e.prompts) for e in evaluators if e.reward is not None
    ]
    return [note for each in graded for note in await _notes(each)]


async def _notes(graded: Graded) -> list[str]:
    probe = list(islice((p for p in graded.prompts if p.answer), PROBE_ANSWERS))
    found = await asyncio.gather(*(_best(graded.reward, prompt) for prompt in probe))
    if not found or any(found):
        return []
    if None in found:
        return [
            f"{REWARD_SCORES.name}: reward {graded.source.value} of {graded.name} could not be tried: it failed for "
            f"{found.count(None)} of {len(probe)} reference answers, as the log says"
        ]
    what = (
        f"reward {graded.source.value} of {graded.name} gives 0 to {len(probe)} reference answers, in each of "
        f"{len(FORMS)} forms (the first is {(probe[0].answer or '')[:80]!r})"
    )
    if graded.source in OWN_SOURCES:
        raise REWARD_SCORES.failure(
            f"{what}, so no response could earn one; see prompts.answerField, and what `distill grade` says of it"
        )
    return [f"{REWARD_SCORES.name}: {what}; if it compares with the answer, no response could earn a reward"]


async def _best(reward: Reward, prompt: Prompt) -> float | None:
    """Return the largest absolute reward of the prompt's answer in any form, 0 for one that is refused for good; None
    for a reward that fails this time."""
    best = 0.0
    for form in FORMS:
        try:
            best = max(best, abs(await reward.score(prompt, form.format(prompt.answer))))
        except RewardError as error:
            log.info("preflight: a reference answer was not graded: %s", error)
            if not error.permanent:  # a service that does not answer would be waited for again
                return best or None
        if best:
            break
    return best
