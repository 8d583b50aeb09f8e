"""Rewards grade what they should, and one that fails or hangs fails its sample only."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from distill_api.spec.job_spec import Prompts, ReasoningGym, Reward, RewardSource, Spec
from distill_workers.data.entries import reasoning_gym_entries
from distill_workers.data.findings import Findings
from distill_workers.data.prompts import SINGLE_TEACHER, load_prompts
from distill_workers.data.sample import Prompt
from distill_workers.metrics import Metrics
from distill_workers.rewards import http
from distill_workers.rewards.base import Grade, RewardError
from distill_workers.rewards.build import build_reward, build_rewards
from distill_workers.rewards.function import FunctionReward
from distill_workers.serving.ports import reserve_port


def reward_of(**fields: Any) -> Any:
    return build_reward(Reward.model_validate(fields), Metrics())


def prompt(answer: str | None, **metadata: Any) -> Prompt:
    return Prompt(index=3, ids=[1], text="?", answer=answer, metadata=metadata)


async def test_exact_match_ignores_space_around() -> None:
    reward = reward_of(source="exact-match")
    assert await reward.score(prompt("42"), " 42\n") == 1.0
    assert await reward.score(prompt("42"), "It is 42") == 0.0


async def test_a_reference_answer_that_is_missing_is_named() -> None:
    with pytest.raises(RewardError, match=r"prompt 3 has no reference answer; set prompts\.answerField"):
        await reward_of(source="exact-match").score(prompt(None), "x")


async def test_math_compares_values_not_texts() -> None:
    reward = reward_of(source="math")
    assert await reward.score(prompt("1/2"), r"So the answer is \boxed{0.5}.") == 1.0
    assert await reward.score(prompt(r"\frac{3}{4}"), r"Thus \boxed{\frac{6}{8}}") == 1.0
    assert await reward.score(prompt("34"), r"I think \boxed{35}") == 0.0
    assert await reward.score(prompt("34"), "no number here") == 0.0


async def test_reasoning_gym_scores_with_the_task_itself() -> None:
    class Letters:
        chat_template = None

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(c) for c in text] for text in texts]}

    spec = Prompts.model_validate({"reasoningGym": {"task": "chain_sum", "size": 2}, "applyChatTemplate": False})
    [first, _], _ = load_prompts(spec, Letters(), 1000, None)
    reward = reward_of(source="reasoning-gym")
    assert await reward.score(first, f"I add. <answer>{first.answer}</answer>") == 1.0
    assert await reward.score(first, f" {first.answer} ") == 1.0
    assert await reward.score(first, "<answer>nonsense</answer>") < 0.1
    with pytest.raises(RewardError, match="was not made by reasoning-gym"):
        await reward.score(prompt("1"), "1")


async def test_a_task_of_reasoning_gym_with_a_list_among_its_options_is_graded() -> None:
    task = ReasoningGym.model_validate(
        {"task": "polynomial_multiplication", "size": 1, "options": {"variables": ["x", "y"]}}
    )
    [entry] = reasoning_gym_entries(task, SINGLE_TEACHER, Findings())
    asked = Prompt(0, [], str(entry.question), entry.answer, entry.metadata)
    assert await reward_of(source="reasoning-gym").score(asked, f"<answer>{entry.answer}</answer>") == 1.0


def sleepy(prompt: Prompt, response: str) -> Grade:
    time.sleep(10 if response == "hang" else 0)
    return Grade(1.0, response, "whole response")


@pytest.mark.parametrize("processes", [False, True])
async def test_a_reward_that_hangs_is_ended_and_takes_no_other_with_it(processes: bool) -> None:
    """A process takes longer to start than the reward may: that is not held against it."""
    reward = FunctionReward(sleepy, processes, timeout_seconds=3)
    texts = ["a", "hang", "b", "c", "d", "e"]
    found = await asyncio.gather(*(reward.score(prompt("a"), t) for t in texts), return_exceptions=True)
    assert [str(f) for f in found] == ["1.0", "the reward took longer than 3 s", *["1.0"] * 4]
    assert await reward.score(prompt("a"), "b") == 1.0
    await reward.close()


def deadly(prompt: Prompt, response: str) -> Grade:
    os._exit(1)


async def test_a_reward_whose_process_dies_fails_its_sample() -> None:
    reward = FunctionReward(deadly, True, timeout_seconds=20)
    with pytest.raises(RewardError, match="process died"):
        await reward.score(prompt("a"), "b")
    await reward.close()


class Service:
    """A reward's service: answers what `answers` holds, in turn, and the last of it for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str]] = [(200, '{"reward": 0.5}')]
        self.asked: list[Any] = []
        self.delay = 0.0
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        await asyncio.sleep(self.delay)
        status, text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, text=text)


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", (0.01, 0.02))
    made, app, port = Service(), web.Application(), reserve_port()
    app.router.add_post("/score", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    made.url = f"http://127.0.0.1:{port}/score"
    yield made
    await runner.cleanup()


async def ask(url: str, metrics: Metrics | None = None, **fields: Any) -> float:
    reward = build_reward(Reward(source=RewardSource.HTTP, url=url, **fields), metrics or Metrics())
    try:
        return await reward.score(prompt("4", level=2), "It is 4")
    finally:
        await reward.close()


def requests(metrics: Metrics) -> dict[str, float]:
    lines = [x for x in metrics.text().decode().splitlines() if x.startswith("distill_reward_requests_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


async def test_a_service_is_sent_all_that_a_reward_needs(service: Service) -> None:
    assert await ask(service.url) == 0.5
    assert service.asked == [{"prompt": "?", "response": "It is 4", "answer": "4", "metadata": {"level": 2}}]


async def test_a_service_that_is_busy_is_asked_again_and_every_request_is_counted(service: Service) -> None:
    service.answers = [(503, "starting"), (429, "slow down"), (200, '{"reward": 1}')]
    metrics = Metrics()
    assert await ask(service.url, metrics, retries=2) == 1.0
    assert requests(metrics) == {"503": 1.0, "429": 1.0, "200": 1.0}


async def test_a_service_that_stays_down_fails_the_sample_after_its_retries(service: Service) -> None:
    service.answers = [(500, "out of memory")]
    with pytest.raises(RewardError, match=r"3 requests failed; the last: answered 500: out of memory"):
        await ask(service.url, retries=2)
    assert len(service.asked) == 3


async def test_a_service_that_is_not_there_or_too_slow_fails_the_sample(service: Service) -> None:
    metrics = Metrics()
    with pytest.raises(RewardError, match="2 requests failed; the last: ClientConnectorError"):
        await ask(f"http://127.0.0.1:{reserve_port()}/", metrics, retries=1)
    assert requests(metrics) == {"error": 2.0}
    service.delay = 1.5
    with pytest.raises(RewardError, match="1 requests failed; the last: not answered within 1 s"):
        await ask(service.url, retries=0, timeout_seconds=1)


@pytest.mark.parametrize(
    "text",
    ["", "0.5", "[]", "{}", '{"reward": "1"}', '{"reward": true}', '{"reward": NaN}', '{"reward": 1' + "0" * 400 + "}"],
)
async def test_an_answer_that_is_no_reward_fails_the_sample_at_once(service: Service, text: str) -> None:
    service.answers = [(200, text)]
    with pytest.raises(RewardError, match=r"it must be \{\"reward\": NUMBER\}"):
        await ask(service.url)
    assert len(service.asked) == 1


async def test_a_refusal_is_not_asked_again(service: Service) -> None:
    service.answers = [(422, "no field answer")]
    with pytest.raises(RewardError, match="answered 422: no field answer"):
        await ask(service.url)
    assert len(service.asked) == 1


def test_a_source_has_its_own_reward_and_else_that_of_the_objective() -> None:
    where = {"path": "/data/a.jsonl", "answerField": "answer"}
    sources = [
        {"name": "plain", "prompts": where},
        {"name": "own", "prompts": where, "reward": {"source": "math"}},
        {"name": "none", "prompts": where, "reward": {"source": "none"}},
        {"name": "same", "prompts": where, "reward": {"source": "exact-match"}},
    ]
    spec = Spec.model_validate(
        {
            "student": {"model": "/m"},
            "teacher": {"model": "/m"},
            "data": {"sources": sources},
            "objective": {"reward": {"source": "exact-match"}},
            "schedule": {"steps": 1},
        }
    )
    found = build_rewards(spec, Metrics())
    assert found.keys() == {"plain", "own", "same"}
    assert found["plain"] is found["same"] is not found["own"]
