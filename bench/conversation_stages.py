"""The real loop over conversations: the student's turns and its environment sleep, as the other stages do (stages.py).

An environment answers after a log-normal time whose mean is that of the student's turn: half of a conversation is a
wait for it. The conversations themselves are the real ones, over a played pool of environments with as many places as
are given.
"""

import asyncio
import contextlib
import functools
import itertools
import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import MEAN_CUT, PROMPTS, SIBLINGS, Engine, Stages, length_of, mean_step, staged, virtual

from distill_workers.data.sample import Prompt
from distill_workers.engine.request import Request, Response
from distill_workers.environments.fair_slots import FairSlots, Kind
from distill_workers.environments.pool import CONVERSATIONS
from distill_workers.environments.user_environment import Answer
from distill_workers.rollout.conversations.environment_episodes import EnvironmentEpisodes
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.pipeline import sample_seed

TURNS = 4
SIGMA = 0.75
"""Of the logarithm of an environment's time, as of the lengths of responses."""
BATCHES = 4
"""Over which the time of the conversations alone is averaged."""
PLACES = {"a place for each conversation": PROMPTS * SIBLINGS, f"{CONVERSATIONS} places": CONVERSATIONS}


@dataclass(frozen=True)
class ConversationStages(Stages):
    """Seconds of a step's stages; `generate` is of a single response, and `alone` of a batch's conversations, if they
    ran alone."""

    alone: float

    @property
    def longest(self) -> float:
        return max(self.alone, self.score, self.train)

    @property
    def one_after_another(self) -> float:
        return super().one_after_another - self.generate + self.alone


class TurnEngine(Engine):
    """Draws the turns of a conversation, which together are as long as a single response is on average."""

    async def _one(self, request: Request) -> Response:
        length, began_with = max(1, length_of(request.seed) // TURNS), self.version
        await asyncio.sleep(length * self._token_seconds)
        return Response([1] * length, [-1.0] * length, [began_with] * (length - 1) + [self.version], False)


class SleepingEnvironment:
    """Answers each turn but the last after a while."""

    def __init__(self, mean_seconds: float, seed: int) -> None:
        self._draw, self._mean, self._turns = random.Random(seed), mean_seconds, 0

    async def reset(self, row: Any) -> list[Any]:
        return []

    async def step(self, message: Any) -> Answer:
        await asyncio.sleep(self._draw.lognormvariate(math.log(self._mean) - SIGMA**2 / 2, SIGMA))
        self._turns += 1
        return Answer([{}], done=self._turns == TURNS)


class SleepingEnvironments:
    """A pool of as many places."""

    def __init__(self, mean_seconds: float, places: int) -> None:
        self._mean, self._slots, self._numbers = mean_seconds, FairSlots(places), itertools.count()

    @contextlib.asynccontextmanager
    async def conversation(self, kind: Kind) -> AsyncIterator[SleepingEnvironment]:
        async with self._slots.one(kind):
            yield SleepingEnvironment(self._mean, next(self._numbers))


class OneToken:
    """Renders each message as one token."""

    def opening(self, messages: list[Any], where: str) -> list[int]:
        return [1]

    def privileged_opening(self, messages: list[Any], prompt: Prompt, where: str) -> None:
        return None

    def continuation(self, messages: list[Any], where: str) -> list[int]:
        return [2]

    def text(self, ids: list[int]) -> str:
        return ""


def conversations(stages: Stages, places: int, spec: Any, engines: EnginePool) -> EnvironmentEpisodes:
    engine: Any = TurnEngine(stages)
    engines._engines[0] = engine
    engines._batchers[0]._engine = engine
    # In an environment's mean time the student draws a turn: MEAN_CUT / TURNS tokens.
    environments: Any = SleepingEnvironments(MEAN_CUT / TURNS * engine._token_seconds, places)
    renderers: Any = {"": OneToken()}  # the prompts of the stages name no source
    return EnvironmentEpisodes(spec, engines, environments, renderers)


def conversation_loop(stages: Stages, places: int, folder: Path, **rollout: Any) -> Any:
    return staged(
        stages,
        folder,
        episodes=functools.partial(conversations, stages, places),
        rollout={"environment": {"function": "bench:Sleeping", "maxTurns": TURNS}, **rollout},
    )


async def alone_seconds(stages: Stages, places: int, folder: Path) -> float:
    """Mean time of a batch's conversations that nothing runs beside."""
    _, rollouts = conversation_loop(stages, places, folder)
    episodes, prompts = rollouts._episodes, rollouts._cursor.next(PROMPTS)
    begin = asyncio.get_running_loop().time()
    for step in range(BATCHES):
        await asyncio.gather(
            *(
                episodes.samples(prompt, n, sample_seed(0, step, prompt.index, n))
                for prompt in prompts
                for n in range(SIBLINGS)
            )
        )
    return (asyncio.get_running_loop().time() - begin) / BATCHES


@functools.cache
def conversation_stages(places: int, seconds: float = 1.0) -> ConversationStages:
    """Stages of which the conversations are the longest, `seconds` if they run alone; by the virtual clock."""
    unit = virtual(lambda folder: alone_seconds(Stages(1, 0, 0), places, folder))
    return ConversationStages(seconds / unit, 0.25 * seconds, 0.5 * seconds, seconds)


async def conversation_step_seconds(
    stages: ConversationStages, places: int, *, max_policy_lag: int, partial: bool, steps: int, folder: Path
) -> float:
    """Mean time of a step whose responses are conversations, as stages.step_seconds has it of single responses."""
    loop, rollouts = conversation_loop(stages, places, folder, maxPolicyLag=max_policy_lag, partial=partial)
    return await mean_step(loop, rollouts, max_policy_lag + 1, steps)
