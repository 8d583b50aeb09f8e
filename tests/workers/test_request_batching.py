"""What goes over to an engine together, and that nobody suffers for his neighbours."""

import asyncio

import pytest

from distill_workers.engine.engine import Engine
from distill_workers.engine.request import EngineRefused, EngineUnavailable, Request, Response
from distill_workers.rollout.request_batching import SHORT_TOKENS, RequestBatcher
from distill_workers.rollout.scheduler import SlotScheduler


class Played:
    """Answers a request after as many milliseconds as it asks for tokens; refuses the empty prompt."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gone = False

    async def generate(self, requests: list[Request]) -> list[Response]:
        self.calls.append([request.seed for request in requests])
        await asyncio.sleep(max(request.max_new_tokens for request in requests) / 1000)
        if self.gone:
            raise EngineUnavailable("the server has ended")
        if not all(request.prompt_ids for request in requests):
            raise EngineRefused("empty")
        return [Response([request.seed], [-1.0], [0], False) for request in requests]


def asked(seed: int, tokens: int = SHORT_TOKENS, prompt: int | None = 5) -> Request:
    return Request([] if prompt is None else [prompt], seed, tokens)


async def test_short_responses_of_one_moment_are_one_call_whatever_their_prompts() -> None:
    engine = Played()
    batcher = RequestBatcher(engine)
    found = await asyncio.gather(*(batcher.generate(asked(seed, prompt=seed // 2)) for seed in range(6)))
    assert [response.ids for response in found] == [[seed] for seed in range(6)]
    assert engine.calls == [[0, 1, 2, 3, 4, 5]]


async def test_slots_that_become_free_at_one_moment_are_filled_by_one_call() -> None:
    engine, scheduler = Played(), SlotScheduler(4)
    scheduler.add(0)
    batcher = RequestBatcher(engine)

    async def one(seed: int) -> None:
        number = await scheduler.acquire()
        await batcher.generate(asked(seed, tokens=2))
        scheduler.release(number)

    await asyncio.gather(*map(one, range(10)))
    assert engine.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_a_long_response_holds_back_no_other() -> None:
    engine = Played()
    batcher = RequestBatcher(engine)
    long = asyncio.create_task(batcher.generate(asked(1, tokens=60_000)))
    longish = asyncio.create_task(batcher.generate(asked(2, tokens=SHORT_TOKENS + 1)))
    short = [asyncio.create_task(batcher.generate(asked(seed, tokens=1))) for seed in (3, 4)]
    async with asyncio.timeout(60):
        await asyncio.gather(*short, longish)
    assert not long.done() and sorted(engine.calls) == [[1], [2], [3, 4]]
    long.cancel()


async def test_what_an_engine_refuses_is_refused_alone() -> None:
    engine = Played()
    batcher = RequestBatcher(engine)
    requests = [asked(1), asked(2, prompt=None), asked(3)]
    first, refused, third = await asyncio.gather(*map(batcher.generate, requests), return_exceptions=True)
    assert isinstance(first, Response) and isinstance(third, Response)
    assert isinstance(refused, EngineRefused)


async def test_an_engine_that_is_gone_is_gone_for_all_and_a_cancelled_one_is_not_missed() -> None:
    engine = Played()
    batcher = RequestBatcher(engine)
    waiting = [asyncio.create_task(batcher.generate(asked(seed))) for seed in range(3)]
    await asyncio.sleep(0.001)
    waiting[0].cancel()
    engine.gone = True
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in found] == [asyncio.CancelledError, EngineUnavailable, EngineUnavailable]


@pytest.mark.asyncio(loop_scope="session")
async def test_a_real_engine_answers_each_of_a_hand_over_and_outlives_the_one_it_refuses(engine: Engine) -> None:
    batcher = RequestBatcher(engine)
    prompts = [list(range(40, 60)), [5] * 5000, list(range(70, 75))]
    requests = [Request(prompt, 3, 8) for prompt in prompts]
    first, refused, third = await asyncio.gather(*map(batcher.generate, requests), return_exceptions=True)
    assert isinstance(refused, EngineRefused) and "context length" in str(refused)
    for response in (first, third):
        assert isinstance(response, Response) and 0 < len(response.ids) == len(response.logprobs) <= 8
