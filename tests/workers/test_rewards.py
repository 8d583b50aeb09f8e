"""Rewards grade what they should, and one that fails or hangs fails its sample only."""

import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from distill_api.spec import Prompts, Reward
from distill_workers.failures import ConfigurationError
from distill_workers.prompts import load_prompts
from distill_workers.rewards import Called, RewardError, build_reward
from distill_workers.sample import Prompt


def prompt(answer: str | None, **metadata: Any) -> Prompt:
    return Prompt(index=3, ids=[1], text="?", answer=answer, metadata=metadata)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    made = types.ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", made)
    yield made


async def test_exact_match_ignores_space_around() -> None:
    reward = build_reward(Reward(source="exact-match"))
    assert await reward.score(prompt("42"), " 42\n") == 1.0
    assert await reward.score(prompt("42"), "It is 42") == 0.0


async def test_a_reference_answer_that_is_missing_is_named() -> None:
    with pytest.raises(RewardError, match=r"prompt 3 has no reference answer; set prompts\.answerField"):
        await build_reward(Reward(source="exact-match")).score(prompt(None), "x")


async def test_math_compares_values_not_texts() -> None:
    reward = build_reward(Reward(source="math"))
    assert await reward.score(prompt("1/2"), r"So the answer is \boxed{0.5}.") == 1.0
    assert await reward.score(prompt(r"\frac{3}{4}"), r"Thus \boxed{\frac{6}{8}}") == 1.0
    assert await reward.score(prompt("34"), r"I think \boxed{35}") == 0.0
    assert await reward.score(prompt("34"), "no number here") == 0.0


async def test_reasoning_gym_scores_with_the_task_itself() -> None:
    class Letters:
        chat_template = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    spec = Prompts.model_validate({"reasoningGym": {"task": "chain_sum", "size": 2}, "applyChatTemplate": False})
    [first, _] = load_prompts(spec, Letters(), 1000, None)
    reward = build_reward(Reward(source="reasoning-gym"))
    assert await reward.score(first, f"I add. <answer>{first.answer}</answer>") == 1.0
    assert await reward.score(first, f" {first.answer} ") == 1.0
    assert await reward.score(first, "<answer>nonsense</answer>") < 0.1
    with pytest.raises(RewardError, match="was not made by reasoning-gym"):
        await reward.score(prompt("1"), "1")


async def test_a_function_of_the_user_gets_response_answer_and_metadata(module: Any) -> None:
    module.grade = lambda response, answer, metadata: len(response) + len(answer) + metadata["x"]
    reward = build_reward(Reward(source="python", function="my_rewards:grade"))
    assert await reward.score(prompt("ab", x=10), "abc") == 15.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None])
async def test_a_reward_that_is_no_number_fails_the_sample(module: Any, value: Any) -> None:
    module.grade = lambda response, answer, metadata: value
    with pytest.raises(RewardError):
        await build_reward(Reward(source="python", function="my_rewards:grade")).score(prompt("a"), "b")


async def test_a_reward_that_raises_fails_the_sample(module: Any) -> None:
    def grade(response: str, answer: str, metadata: Any) -> float:
        raise KeyError("where")

    module.grade = grade
    with pytest.raises(RewardError, match="KeyError"):
        await build_reward(Reward(source="python", function="my_rewards:grade")).score(prompt("a"), "b")


def sleepy(prompt: Prompt, response: str) -> float:
    time.sleep(30 if response == "hang" else 0)
    return 1.0


@pytest.mark.parametrize("processes", [False, True])
async def test_a_reward_that_hangs_is_cut_off_and_the_next_one_works(processes: bool) -> None:
    reward = Called(sleepy, processes=processes, timeout_seconds=2.0 if not processes else 8.0)
    assert await reward.score(prompt("a"), "b") == 1.0
    reward._timeout = 0.5
    with pytest.raises(RewardError, match="took longer than"):
        await reward.score(prompt("a"), "hang")
    reward._timeout = 20.0
    assert await reward.score(prompt("a"), "b") == 1.0


@pytest.mark.parametrize("function", ["no_such_module:f", "math:no_such", "math:pi"])
def test_a_function_that_is_none_is_a_fault_of_the_job(function: str) -> None:
    with pytest.raises(ConfigurationError, match=function):
        build_reward(Reward(source="python", function=function))
