"""The time that training waits for an environment is a stage of the step, and no time of the engines."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import test_rollout_pipeline as single_turns
from test_episodes import Engines, Played, Teacher, one_tool_then_done, pipeline

from distill_api.metrics import StepStage
from distill_workers.engine.engine import Response
from distill_workers.environments.fair_slots import FairSlots, Kind
from distill_workers.environments.pool import EnvironmentFailed
from distill_workers.environments.protocol import AssistantMessage
from distill_workers.environments.user_environment import Answer
from distill_workers.metrics import Metrics
from distill_workers.rollout.batch import Batch
from distill_workers.rollout.conversations.conversation_clock import ConversationClock
from distill_workers.run.step_clock import StepClock


class SlowEngines(Engines):
    """Engines that take so many seconds for a turn."""

    seconds = 0.0

    async def generate(self, prompt_ids: list[int], **fields: Any) -> Response:
        await asyncio.sleep(self.seconds)
        return await super().generate(prompt_ids, **fields)


class Slow(Played):
    """An environment that takes so many seconds for an answer."""

    seconds = 0.0

    async def step(self, message: AssistantMessage) -> Answer:
        await asyncio.sleep(self.seconds)
        return await super().step(message)


async def done(rollouts: Any) -> Batch:
    batch: Batch = rollouts.take(0, 1)
    _ = [part async for part in batch.arrivals(in_order=True)]
    return batch


@pytest.mark.parametrize(
    ("engine", "environment", "low", "high"), [(0.02, 0.2, 0.6, 1.0), (0.2, 0.02, 0.0, 0.4)], ids=["slow", "fast"]
)
async def test_the_share_of_the_environment_is_what_was_no_turn_of_the_student(
    engine: float, environment: float, low: float, high: float, tmp_path: Path
) -> None:
    engines, played = SlowEngines(), Slow(one_tool_then_done)
    engines.seconds, played.seconds = engine, environment
    batch = await done(pipeline(tmp_path, engines, played, Teacher(), Metrics()))
    assert batch.longest is not None and low < batch.longest.environment_share < high


async def test_an_environment_that_hangs_until_it_fails_is_what_was_waited_for(tmp_path: Path) -> None:
    """Its sample is not there to tell; the time would be the teacher's otherwise."""
    count = iter(range(9))

    class Hangs(Slow):
        async def step(self, message: AssistantMessage) -> Answer:
            if next(count) == 0:
                await asyncio.sleep(0.3)
                raise EnvironmentFailed("the environment took longer than 0.3 s")
            return await super().step(message)

    rollouts = pipeline(tmp_path, Engines(), Hangs(one_tool_then_done), Teacher(), Metrics(), samplesPerPrompt=2)
    begin = time.monotonic()
    batch = await done(rollouts)
    assert batch.longest is not None and batch.longest.environment_share > 0.9
    assert batch.generated_at - begin == pytest.approx(batch.longest.seconds, abs=0.1) and batch.longest.seconds >= 0.3


async def test_the_wait_for_the_turns_of_other_conversations_is_no_time_of_the_environment(tmp_path: Path) -> None:
    class OneAtATime(Played):
        slots = FairSlots(1)

        @contextlib.asynccontextmanager
        async def conversation(self, kind: Kind) -> AsyncIterator[Any]:
            async with self.slots.one(kind):
                yield self

    engines = SlowEngines()
    engines.seconds = 0.1
    rollouts = pipeline(tmp_path, engines, OneAtATime(one_tool_then_done), Teacher(), Metrics(), samplesPerPrompt=4)
    batch = await done(rollouts)
    assert len(engines.requests) > 4 and batch.longest is not None and batch.longest.environment_share < 0.5


async def test_a_turn_that_ends_after_its_conversation_counts_up_to_its_end() -> None:
    clock = ConversationClock()
    clock.begin()
    turn = asyncio.create_task(clock.generating(asyncio.sleep(0.4)))
    await asyncio.sleep(0.1)
    clock.stop()
    seconds = clock.seconds
    await turn
    assert clock.seconds == seconds and clock.environment_share == pytest.approx(0.0, abs=0.2)


async def test_a_conversation_that_never_began_counts_nothing() -> None:
    clock = ConversationClock()
    await asyncio.sleep(0.01)
    clock.stop()
    assert (clock.seconds, clock.environment_share) == (0.0, 0.0)


async def test_single_responses_wait_for_no_environment(tmp_path: Path) -> None:
    parts = (single_turns.Engines(set()), single_turns.Teacher({}))
    assert (await done(single_turns.pipeline(tmp_path, Metrics(), *parts))).longest is None


def test_the_wait_for_samples_is_split_by_the_share_of_the_environment() -> None:
    clock = StepClock()
    clock._waits.append((10.0, 20.0))
    clock.add(StepStage.ROLLOUT, 30.0, 31.0)  # the engines' own, between two weights
    assert clock.stages(18.0, 0.75) == {
        StepStage.WEIGHT_SYNC: 0.0,
        StepStage.TRAIN: 0.0,
        StepStage.ROLLOUT: 3.0,
        StepStage.TEACHER_SCORE: 2.0,
        StepStage.ENVIRONMENT: 6.0,
    }
    assert StepStage.ENVIRONMENT not in clock.stages(18.0)
