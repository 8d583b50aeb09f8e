"""The rollout pipeline: prompts in, scored samples out.

Each prompt is one task: the engines draw the group of its responses, and the moment they are there the teacher scores
them and the reward grades them, while other groups are still being generated. A batch is the prompts that one
optimiser step was given, whole: groups are never swapped for ones that happen to finish earlier, since that would
prefer short responses. With maxPolicyLag n, the tasks of the next n batches are already under way; a task
starts with whatever weights the engines have then, so pacing alone keeps every sample within n steps.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from distill_api.spec import Spec, Support
from distill_workers.engine import EngineRefused
from distill_workers.fleet import Fleet
from distill_workers.metrics import Metrics
from distill_workers.objective.advantages import group_advantages
from distill_workers.prompts import Cursor
from distill_workers.rewards import Reward, RewardError
from distill_workers.sample import Prompt, Sample
from distill_workers.teacher import BadScore, TeacherPool

log = logging.getLogger(__name__)
TRIES = 3
"""Times that the responses to one prompt are made again before the step goes on without them."""


def sample_seed(seed: int, step: int, prompt: int, sibling: int) -> int:
    """A seed of one response: independent of order, so that a resumed run draws the same tokens."""
    text = f"{seed}/{step}/{prompt}/{sibling}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def failure_label(error: BadScore | RewardError | EngineRefused) -> str:
    """Label `reason` of distill_samples_failed. Not by type: Ray hands on subclasses of what an actor raised."""
    if isinstance(error, BadScore):
        return error.reason
    return "reward" if isinstance(error, RewardError) else "engine"


@dataclass
class Batch:
    """The samples of one optimiser step, and when its parts were done (time.monotonic seconds)."""

    step: int
    cursor_after: dict[str, Any]
    """Where the prompt cursor stood once the prompts of this batch were drawn."""
    groups: list[asyncio.Task[list[Sample]]] = field(default_factory=list)
    generated_at: float = 0.0
    scored_at: float = 0.0

    async def samples(self) -> list[Sample]:
        return [sample for group in await asyncio.gather(*self.groups) for sample in group]

    def cancel(self) -> None:
        for group in self.groups:
            group.cancel()


class Rollouts:
    """Turns prompts into scored samples, batch by batch."""

    def __init__(
        self,
        spec: Spec,
        cursor: Cursor,
        fleet: Fleet,
        teacher: TeacherPool,
        reward: Reward | None,
        decode: Callable[[list[int]], str],
        metrics: Metrics,
    ) -> None:
        self._spec, self._cursor, self._fleet, self._teacher = spec, cursor, fleet, teacher
        self._reward, self._decode, self._metrics = reward, decode, metrics
        self._batches: dict[int, Batch] = {}
        self._top_k = spec.objective.top_k if spec.objective.support is Support.TOP_K else None

    async def batch(self, step: int, last_step: int) -> tuple[Batch, list[Sample]]:
        """The batch of `step`, once it is whole; those of the next maxPolicyLag steps are set going."""
        for ahead in range(step, min(step + self._spec.rollout.max_policy_lag, last_step - 1) + 1):
            if ahead not in self._batches:
                self._batches[ahead] = self._launch(ahead)
        batch = self._batches.pop(step)
        return batch, await batch.samples()

    def cancel(self) -> None:
        for batch in self._batches.values():
            batch.cancel()
        self._batches.clear()

    def _launch(self, step: int) -> Batch:
        prompts = self._cursor.next(self._spec.rollout.prompts_per_step)
        batch = Batch(step, self._cursor.state())
        batch.groups = [asyncio.create_task(self._group(batch, prompt)) for prompt in prompts]
        return batch

    async def _group(self, batch: Batch, prompt: Prompt) -> list[Sample]:
        for attempt in range(TRIES):
            try:
                samples = await self._draw(batch, prompt, attempt)
                batch.generated_at = max(batch.generated_at, time.monotonic())
                await self._score(samples)
                await self._grade(prompt, samples)
            except (BadScore, RewardError, EngineRefused) as error:
                lost = self._spec.rollout.samples_per_prompt
                self._metrics.add("distill_samples_failed", lost, reason=failure_label(error))
                log.warning("prompt %d of step %d is made again: %s", prompt.index, batch.step, error)
                continue
            batch.scored_at = max(batch.scored_at, time.monotonic())
            return samples
        return []

    async def _draw(self, batch: Batch, prompt: Prompt, attempt: int) -> list[Sample]:
        rollout = self._spec.rollout
        siblings = range(attempt * rollout.samples_per_prompt, (attempt + 1) * rollout.samples_per_prompt)
        responses = await self._fleet.generate(
            prompt.ids,
            max_new_tokens=rollout.max_response_tokens,
            temperature=rollout.sampling.temperature,
            top_p=rollout.sampling.top_p,
            seeds=[sample_seed(self._spec.seed, batch.step, prompt.index, s) for s in siblings],
        )
        samples = [
            Sample(
                prompt_index=prompt.index,
                sibling=number,
                prompt_ids=prompt.ids,
                response_ids=response.ids,
                engine_logprobs=response.logprobs,
                weight_version=response.weight_version,
                truncated=response.truncated,
            )
            for number, response in enumerate(responses)
            if response.ids  # an empty response has no token to learn from, and never reaches the teacher
        ]
        self._metrics.add("distill_tokens", sum(len(s.response_ids) for s in samples), kind="rollout")
        return samples

    async def _score(self, samples: list[Sample]) -> None:
        async def one(sample: Sample) -> None:
            scores = await self._teacher.score(sample.prompt_ids, sample.response_ids, self._top_k)
            sample.teacher_logprobs = scores.logprobs
            sample.teacher_top_ids, sample.teacher_top_logprobs = scores.top_ids, scores.top_logprobs
            self._metrics.add("distill_tokens", len(sample.response_ids), kind="teacher")

        await asyncio.gather(*(one(sample) for sample in samples))

    async def _grade(self, prompt: Prompt, samples: list[Sample]) -> None:
        if self._reward is None:
            return
        rewards = await asyncio.gather(*(self._reward.score(prompt, self._decode(s.response_ids)) for s in samples))
        coefficient = self._spec.objective.reward_coefficient
        values = torch.tensor(rewards, dtype=torch.float64)
        advantages = group_advantages(values, torch.zeros(len(rewards), dtype=torch.int64)).tolist()
        for sample, reward, advantage in zip(samples, rewards, advantages, strict=True):
            sample.reward, sample.advantage = reward, coefficient * advantage
