"""Held-out measurement: the score of the student's responses, and its reverse KL to the teacher."""

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distill_api.spec import Evaluation, RewardSource, Spec
from distill_workers.engine import EngineRefused
from distill_workers.fleet import Fleet
from distill_workers.prompts import load_prompts
from distill_workers.rewards import Reward, RewardError, build_reward
from distill_workers.rollouts import sample_seed
from distill_workers.sample import Prompt
from distill_workers.teacher import BadScore, TeacherPool

EXAMPLES = 4
"""Decoded responses kept of each evaluation."""


@dataclass
class Measurement:
    """One evaluation at one step. `reverse_kl` is the k1 estimate, nats per token, over all response tokens."""

    name: str
    step: int
    score: float | None = None
    reverse_kl: float | None = None
    teacher_score: float | None = None
    prompts: int = 0
    failed: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


class Evaluator:
    """One entry of spec.evaluation, its prompts read once."""

    def __init__(self, spec: Spec, evaluation: Evaluation, tokenizer: Any) -> None:
        self.name = evaluation.name
        self._spec, self._evaluation = spec, evaluation
        self._prompts = load_prompts(
            evaluation.prompts, tokenizer, spec.rollout.max_prompt_tokens, evaluation.max_prompts
        )
        self._reward = None if evaluation.reward.source is RewardSource.NONE else build_reward(evaluation.reward)
        self._decode: Callable[[list[int]], str] = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._max_tokens = evaluation.max_response_tokens or spec.rollout.max_response_tokens

    async def measure(self, step: int, fleet: Fleet, teacher: TeacherPool) -> Measurement:
        result = Measurement(self.name, step, prompts=len(self._prompts))
        if self._reward is not None:
            result.score = await self._score(fleet, result, self._reward)
        if self._evaluation.measure_reverse_kl:
            result.reverse_kl = await self._reverse_kl(fleet, teacher, result)
        if self._evaluation.score_teacher and self._reward is not None and step == 0:
            result.teacher_score = await self._score_teacher(teacher, self._reward)
        return result

    async def _score(self, fleet: Fleet, result: Measurement, reward: Reward) -> float:
        sampling = self._evaluation.sampling

        async def one(prompt: Prompt) -> list[float]:
            try:
                responses = await fleet.generate(
                    prompt.ids,
                    max_new_tokens=self._max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seeds=[
                        sample_seed(self._spec.seed, -1, prompt.index, s)
                        for s in range(self._evaluation.samples_per_prompt)
                    ],
                )
            except EngineRefused:
                result.failed += 1
                return []
            scores = []
            for response in responses:
                text = self._decode(response.ids)
                try:
                    scores.append(await reward.score(prompt, text))
                except RewardError:
                    result.failed += 1
                    continue
                if len(result.examples) < EXAMPLES:
                    example = {"prompt": prompt.text, "response": text, "answer": prompt.answer, "score": scores[-1]}
                    result.examples.append(example)
            return scores

        scores = [s for group in await asyncio.gather(*(one(p) for p in self._prompts)) for s in group]
        return statistics.fmean(scores) if scores else 0.0

    async def _reverse_kl(self, fleet: Fleet, teacher: TeacherPool, result: Measurement) -> float | None:
        """Responses drawn as in training, since the reverse KL is an expectation over the student's own samples."""

        async def one(prompt: Prompt) -> list[float]:
            try:
                [response] = await fleet.generate(
                    prompt.ids,
                    max_new_tokens=self._max_tokens,
                    temperature=1.0,
                    top_p=1.0,
                    seeds=[sample_seed(self._spec.seed, -2, prompt.index, 0)],
                )
            except EngineRefused:
                result.failed += 1
                return []
            if not response.ids:
                return []
            try:
                scores = await teacher.score(prompt.ids, response.ids, None)
            except BadScore:
                result.failed += 1
                return []
            return [s - t for s, t in zip(response.logprobs, scores.logprobs, strict=True)]

        terms = [t for group in await asyncio.gather(*(one(p) for p in self._prompts)) for t in group]
        return statistics.fmean(terms) if terms else None

    async def _score_teacher(self, teacher: TeacherPool, reward: Reward) -> float:
        async def one(prompt: Prompt) -> float | None:
            try:
                ids = await teacher.generate(prompt.ids, self._max_tokens)
                return await reward.score(prompt, self._decode(ids))
            except (BadScore, RewardError):
                return None

        scores = [s for s in await asyncio.gather(*(one(p) for p in self._prompts)) if s is not None]
        return statistics.fmean(scores) if scores else 0.0
