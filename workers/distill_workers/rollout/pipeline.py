"""The rollout pipeline: prompts in, scored samples out.

Each response is one task: an engine generates it, and at once the teacher scores it, the reward grades it and the
trainer may take it, while others are still being generated. Where rewards or divergences are compared within the group
of a prompt's samples, or within the step, these arrive as a whole. A batch is all prompts of one optimiser step: none
is swapped for one that happens to finish earlier, since that would prefer short responses. With maxPolicyLag n, the
tasks of the next n batches are already running; a task starts with whatever weights the engines have then, so pacing
alone keeps every sample within n steps. Of a spec with phases a batch has the objective of its step's phase, which is
known when its tasks begin (objective/phases.py).
"""

import asyncio
import hashlib
import logging
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any

from distill_api.spec.job_spec import RewardSource, Spec, Support, Truncated
from distill_api.spec.objective import Baseline
from distill_api.teacher.dataset_scores import DatasetResponses
from distill_workers.data.cursor import Cursor
from distill_workers.data.dataset_responses import given_sample, supervised_positions, supervised_sample
from distill_workers.data.sample import Prompt, Sample
from distill_workers.engine.engine import EngineRefused
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.metrics import Metrics
from distill_workers.objective.phases import Phases
from distill_workers.objective.weighting import outcome_weight
from distill_workers.rewards.base import Reward, RewardError
from distill_workers.rewards.graded_text import GradedText
from distill_workers.rollout.batch import Batch
from distill_workers.rollout.comparisons import set_advantages, set_baselines, set_baselines_of_step
from distill_workers.rollout.conversations.conversation_clock import ConversationClock
from distill_workers.rollout.conversations.episodes import Episodes
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.teacher.pool import BadScore, Scores
from distill_workers.teacher.teachers import Teachers

log = logging.getLogger(__name__)
TRIES = 3
"""Times that a response is generated before the step goes on without it."""


