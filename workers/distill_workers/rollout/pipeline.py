"""The rollout pipeline: prompts in, scored samples out.

Each response is one task: an engine draws it, and the moment it is there the teacher scores it, the reward grades it
and the trainer may have it, while others are still being generated; where rewards are compared within the group of a
prompt's responses, the group comes as one. A batch is the prompts that one optimiser step was given, whole: they are
never swapped for ones that happen to finish earlier, since that would prefer short responses. With maxPolicyLag n, the
tasks of the next n batches are already under way; a task starts with whatever weights the engines have then, so pacing
alone keeps every sample within n steps.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distill_api.spec import Spec, Support
from distill_workers.data.dataset_responses import supervised_positions, supervised_sample
from distill_workers.data.prompts import Cursor
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.engine import EngineRefused
from distill_workers.metrics import Metrics
from distill_workers.objective.advantages import reward_advantages
from distill_workers.rewards.base import Reward, RewardError
from distill_workers.rollout.engine_pool import Fleet
from distill_workers.teacher.pool import BadScore
from distill_workers.teacher.teachers import Teachers

log = logging.getLogger(__name__)
TRIES = 3
"""Times that a response is drawn before the step goes on without it."""


def sample_seed(seed: int, step: int, prompt: int, sibling: int) -> int:
    """A seed of one response: independent of order, so that a resumed run draws the same tokens."""
    text = f"{seed}/{step}/{prompt}/{sibling}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


@dataclass
class Batch:
    """The samples of one optimiser step, and when the last was generated (time.monotonic seconds)."""

    step: int
    cursor_after: dict[str, Any]
    """Where the prompt cursor stood once the prompts of this batch were drawn."""
    parts: list[asyncio.Task[list[Sample]]] = field(default_factory=list)
    """A response each, or the group of a prompt."""
    generated_at: float = 0.0

    async def arrivals(self, *, in_order: bool) -> AsyncIterator[list[Sample]]:
        """Its samples as they come in; in the order of the prompts where sums must not depend on time."""
        for part in self.parts if in_order else asyncio.as_completed(self.parts):
            yield await part

    def cancel(self) -> None:
        for part in self.parts:
            part.cancel()


class Rollouts:
    """Turns prompts into scored samples, batch by batch."""

    def __init__(
        self,
        spec: Spec,
        cursor: Cursor,
        fleet: Fleet,
        teachers: Teachers,
        rewards: Mapping[str, Reward],
        tokenizer: Any,
        metrics: Metrics,
    ) -> None:
        self._spec, self._cursor, self._fleet, self._teachers = spec, cursor, fleet, teachers
        # By source of the prompt; those of a source that is not among them have none.
        self._rewards, self._tokenizer, self._metrics = rewards, tokenizer, metrics
        self._batches: dict[int, Batch] = {}
        self._prefetches: set[asyncio.Task[None]] = set()
        self._top_k = spec.objective.top_k if spec.objective.support is Support.TOP_K else None

    def ahead(self, step: int, last_step: int) -> None:
        """Sets the batches of `step` and of the next maxPolicyLag steps going."""
        for ahead in range(step, min(step + self._spec.rollout.max_policy_lag, last_step - 1) + 1):
            if ahead not in self._batches:
                self._batches[ahead] = self._launch(ahead)

    def take(self, step: int, last_step: int) -> Batch:
        """The batch of `step`, under way; those of the next maxPolicyLag steps are under way too."""
        self.ahead(step, last_step)
        return self._batches.pop(step)

    def give_back(self, batch: Batch) -> None:
        """What `take` gave, to be taken again with whatever has come in."""
        self._batches[batch.step] = batch

    def cancel(self) -> None:
        for batch in self._batches.values():
            batch.cancel()
        self._batches.clear()
        for prefetch in self._prefetches:
            prefetch.cancel()

    def _launch(self, step: int) -> Batch:
        spec = self._spec
        prompts = self._cursor.next(spec.rollout.prompts_per_step)
        batch = Batch(step, self._cursor.state())
        siblings = range(spec.rollout.samples_per_prompt)
        supervised = supervised_positions(
            spec.objective.dataset_share, spec.seed, step, len(prompts), spec.rollout.samples_per_prompt
        )
        parts: list[Coroutine[Any, Any, list[Sample]]] = []
        for position, prompt in enumerate(prompts):
            if position in supervised:
                parts.append(self._supervised(batch, prompt))
                continue
            self._prefetch(prompt)
            if prompt.source in self._rewards:
                parts.append(self._group(batch, prompt))
            else:
                parts += [self._sample(batch, prompt, sibling) for sibling in siblings]
        batch.parts = [asyncio.create_task(part) for part in parts]
        return batch

    def _prefetch(self, prompt: Prompt) -> None:
        """The teacher reads the prompt while the student answers it."""
        if self._spec.rollout.samples_per_prompt > 1:
            task = asyncio.create_task(self._teachers.of(prompt.teacher).prefetch(prompt.ids))
            self._prefetches.add(task)
            task.add_done_callback(self._prefetches.discard)

    async def _supervised(self, batch: Batch, prompt: Prompt) -> list[Sample]:
        """The data set's own response, scored."""
        limit = self._spec.rollout.max_response_tokens
        sample = supervised_sample(prompt, self._tokenizer, limit, batch.step)
        try:
            await self._score(prompt, sample)
        except BadScore as error:
            self._failed(batch, prompt, error.reason, error)
            return []
        return [sample]

    async def _group(self, batch: Batch, prompt: Prompt) -> list[Sample]:
        siblings = range(self._spec.rollout.samples_per_prompt)
        drawn = await asyncio.gather(*(self._sample(batch, prompt, sibling) for sibling in siblings))
        samples = [sample for part in drawn for sample in part]
        rewards = torch.tensor([s.reward for s in samples], dtype=torch.float64)
        groups = torch.zeros(len(samples), dtype=torch.long)
        advantages = reward_advantages(self._spec.objective.advantage, rewards, groups)
        for sample, advantage in zip(samples, advantages.tolist(), strict=True):
            sample.advantage = advantage
        return samples

    async def _sample(self, batch: Batch, prompt: Prompt, sibling: int) -> list[Sample]:
        """One response, scored and graded; drawn anew where its score was unusable. Empty if there is none to have."""
        for attempt in range(TRIES):
            try:
                sample = await self._draw(batch, prompt, sibling, attempt)
                batch.generated_at = max(batch.generated_at, time.monotonic())
                if not sample.response_ids:
                    return []  # there is no token to learn from, and it must not reach the teacher
                await asyncio.gather(self._score(prompt, sample), self._grade(prompt, sample))
                return [sample]
            except RewardError as error:
                self._failed(batch, prompt, "reward", error)
                return []  # the same response would fail again, and another would not be the one that was drawn
            except BadScore as error:
                self._failed(batch, prompt, error.reason, error)
            except EngineRefused as error:
                # Not by its type's name: Ray hands on subclasses of what an actor raised.
                self._failed(batch, prompt, "engine", error)
        return []

    def _failed(self, batch: Batch, prompt: Prompt, reason: str, error: Exception) -> None:
        self._metrics.add("distill_samples_failed", 1, reason=reason)
        log.warning("step %d, prompt %d: a sample failed: %s", batch.step, prompt.index, error)

    async def _draw(self, batch: Batch, prompt: Prompt, sibling: int, attempt: int) -> Sample:
        rollout = self._spec.rollout
        response = await self._fleet.draw(
            prompt.ids,
            max_new_tokens=rollout.max_response_tokens,
            temperature=rollout.sampling.temperature,
            top_p=rollout.sampling.top_p,
            seed=sample_seed(self._spec.seed, batch.step, prompt.index, attempt * rollout.samples_per_prompt + sibling),
        )
        self._metrics.add("distill_tokens", len(response.ids), kind="rollout")
        return Sample(
            prompt_index=prompt.index,
            sibling=sibling,
            prompt_ids=prompt.ids,
            response_ids=response.ids,
            engine_logprobs=response.logprobs,
            token_versions=response.versions,
            truncated=response.truncated,
            source=prompt.source,
        )

    async def _score(self, prompt: Prompt, sample: Sample) -> None:
        sample.teacher, sample.coefficient = prompt.teacher, self._teachers.coefficient(prompt.teacher)
        scores = await self._teachers.of(prompt.teacher).score(sample.prompt_ids, sample.response_ids, self._top_k)
        sample.teacher_logprobs = scores.logprobs
        sample.teacher_top_ids, sample.teacher_top_logprobs = scores.top_ids, scores.top_logprobs
        self._metrics.add("distill_tokens", len(sample.response_ids), kind="teacher")

    async def _grade(self, prompt: Prompt, sample: Sample) -> None:
        if prompt.source in self._rewards:
            text = self._tokenizer.decode(sample.response_ids, skip_special_tokens=True)
            sample.reward = await self._rewards[prompt.source].score(prompt, text)
