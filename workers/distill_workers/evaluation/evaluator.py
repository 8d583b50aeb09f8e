"""Held-out measurement: the score and pass@k of the student's responses, and its reverse KL to the teacher.

A measurement has two parts. `sample` needs the engines, with the weights of its step. `grade` needs the reward and the
teacher only, and so may go on while the engines already have other weights.
"""

import asyncio
import itertools
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from distill_api.spec.job_spec import Evaluation, RewardSource, Sampling, Spec
from distill_workers.data.identity import content_of
from distill_workers.data.prompts import STUDENTS, Tokenizers, load_prompts
from distill_workers.data.routing import Route
from distill_workers.data.sample import Prompt
from distill_workers.engine.engine import EngineRefused, Response
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.evaluation.conversation_response import ConversationResponse, conversations_of
from distill_workers.evaluation.estimates import Estimate, mean_score, pass_at_k
from distill_workers.failures import ConfigurationError
from distill_workers.metrics import Metrics
from distill_workers.rewards.base import RewardError
from distill_workers.rewards.build import build_reward
from distill_workers.rewards.graded_text import GradedText
from distill_workers.rollout.conversations.episodes import Episodes, Terms, of_evaluation
from distill_workers.rollout.pipeline import sample_seed
from distill_workers.teacher.pool import BadScore
from distill_workers.teacher.teachers import Teachers

log = logging.getLogger(__name__)

EXAMPLES = 4
"""Decoded responses kept of each evaluation."""
AS_IN_TRAINING = Sampling(temperature=1.0, top_p=1.0)
"""The reverse KL is an expectation over the student's own samples."""


class Generator(Protocol):
    """What samples responses: an engine pool, or one engine."""

    async def sample(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, top_p: float, seeds: list[int]
    ) -> list[Response]: ...


@dataclass
class Measurement:
    """One evaluation at one step. `reverse_kl` is the k1 estimate, nats per token, over all response tokens."""

    name: str
    step: int
    score: float | None = None
    score_low: float | None = None
    """Bounds of the 95 % confidence interval of the score."""
    score_high: float | None = None
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    """Pass@k by k."""
    reverse_kl: float | None = None
    teacher_score: float | None = None
    prompts: int = 0
    failed: int = 0
    """Responses that could not be had or graded; of a refused prompt, all of them."""
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Sampled:
    """The responses of one evaluation, all of one version of the weights."""

    step: int
    to_score: list[list[Response]] = field(default_factory=list)
    """[prompt][response]; empty without a reward."""
    as_trained: list[list[Response]] = field(default_factory=list)
    """[prompt][1], for the reverse KL; empty where that is not measured."""
    failed: int = 0