def sample_seed(seed: int, step: int, prompt: int, index_in_group: int, place: int | None = None) -> int:
    """Return the seed of one response. It does not depend on order, so that a resumed run samples the same tokens.

    `place` is that of the prompt in its batch, which may hold a prompt more than once.
    """
    text = f"{seed}/{step}/{prompt}/{index_in_group}" + ("" if place is None else f"/{place}")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class RolloutPipeline:
    """A pipeline from prompts to scored samples, batch by batch."""

    def __init__(
        self,
        spec: Spec,
        cursor: Cursor,
        engines: EnginePool,
        teachers: Teachers,
        rewards: Mapping[str, Reward],
        tokenizer: Any,
        metrics: Metrics,
        episodes: Episodes | None = None,
    ) -> None:
        """`episodes`: of a job with an environment, whose responses are whole conversations."""
        self._episodes = episodes
        self._spec, self._cursor, self._engines, self._teachers = spec, cursor, engines, teachers
        # By the name of a prompt's source; prompts of other sources have no reward.
        self._rewards, self._tokenizer, self._metrics = rewards, tokenizer, metrics
        self._graded_text = GradedText(tokenizer)
        chosen = {s.name: (s.reward or spec.objective.reward).source for s in spec.data.all_sources}
        self._rewarded = rewards.keys() | {n for n, source in chosen.items() if source is RewardSource.ENVIRONMENT}
        self._batches: dict[int, Batch] = {}
        self._prefetches: set[asyncio.Task[None]] = set()
        self.phases = Phases(spec)
        self._reference = spec.objective.reference

    def start_ahead(self, step: int, last_step: int) -> None:
        """Start the tasks of the batches of `step` and of the next maxPolicyLag steps."""
        for ahead in range(step, min(step + self._spec.rollout.max_policy_lag, last_step - 1) + 1):
            if ahead not in self._batches:
                self._batches[ahead] = self._launch(ahead)

    def take(self, step: int, last_step: int) -> Batch:
        """Return the batch of `step`, whose tasks run, as do those of the next maxPolicyLag steps."""
        self.start_ahead(step, last_step)
        return self._batches.pop(step)

    def put_back(self, batch: Batch) -> None:
        """Put back a batch that `take` returned, for the next `take` of its step."""
        self._batches[batch.step] = batch

    def cancel(self) -> None:
        """Cancel all tasks."""
        for batch in self._batches.values():
            batch.cancel()
        self._batches.clear()
        for prefetch in self._prefetches:
            prefetch.cancel()

    def _launch(self, step: int) -> Batch:
        spec, objective = self._spec, self.phases.objective(step)
        prompts = self._cursor.next(spec.rollout.prompts_per_step)
        batch = Batch(step, self._cursor.state(), objective)
        if objective.baseline is Baseline.BATCH_MEAN:
            batch.compare = partial(set_baselines_of_step, objective)
        supervised = supervised_positions(
            objective.dataset_share, spec.seed, step, len(prompts), spec.rollout.samples_per_prompt
        )
        parts: list[Coroutine[Any, Any, list[Sample]]] = []
        for place, prompt in enumerate(prompts):
            if place in supervised:
                parts.append(self._supervised(batch, prompt))
                continue
            self._prefetch(prompt)
            if prompt.source in self._rewarded or objective.baseline is Baseline.LEAVE_ONE_OUT:
                parts.append(self._group(batch, prompt, place))
            else:
                parts += [
                    self._sample(batch, prompt, place, index_in_group)
                    for index_in_group in range(spec.rollout.samples_per_prompt)
                ]
        batch.parts = [asyncio.create_task(part) for part in parts]
        return batch

    def _prefetch(self, prompt: Prompt) -> None:
        """Have teacher and reference cache the prompt while the student answers it."""
        if self._spec.rollout.samples_per_prompt == 1 or self._episodes is not None:
            return
        asked = [(prompt.teacher, prompt.teacher_ids)]
        if self._reference is not None:
            asked.append((self._reference, prompt.ids))
        for name, ids in asked:
            task = asyncio.create_task(self._teachers.of(name).prefetch(ids))
            self._prefetches.add(task)
            task.add_done_callback(self._prefetches.discard)

    async def _supervised(self, batch: Batch, prompt: Prompt) -> list[Sample]:
        """Return the data set's response, or the teacher's, scored by the teacher unless it is the target itself."""
        limit = self._spec.rollout.max_response_tokens
        try:
            if batch.objective.dataset_responses is DatasetResponses.TEACHER:
                written = await self._teachers.of(prompt.teacher).generate(prompt.teacher_ids, limit)
                if not written.ids:
                    raise BadScore("empty", "the teacher answered with nothing, and there is no token to learn from")
                sample = given_sample(prompt, written.ids, batch.step, truncated=written.truncated)
            else:
                sample = supervised_sample(prompt, self._tokenizer, limit, batch.step)
            if batch.objective.support is Support.TARGET:
                sample.teacher_logprobs = [0.0] * len(sample.response_ids)
            else:
                await self._score(batch, prompt, sample)
        except BadScore as error:
            self._failed(batch, prompt, error.reason, error)
            return []
        return [sample]

    async def _group(self, batch: Batch, prompt: Prompt, place: int) -> list[Sample]:
        """Return the samples of a prompt, with what compares each with the others: advantage and baseline."""
        indices = range(self._spec.rollout.samples_per_prompt)
        sampled = await asyncio.gather(*(self._sample(batch, prompt, place, index) for index in indices))
        responses = [samples for samples in sampled if samples]  # the samples of one share its reward
        if prompt.source in self._rewarded:
            set_advantages(batch.objective, responses)
        if batch.objective.baseline is Baseline.LEAVE_ONE_OUT:
            set_baselines(batch.objective, responses)
        return [sample for samples in responses for sample in samples]

    async def _sample(self, batch: Batch, prompt: Prompt, place: int, index_in_group: int) -> list[Sample]:
        """Return the samples of one response, scored and graded, or none; one without a usable score is made anew."""
        for attempt in range(TRIES):
            try:
                generated = await self._generate(batch, prompt, place, index_in_group, attempt)
                batch.note_generated()
                samples = [sample for sample in generated if not self._drops(batch, sample)]
                await asyncio.gather(
                    *(call for s in samples for call in (self._score(batch, prompt, s), self._grade(prompt, s)))
                )
                for sample in samples:
                    if prompt.source in self._rewarded:  # a conversation may have a reward where none is asked for
                        sample.coefficient *= outcome_weight(batch.objective.weighting, sample.reward)
                return samples
            except EnvironmentFailed as error:
                self._failed(batch, prompt, "environment", error)
                return []  # conversations that go well would be preferred
            except RewardError as error:
                self._failed(batch, prompt, "reward", error)
                return []  # the same response would fail again, and choosing another would bias the sampling
            except BadScore as error:
                self._failed(batch, prompt, error.reason, error)
            except EngineRefused as error:
                # Ray raises subclasses of what an actor raised, so the reason is not the type's name.
                self._failed(batch, prompt, "engine", error)
        return []

    def _drops(self, batch: Batch, sample: Sample) -> bool:
        """Return whether a sample is left out; another one in its place would prefer short responses."""
        if sample.truncated and self._spec.rollout.truncated is Truncated.DROP:
            self._metrics.add("distill_samples_failed", 1, reason="truncated")
            batch.failed.add("truncated", "cut off at rollout.maxResponseTokens, and rollout.truncated drops it")
            return True
        return not sample.response_ids  # there is no token to learn from, and no teacher can score it

    def _failed(self, batch: Batch, prompt: Prompt, reason: str, error: Exception) -> None:
        self._metrics.add("distill_samples_failed", 1, reason=reason)
        batch.failed.add(reason, error)
        log.warning("step %d, prompt %d: a sample failed: %s", batch.step, prompt.index, error)

    async def _generate(
        self, batch: Batch, prompt: Prompt, place: int, index_in_group: int, attempt: int
    ) -> list[Sample]:
        rollout = self._spec.rollout
        number = attempt * rollout.samples_per_prompt + index_in_group
        seed = sample_seed(self._spec.seed, batch.step, prompt.index, number, place)
        if self._episodes is not None:
            clock = ConversationClock()
            try:
                samples = await self._episodes.samples(prompt, index_in_group, seed, step=batch.step, clock=clock)
            finally:
                batch.note_conversation(clock)
            self._metrics.add("distill_tokens", sum(s.trained_tokens for s in samples), kind="rollout")
            return samples
        response = await self._engines.generate(
            prompt.ids,
            max_new_tokens=rollout.max_response_tokens,
            temperature=rollout.sampling.temperature,
            top_p=rollout.sampling.top_p,
            seed=seed,
        )
        self._metrics.add("distill_tokens", len(response.ids), kind="rollout")
        sample = Sample(
            prompt_index=prompt.index,
            index_in_group=index_in_group,
            prompt_ids=prompt.ids,
            response_ids=response.ids,
            engine_logprobs=response.logprobs,
            token_versions=response.versions,
            truncated=response.truncated,
            masked=response.truncated and rollout.truncated is Truncated.MASK,
            source=prompt.source,
            privileged_ids=prompt.privileged_ids,
        )
        return [sample]

    async def _score(self, batch: Batch, prompt: Prompt, sample: Sample) -> None:
        sample.teacher, sample.coefficient = prompt.teacher, self._teachers.coefficient(prompt.teacher)
        asked, said = sample.teacher_prompt_ids, sample.response_ids

        async def score() -> Scores:
            scores = await self._teachers.of(prompt.teacher).score(asked, said, batch.objective.teacher_top_k)
            self._metrics.add("distill_tokens", len(said), kind="teacher")
            return scores

        # Nobody says the student's own responses again: they would fill the volume.
        store = self._teachers.stores.get(prompt.teacher) if sample.supervised else None
        scored = score() if store is None else store.scored_once(asked, said, score)
        scores, sample.reference_logprobs = await asyncio.gather(scored, self._reference_logprobs(sample))
        sample.teacher_logprobs, sample.span_ends = scores.logprobs, scores.span_ends
        sample.teacher_version = scores.version
        if scores.unscored:
            trained = len(said) - scores.unscored
            sample.loss_mask = [*[True] * trained, *[False] * scores.unscored]
        sample.teacher_top_ids, sample.teacher_top_logprobs = scores.top_ids, scores.top_logprobs

    async def _reference_logprobs(self, sample: Sample) -> list[float]:
        if self._reference is None:
            return []
        return (await self._teachers.of(self._reference).score(sample.prompt_ids, sample.response_ids, None)).logprobs

    async def _grade(self, prompt: Prompt, sample: Sample) -> None:
        if prompt.source in self._rewards:
            text = self._graded_text(sample.response_ids)
            sample.reward = await self._rewards[prompt.source].score(prompt, text)
