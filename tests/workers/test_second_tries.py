"""A task of reasoning-gym over turns: an answer that is not right is said to be wrong, and may be given again."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from distill_api.spec.environment import Environment
from distill_api.spec.prompts import ReasoningGym
from distill_workers.data.entries import Entry, reasoning_gym_entries
from distill_workers.data.findings import Findings
from distill_workers.data.prompts import SINGLE_TEACHER
from distill_workers.environments.pool import EnvironmentFailed, EnvironmentPool
from distill_workers.environments.protocol import AssistantMessage, Row

NAME = "distill_workers.environments.second_tries:SecondTries"


@pytest.fixture(scope="module")
def entry() -> Entry:
    [found] = reasoning_gym_entries(ReasoningGym(task="chain_sum", size=1), SINGLE_TEACHER, Findings())
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[EnvironmentPool]:
    made = EnvironmentPool(Environment(function=NAME))
    made.check()
    yield made
    await made.close()


def row_of(entry: Entry, **metadata: Any) -> Row:
    return Row([{"role": "user", "content": str(entry.question)}], entry.answer, metadata or entry.metadata)


async def said(pool: EnvironmentPool, entry: Entry, *texts: str) -> list[Any]:
    async with pool.conversation() as environment:
        await environment.reset(row_of(entry))
        return [await environment.step(AssistantMessage(text)) for text in texts]


async def test_a_right_answer_ends_the_conversation_with_the_tasks_reward(pool: EnvironmentPool, entry: Entry) -> None:
    [answer] = await said(pool, entry, f"I add. <answer>{entry.answer}</answer>")
    assert (answer.reward, answer.done) == (1.0, True)


async def test_a_wrong_answer_is_said_to_be_wrong_and_a_second_one_counts(pool: EnvironmentPool, entry: Entry) -> None:
    wrong, right = await said(pool, entry, "<answer>nonsense</answer>", f"<answer>{entry.answer}</answer>")
    assert not wrong.done and wrong.reward < 0.1
    [message] = wrong.messages
    assert message["role"] == "user" and "not right" in message["content"]
    assert right.done and wrong.reward + right.reward == pytest.approx(1.0)


async def test_the_reward_of_a_conversation_is_that_of_its_last_answer(pool: EnvironmentPool, entry: Entry) -> None:
    almost = f"<answer>it is {entry.answer}, I think</answer>"
    first, again = await said(pool, entry, almost, "")
    assert 0.0 < first.reward < 1.0, "the task gives a part for an answer in words"
    assert first.reward + again.reward == pytest.approx(0.0)


async def test_a_row_of_a_file_has_no_task(pool: EnvironmentPool, entry: Entry) -> None:
    with pytest.raises(EnvironmentFailed, match="the row was not made by reasoning-gym"):
        async with pool.conversation() as environment:
            await environment.reset(row_of(entry, level=2))