class Evaluator:
    """An evaluator of one entry of spec.evaluation, whose prompts are read once."""

    def __init__(
        self,
        spec: Spec,
        evaluation: Evaluation,
        tokenizer: Any,
        metrics: Metrics,
        episodes: Episodes | None = None,
        teachers: Tokenizers = STUDENTS,
    ) -> None:
        """`episodes`: of a job with an environment. Raises ConfigurationError for a reward that cannot be had."""
        self.name, self.reward_source = evaluation.name, evaluation.reward.source
        self._episodes = self._chosen(evaluation, episodes)
        self._spec, self._evaluation = spec, evaluation
        self._prompts, long = load_prompts(
            evaluation.prompts,
            tokenizer,
            spec.rollout.max_prompt_tokens,
            evaluation.max_prompts,
            Route.of(spec, evaluation),
            messages=self._episodes is not None,
            teachers=teachers,
        )
        self.prompts, self.content = self._prompts, content_of(self._prompts)
        metrics.set("distill_prompts_overlong", long, source=f"evaluation/{self.name}")
        self._is_scored = self.reward_source is not RewardSource.NONE
        own = self._is_scored and self._episodes is None
        self.reward = build_reward(evaluation.reward, metrics) if own else None
        self._decode = GradedText(tokenizer)
        self._decode_of = {name: GradedText(own) for name, own in teachers.items()}
        self._max_tokens = evaluation.max_response_tokens or spec.rollout.max_response_tokens

    def _chosen(self, evaluation: Evaluation, episodes: Episodes | None) -> Episodes | None:
        """Return what plays the conversations of the evaluation; None where it asks for single responses."""
        if evaluation.reward.source is not RewardSource.ENVIRONMENT:
            return None
        if episodes is None:
            raise ConfigurationError(
                f"evaluation {self.name}: reward.source environment is measured in the run of a job with "
                "rollout.environment"
            )
        return episodes

    async def measure(self, step: int, engines: Generator, teachers: Teachers | None) -> Measurement:
        """Measure all that can be had; without a teacher, nothing that needs one.

        The engines must keep the weights of `step` until it is done.
        """
        return await self.grade(await self.sample(step, engines, reverse_kl=teachers is not None), teachers)

    async def sample(self, step: int, engines: Generator, reverse_kl: bool = True) -> Sampled:
        """Return all responses that will be needed, without those of other weights than the step's."""
        sampled = Sampled(step)
        want_kl = reverse_kl and self._evaluation.measure_reverse_kl
        count = self._evaluation.samples_per_prompt if self._is_scored else 0
        # Sampled as in training, the responses that are scored serve for the reverse KL too.
        once = want_kl and count > 0 and self._evaluation.sampling == AS_IN_TRAINING
        sampled.to_score, sampled.as_trained = await asyncio.gather(
            self._sample(sampled, engines, self._evaluation.sampling, count, stream=-1),
            self._sample(sampled, engines, AS_IN_TRAINING, 1 if want_kl and not once else 0, stream=-2),
        )
        if once:
            sampled.as_trained = [responses[:1] for responses in sampled.to_score]
        return sampled

    async def grade(self, sampled: Sampled, teachers: Teachers | None) -> Measurement:
        """Return the measurement of responses that have been sampled; no engine is needed."""
        result = Measurement(self.name, sampled.step, prompts=len(self._prompts), failed=sampled.failed)
        with_teacher = self._evaluation.score_teacher and self.reward is not None and sampled.step == 0
        _, result.reverse_kl, result.teacher_score = await asyncio.gather(
            self._score(sampled, result),
            self._reverse_kl(sampled, result, teachers),
            self._score_teacher(teachers if with_teacher else None),
        )
        if result.failed:
            log.warning("evaluation %s at step %d: %d responses failed", self.name, sampled.step, result.failed)
        return result

    async def close(self) -> None:
        if self.reward is not None:
            await self.reward.close()

    async def _sample(
        self, sampled: Sampled, engines: Generator, sampling: Sampling, count: int, stream: int
    ) -> list[list[Response]]:
        """Return `count` responses to each prompt; `stream` keeps their seeds apart from those of other uses."""

        async def one(prompt: Prompt) -> list[Response]:
            seeds = [sample_seed(self._spec.seed, stream, prompt.index, s) for s in range(count)]
            try:
                if self._episodes is not None:
                    responses: Sequence[Response] = await self._conversations(self._episodes, prompt, sampling, seeds)
                else:
                    responses = await engines.sample(
                        prompt.ids,
                        max_new_tokens=self._max_tokens,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        seeds=seeds,
                    )
            except EngineRefused as error:
                log.warning("evaluation %s: prompt %d was refused: %s", self.name, prompt.index, error)
                responses = []
            kept = [
                r for r in responses if all(v == sampled.step for part in conversations_of(r) for v in part.versions)
            ]
            sampled.failed += count - len(kept)
            return kept

        return list(await asyncio.gather(*(one(p) for p in self._prompts))) if count else []

    async def _conversations(
        self, episodes: Episodes, prompt: Prompt, sampling: Sampling, seeds: list[int]
    ) -> list[ConversationResponse]:
        """Return the conversations of the seeds, but for those that failed."""
        environment = self._spec.rollout.environment
        assert environment is not None, "without one there are no episodes"
        max_turns = environment.max_turns

        async def one(index: int, seed: int) -> ConversationResponse | None:
            terms = Terms(of_evaluation(self.name), seed, sampling, self._max_tokens, max_turns, urgent=True)
            try:
                return ConversationResponse.of(await episodes.play(prompt, index, terms))
            except (EnvironmentFailed, EngineRefused) as error:
                log.warning("evaluation %s: prompt %d: %s", self.name, prompt.index, error)
                return None

        played = await asyncio.gather(*(one(index, seed) for index, seed in enumerate(seeds)))
        return [response for response in played if response is not None]

    async def _score(self, sampled: Sampled, result: Measurement) -> None:
        reward = self.reward

        async def one(prompt: Prompt, response: Response) -> float | None:
            text = self._decode(response.ids)
            try:
                if isinstance(response, ConversationResponse):
                    score = response.reward
                else:
                    assert reward is not None, "without a reward nothing was sampled to be scored"
                    score = await reward.score(prompt, text)
            except RewardError as error:
                log.warning("evaluation %s: prompt %d: %s", self.name, prompt.index, error)
                result.failed += 1
                return None
            if len(result.examples) < EXAMPLES:
                example = {"prompt": prompt.text, "response": text, "answer": prompt.answer, "score": score}
                result.examples.append(example)
            return score

        async def group(prompt: Prompt, responses: list[Response]) -> list[float]:
            return [s for s in await asyncio.gather(*(one(prompt, r) for r in responses)) if s is not None]

        if not sampled.to_score:
            return
        pairs = zip(self._prompts, sampled.to_score, strict=True)
        rewards = await asyncio.gather(*(group(p, r) for p, r in pairs))
        mean, result.pass_at = mean_score(rewards), pass_at_k(rewards)
        if mean is not None:
            result.score, result.score_low, result.score_high = mean.value, mean.low, mean.high

    async def _reverse_kl(self, sampled: Sampled, result: Measurement, teachers: Teachers | None) -> float | None:
        if teachers is None or not sampled.as_trained:
            return None

        async def one(prompt: Prompt, response: Response) -> list[float]:
            if not response.ids:
                return []
            asked = self._asked(prompt)
            mask: Iterable[bool] = itertools.repeat(True)
            if isinstance(response, ConversationResponse):
                by_reference = prompt.teacher == self._spec.objective.reference
                asked = response.prompt_ids if by_reference else response.teacher_prompt_ids
                mask = response.loss_mask
            try:
                scores = await teachers.of(prompt.teacher).score(asked, response.ids, None)
            except BadScore:
                result.failed += 1
                return []
            scored = len(response.ids) - scores.unscored
            pairs = zip(response.logprobs[:scored], scores.logprobs[:scored], strict=True)
            return [s - t for s, t in itertools.compress(pairs, mask)]

        groups = zip(self._prompts, sampled.as_trained, strict=True)
        pairs = [(p, part) for p, group in groups for r in group for part in conversations_of(r)]
        terms = [t for group in await asyncio.gather(*(one(p, r) for p, r in pairs)) for t in group]
        return statistics.fmean(terms) if terms else None

    def _asked(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt as its teacher is asked it: the reference the student's own, as in training."""
        return prompt.ids if prompt.teacher == self._spec.objective.reference else prompt.teacher_ids

    async def _score_teacher(self, teachers: Teachers | None) -> float | None:
        reward = self.reward
        if teachers is None or reward is None:
            return None

        async def one(prompt: Prompt) -> float | None:
            decode = self._decode_of.get(prompt.teacher, self._decode)
            try:
                written = await teachers.of(prompt.teacher).generate(self._asked(prompt), self._max_tokens)
                return await reward.score(prompt, decode(written.ids))
            except (BadScore, RewardError):
                return None

        scores = [s for s in await asyncio.gather(*(one(p) for p in self._prompts)) if s is not None]
        return statistics.fmean(scores) if scores else None
