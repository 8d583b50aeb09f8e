"""Scores are right, a wrong answer fails its sample only, and the pool uses its replicas well."""

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web
from conftest import TinyModel, hf_logprobs, spec_of

import distill_workers.teacher.pool as module
from distill_workers.serving.ports import reserve_port
from distill_workers.teacher import replicas
from distill_workers.teacher.pool import BadScore, TeacherPool, TeacherUnreachable
from distill_workers.teacher.protocol import TeacherRequest
from distill_workers.teacher.sglang_protocol import read_scores, scoring_request

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT, RESPONSE = list(range(60, 110)), [200, 301, 17, 2]


class Observed:
    """Stands for Metrics."""

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.retries = self.waiting = self.most_waiting = 0

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        if name == "distill_teacher_retries":
            self.retries += 1
            return
        assert name == "distill_teacher_requests"
        self.codes[labels["code"]] += 1

    def observe(self, name: str, value: float, **labels: str) -> None:
        assert name == "distill_teacher_request_duration_seconds"
        self.seconds.append(value)

    def change(self, name: str, amount: float) -> None:
        assert name == "distill_teacher_queue_depth"
        self.waiting += int(amount)
        self.most_waiting = max(self.most_waiting, self.waiting)


@pytest_asyncio.fixture(loop_scope="session")
async def real(teacher_server: Any, tiny_spec: Any) -> Any:
    pool = TeacherPool(f"127.0.0.1:{teacher_server.port}", tiny_spec, Observed())
    await pool.start(60)
    yield pool
    await pool.close()


async def test_scores_equal_the_log_probabilities_of_transformers(real: TeacherPool, tiny_model: TinyModel) -> None:
    scores = await real.score(PROMPT, RESPONSE, None)
    assert scores.logprobs == pytest.approx(hf_logprobs(tiny_model(1), PROMPT, RESPONSE), abs=1e-4)
    assert scores.top_ids is None and scores.top_logprobs is None


async def test_siblings_scored_from_the_prefix_cache_are_as_right(real: TeacherPool, tiny_model: TinyModel) -> None:
    responses = [[i, 2 * i, 2] for i in range(3, 12)]
    results = await asyncio.gather(*(real.score(PROMPT, r, None) for r in responses))
    for response, scores in zip(responses, results, strict=True):
        assert scores.logprobs == pytest.approx(hf_logprobs(tiny_model(1), PROMPT, response), abs=1e-4)


async def test_a_prompt_of_one_token_is_scored(real: TeacherPool, tiny_model: TinyModel) -> None:
    scores = await real.score([9], RESPONSE, None)
    assert scores.logprobs == pytest.approx(hf_logprobs(tiny_model(1), [9], RESPONSE), abs=1e-4)


async def test_the_likeliest_tokens_come_in_order_with_their_log_probabilities(
    real: TeacherPool, tiny_model: TinyModel
) -> None:
    scores = await real.score(PROMPT, RESPONSE, 5)
    assert scores.top_ids is not None and scores.top_logprobs is not None
    assert scores.top_ids.shape == scores.top_logprobs.shape == (len(RESPONSE), 5)
    rows = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    for place, (ids, logprobs) in enumerate(rows):
        assert logprobs == sorted(logprobs, reverse=True)
        before = PROMPT + RESPONSE[:place]
        for token, logprob in zip(ids, logprobs, strict=True):
            assert hf_logprobs(tiny_model(1), before, [token])[0] == pytest.approx(logprob, abs=1e-4)


async def test_a_token_outside_the_vocabulary_is_never_sent(real: TeacherPool) -> None:
    with pytest.raises(BadScore, match="vocabulary of 512"):
        await real.score(PROMPT, [512], None)
    assert (await real.score(PROMPT, [511], None)).logprobs[0] < 0, "the last id is scored, though echoed as 0"


async def test_an_empty_response_is_never_sent(real: TeacherPool) -> None:
    with pytest.raises(BadScore) as error:
        await real.score(PROMPT, [], None)
    assert error.value.reason == "empty"


async def test_a_sequence_longer_than_the_teachers_context_fails_the_sample(real: TeacherPool) -> None:
    with pytest.raises(BadScore, match="context length") as error:
        await real.score([5] * 3000, RESPONSE, None)
    assert error.value.reason == "refused"


async def test_the_teacher_answers_greedily_and_names_its_tokens(real: TeacherPool, tiny_model: TinyModel) -> None:
    from transformers import AutoTokenizer

    written = await real.generate(PROMPT, 6)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(1))
    assert 1 <= len(written.ids) <= 6 and written.truncated == (written.ids[-1] != tokenizer.eos_token_id)
    assert written == await real.generate(PROMPT, 6)
    probed = [0, 1, 2, 30, 300]
    assert await real.token_texts(probed) == [tokenizer.decode([i]) for i in probed]


# --- what no well-behaved server does ---------------------------------------------------------------------------


Answer = Callable[[dict[str, Any]], Awaitable[web.Response]]


def good(body: dict[str, Any]) -> dict[str, Any]:
    ids, start = body["input_ids"], body["logprob_start_len"]
    entries = [[None if place == 0 else -1.5, i, None] for place, i in enumerate(ids[start:])]
    info: dict[str, Any] = {"input_token_logprobs": entries}
    if k := body.get("top_logprobs_num"):
        assert body["return_flat_raw_top_logprobs"] and body["return_flat_raw_top_logprobs_b64"]
        rows = len(entries) - 1
        info |= {
            "input_top_logprobs_idx_flat_b64": packed(np.tile(np.arange(k, dtype="<i4"), rows)),
            "input_top_logprobs_val_flat_b64": packed(np.tile(-1.5 - np.arange(k, dtype="<f4"), rows)),
            "input_top_logprobs_idx_flat_b64_dtype": "int32",
            "input_top_logprobs_val_flat_b64_dtype": "float32",
            "input_top_logprobs_shape": [rows, k],
            "input_top_logprobs_null_prefix": 1,
        }
    return {"meta_info": info}


def packed(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


class Fake:
    """An HTTP server that answers /generate as it is told to, and remembers what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.most_busy = 0
        self.answer: Answer = self.well
        self.port = reserve_port()

    async def well(self, body: dict[str, Any]) -> web.Response:
        return web.json_response(good(body))

    async def start(self) -> None:
        async def handle(request: web.Request) -> web.Response:
            body = await request.json()
            if "token_ids_logprob" in body:
                return web.json_response({"error": {"message": "valid range is [0, 1000)."}}, status=400)
            self.bodies.append(body)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            try:
                return await self.answer(body)
            finally:
                self.busy -= 1

        app = web.Application()
        app.router.add_post("/generate", handle)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        await self.runner.cleanup()


@pytest_asyncio.fixture(loop_scope="session")
async def fakes() -> Any:
    servers = [Fake(), Fake()]
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        await server.stop()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(replicas, "BREAK_SECONDS", (0.4, 0.4))


async def pool_of(*fakes: Fake, timeout: int = 30, concurrency: int = 32, unreachable: float = 20.0) -> TeacherPool:
    from pathlib import Path

    teacher = {"model": "/t", "requestTimeoutSeconds": timeout, "maxConcurrentRequests": concurrency}
    spec = spec_of(Path("/s"), Path("/t"), teacher=teacher)
    address = ",".join(f"127.0.0.1:{f.port}" for f in fakes)
    pool = TeacherPool(address, spec, Observed(), unreachable_seconds=unreachable)
    await pool.start(20)
    return pool


def corrupt(change: Callable[[dict[str, Any]], Any]) -> Answer:
    async def answer(body: dict[str, Any]) -> web.Response:
        message = good(body)
        changed = change(message["meta_info"])
        text = changed if isinstance(changed, str) else json.dumps(message)
        return web.Response(text=text, content_type="application/json")

    return answer


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("wrong_count", lambda info: info["input_token_logprobs"].pop()),
        ("wrong_count", lambda info: info["input_token_logprobs"].append([-1.0, 5, None])),
        ("wrong_tokens", lambda info: info["input_token_logprobs"][2].__setitem__(1, 999)),
        ("not_finite", lambda info: info["input_token_logprobs"][2].__setitem__(0, None)),
        ("malformed", lambda info: info["input_token_logprobs"][2].__setitem__(0, float("nan"))),
        ("malformed", lambda info: info["input_token_logprobs"][2].__setitem__(0, [])),
        ("positive", lambda info: info["input_token_logprobs"][1].__setitem__(0, 0.5)),
        ("malformed", lambda info: info.pop("input_token_logprobs")),
        ("malformed", lambda info: "no JSON"),
        ("malformed", lambda info: "[]"),
    ],
)
async def test_an_answer_that_cannot_be_right_fails_the_sample_with_a_reason(
    fakes: Any, reason: str, change: Any
) -> None:
    fakes[0].answer = corrupt(change)
    pool = await pool_of(fakes[0])
    with pytest.raises(BadScore) as error:
        await pool.score(PROMPT, RESPONSE, None)
    assert error.value.reason == reason
    assert len(fakes[0].bodies) == 1, "it is not asked again"
    await pool.close()


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("malformed", {"input_top_logprobs_val_flat_b64": None}),
        ("malformed", {"input_top_logprobs_val_flat_b64": "no base64!"}),
        ("malformed", {"input_top_logprobs_val_flat_b64": packed(np.zeros(7, "<f4"))}),
        ("malformed", {"input_top_logprobs_val_flat_b64_dtype": "float16"}),
        ("wrong_count", {"input_top_logprobs_shape": [3, 2]}),
        ("wrong_count", {"input_top_logprobs_null_prefix": 2}),
        ("not_finite", {"input_top_logprobs_val_flat_b64": packed(np.full(8, np.nan, "<f4"))}),
        ("not_finite", {"input_top_logprobs_val_flat_b64": packed(np.full(8, -np.inf, "<f4"))}),
        ("positive", {"input_top_logprobs_val_flat_b64": packed(np.full(8, 0.5, "<f4"))}),
        ("wrong_tokens", {"input_top_logprobs_idx_flat_b64": packed(np.full(8, 1000, "<i4"))}),
        ("wrong_tokens", {"input_top_logprobs_idx_flat_b64": packed(np.full(8, -1, "<i4"))}),
    ],
)
async def test_likeliest_tokens_that_cannot_be_right_fail_the_sample(reason: str, change: dict[str, Any]) -> None:
    answer = good(scoring_request(PROMPT, RESPONSE, 2))
    scores = read_scores(answer, len(PROMPT), RESPONSE, 2, 1000)
    assert scores.top_ids is not None and scores.top_ids.tolist() == [[0, 1]] * 4
    assert scores.top_logprobs is not None and scores.top_logprobs.tolist() == [[-1.5, -2.5]] * 4
    answer["meta_info"] |= change
    with pytest.raises(BadScore) as error:
        read_scores(answer, len(PROMPT), RESPONSE, 2, 1000)
    assert error.value.reason == reason


async def test_a_server_that_sends_no_flat_arrays_is_told_what_it_must_be() -> None:
    answer = good(scoring_request(PROMPT, RESPONSE, None))
    with pytest.raises(BadScore, match="must be an SGLang that knows return_flat_raw_top_logprobs_b64"):
        read_scores(answer, len(PROMPT), RESPONSE, 2)


async def test_a_rounding_error_above_zero_becomes_zero() -> None:
    answer = good(scoring_request(PROMPT, RESPONSE, None))
    answer["meta_info"]["input_token_logprobs"][1][0] = 5e-5
    assert read_scores(answer, len(PROMPT), RESPONSE, None).logprobs == [0.0, -1.5, -1.5, -1.5]


async def test_a_bad_score_survives_pickling() -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(BadScore("positive", "because")))
    assert (copy.reason, str(copy)) == ("positive", "positive: because")


async def test_server_errors_are_tried_again_elsewhere(fakes: Any, fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BREAK_SECONDS", (60.0, 60.0))

    async def broken(body: dict[str, Any]) -> web.Response:
        return web.Response(status=503)

    fakes[0].answer = broken
    pool = await pool_of(*fakes)
    for prompt in range(8):
        assert (await pool.score([prompt], RESPONSE, None)).logprobs == [-1.5] * 4
    assert len(fakes[0].bodies) == replicas.BREAK_AFTER, "then it is left alone"
    assert pool._observer.retries == replicas.BREAK_AFTER  # type: ignore[attr-defined]
    assert pool._observer.codes["503"] == replicas.BREAK_AFTER  # type: ignore[attr-defined]
    await pool.close()


async def test_a_replica_that_was_left_alone_is_tried_again_later(fakes: Any, fast: None) -> None:
    failing = True

    async def sometimes(body: dict[str, Any]) -> web.Response:
        return web.Response(status=500) if failing else web.json_response(good(body))

    fakes[0].answer = sometimes
    pool = await pool_of(*fakes)
    for prompt in range(6):
        await pool.score([prompt], RESPONSE, None)
    failing = False
    await asyncio.sleep(0.5)
    before = len(fakes[0].bodies)
    await asyncio.gather(*(pool.score([prompt], RESPONSE, None) for prompt in range(8)))
    assert len(fakes[0].bodies) > before
    await pool.close()


async def test_an_overload_that_refuses_all_requests_at_once_costs_the_shortest_pause() -> None:
    replica, sent = replicas.Replica("127.0.0.1:1", asyncio.Semaphore(1)), time.monotonic()
    for _ in range(32):
        replica.failed(sent)
    assert replica.open_until - replica.skipped_at == pytest.approx(replicas.BREAK_SECONDS[0])
    replica.failed(replica.skipped_at + 0.001)
    assert replica.open_until - replica.skipped_at == pytest.approx(2 * replicas.BREAK_SECONDS[0]), "it fails still"


async def test_what_waits_for_a_free_slot_is_the_queue(fakes: Any) -> None:
    pool = await pool_of(fakes[0], concurrency=2)
    await asyncio.gather(*(pool.score([prompt], RESPONSE, None) for prompt in range(7)))
    observed: Any = pool._observer
    assert (observed.most_waiting, observed.waiting) == (5, 0)
    await pool.close()


async def test_a_request_that_takes_too_long_is_sent_again(fakes: Any, fast: None) -> None:
    async def slow(body: dict[str, Any]) -> web.Response:
        if len(fakes[0].bodies) == 1:
            await asyncio.sleep(5)
        return web.json_response(good(body))

    fakes[0].answer = slow
    pool = await pool_of(fakes[0], timeout=1)
    assert (await pool.score(PROMPT, RESPONSE, None)).logprobs == [-1.5] * 4
    assert len(fakes[0].bodies) == 2
    await pool.close()


async def test_one_request_that_always_fails_does_not_end_the_job(fakes: Any, fast: None) -> None:
    async def picky(body: dict[str, Any]) -> web.Response:
        return web.Response(status=500) if body["input_ids"][0] == 3 else web.json_response(good(body))

    for fake in fakes:
        fake.answer = picky
    pool = await pool_of(*fakes)

    async def others() -> None:
        while True:
            await pool.score([4], RESPONSE, None)
            await asyncio.sleep(0.02)

    background = asyncio.create_task(others())
    with pytest.raises(BadScore) as error:
        await pool.score([3], RESPONSE, None)
    background.cancel()
    assert error.value.reason == "failed"
    await pool.close()


async def test_a_request_outlives_a_server_that_is_away_although_others_succeeded_after_it_was_made(
    fakes: Any, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its response would be generated anew, from another seed: a deterministic run would be another one."""
    monkeypatch.setattr(replicas, "BREAK_SECONDS", (0.02, 0.02))
    killed = False

    async def held(body: dict[str, Any]) -> web.Response:
        if body["input_ids"][0] == 3 and not killed:
            await asyncio.sleep(600)
        return web.json_response(good(body))

    fakes[0].answer = held
    pool = await pool_of(fakes[0], unreachable=60.0)
    request = asyncio.create_task(pool.score([3], RESPONSE, None))
    await until(lambda: fakes[0].busy == 1)
    await pool.score([4], RESPONSE, None)
    killed = True
    await fakes[0].stop()
    observed: Any = pool._observer
    await until(lambda: request.done() or observed.retries > 2 * module.TRIES)
    await fakes[0].start()
    assert (await request).logprobs == [-1.5] * 4
    await pool.close()


async def test_a_pool_that_is_gone_is_an_error_with_a_sentence(fakes: Any, fast: None) -> None:
    pool = await pool_of(*fakes, unreachable=1.0)
    for fake in fakes:
        await fake.stop()
    with pytest.raises(TeacherUnreachable, match=r"no teacher at 127\.0\.0\.1:\d+, .* answered for 1 s"):
        await pool.score(PROMPT, RESPONSE, None)
    await pool.close()


async def test_a_teacher_that_starts_late_is_waited_for(fakes: Any, fast: None) -> None:
    await fakes[0].stop()
    waiting = asyncio.create_task(pool_of(fakes[0]))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    await fakes[0].start()
    pool = await waiting
    await pool.score(PROMPT, RESPONSE, None)
    await pool.close()


async def test_a_name_without_an_address_is_unreachable(tiny_spec: Any, fast: None) -> None:
    pool = TeacherPool("no-such-host.invalid:30000", tiny_spec, Observed())
    with pytest.raises(TeacherUnreachable, match="no address"):
        await pool.start(1)
    await pool.close()


async def until(true: Callable[[], bool]) -> None:
    """Wait until it is true, and a little longer: what follows may assert that it is no more than that."""
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)


async def test_the_first_sibling_goes_alone_and_the_others_follow_to_its_replica(fakes: Any) -> None:
    answered = asyncio.Event()

    async def held(body: dict[str, Any]) -> web.Response:
        await answered.wait()
        return web.json_response(good(body))

    for fake in fakes:
        fake.answer = held
    pool = await pool_of(*fakes)
    prompts = [[number] * 400 for number in range(4)]
    tasks = [
        asyncio.create_task(pool.score(p, [1, index_in_group], None)) for p in prompts for index_in_group in range(5)
    ]
    await until(lambda: sum(len(f.bodies) for f in fakes) >= 4)
    assert sum(len(f.bodies) for f in fakes) == 4, "one of each prompt while no prefix is cached"
    answered.set()
    await asyncio.gather(*tasks)
    for fake in fakes:
        counts = Counter(body["input_ids"][0] for body in fake.bodies)
        assert len(counts) == 2, "two prompts each"
        assert set(counts.values()) == {5}, "and all their siblings"
    await pool.close()


async def test_siblings_go_elsewhere_rather_than_wait_for_more_than_their_prompt(fakes: Any) -> None:
    async def slowly(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.1)
        return web.json_response(good(body))

    for fake in fakes:
        fake.answer = slowly
    pool = await pool_of(*fakes)
    await asyncio.gather(*(pool.score([1] * 40, [2] * 400, None) for _ in range(9)))
    assert min(len(f.bodies) for f in fakes) >= 3
    await pool.close()


async def test_a_failed_first_sibling_does_not_hold_up_the_others(fakes: Any, fast: None) -> None:
    fakes[0].answer = corrupt(lambda info: info.pop("input_token_logprobs"))
    pool = await pool_of(fakes[0])
    results = await asyncio.gather(*(pool.score(PROMPT, RESPONSE, None) for _ in range(4)), return_exceptions=True)
    assert all(isinstance(r, BadScore) for r in results)
    await pool.close()


async def test_after_a_prefetch_no_sibling_goes_alone(fakes: Any) -> None:
    prefetched, answered = asyncio.Event(), asyncio.Event()

    async def held(body: dict[str, Any]) -> web.Response:
        await (prefetched if len(body["input_ids"]) == 400 else answered).wait()
        return web.json_response(good(body))

    for fake in fakes:
        fake.answer = held
    pool = await pool_of(*fakes)
    prompts = [[number] * 400 for number in range(2)]
    ahead = [asyncio.create_task(pool.prefetch(p)) for p in prompts]
    await until(lambda: [f.busy for f in fakes] == [1, 1])
    tasks = [
        asyncio.create_task(pool.score(p, [1, index_in_group], None)) for p in prompts for index_in_group in range(3)
    ]
    await asyncio.sleep(0.05)
    assert [len(f.bodies) for f in fakes] == [1, 1], "siblings wait for a prefetch under way"
    prefetched.set()
    await asyncio.gather(*ahead)
    await until(lambda: [f.busy for f in fakes] == [3, 3])  # all at once
    answered.set()
    await asyncio.gather(*tasks)
    for fake in fakes:
        assert len({body["input_ids"][0] for body in fake.bodies}) == 1, "to where the prompt is"
        assert len(fake.bodies[0]["input_ids"]) == 400 and fake.bodies[0]["logprob_start_len"] == 399
    await pool.close()


async def test_after_a_failed_prefetch_the_first_sibling_goes_alone(fakes: Any, fast: None) -> None:
    prefetched, answered = asyncio.Event(), asyncio.Event()

    async def answer(body: dict[str, Any]) -> web.Response:
        ahead = len(body["input_ids"]) == 400
        await (prefetched if ahead else answered).wait()
        return web.Response(status=500) if ahead else web.json_response(good(body))

    fakes[0].answer = answer
    pool = await pool_of(fakes[0])
    prompt = [7] * 400
    tasks = [asyncio.create_task(pool.prefetch(prompt))]
    await until(lambda: fakes[0].busy == 1)
    tasks += [asyncio.create_task(pool.score(prompt, [1, index_in_group], None)) for index_in_group in range(3)]
    prefetched.set()
    await until(lambda: len(fakes[0].bodies) >= 2)
    assert [len(body["input_ids"]) for body in fakes[0].bodies] == [400, 402], "one alone, after the prefetch"
    answered.set()
    await asyncio.gather(*tasks)
    assert len(fakes[0].bodies) == 4
    await pool.close()


async def test_a_prefetch_that_cannot_be_sent_raises_nothing(fakes: Any, fast: None) -> None:
    pool = await pool_of(fakes[0])
    await pool.prefetch([2000] * 40)  # outside the vocabulary
    await pool.prefetch([1] * 31)  # too short to be worth it
    assert not fakes[0].bodies
    await fakes[0].stop()
    await pool.prefetch([1] * 40)
    await pool.close()
    await pool.prefetch([2] * 40)


async def test_a_prompt_that_its_replica_has_lost_is_sent_alone_again(fakes: Any) -> None:
    cached = 0

    async def answer(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.03)
        message = good(body)
        message["meta_info"]["cached_tokens"] = cached
        return web.json_response(message)

    fakes[0].answer = answer
    pool = await pool_of(fakes[0])
    first, second, third = ([number] * 400 for number in range(3))
    await pool.prefetch(first)
    await pool.prefetch(second)
    await pool.score(first, RESPONSE, None)  # finds nothing: 400 tokens went through the cache since
    cached = 399
    fakes[0].most_busy = 0

    await asyncio.gather(*(pool.score(third, RESPONSE, None) for _ in range(3)))
    assert fakes[0].most_busy == 2, "one alone, then two"
    fakes[0].most_busy = 0
    await asyncio.gather(*(pool.score(third, RESPONSE, None) for _ in range(3)))
    assert fakes[0].most_busy == 3, "none alone: it was used just now"
    fakes[0].most_busy = 0
    await asyncio.gather(*(pool.score(second, RESPONSE, None) for _ in range(3)))
    assert fakes[0].most_busy == 2, "one alone: more than 200 tokens have gone through since"
    sent = len(fakes[0].bodies)
    await pool.prefetch(first)
    await pool.prefetch(first)
    assert len(fakes[0].bodies) == sent + 1, "prefetched again, once"
    await pool.close()


async def test_prefetches_leave_slots_for_scoring(fakes: Any) -> None:
    async def slowly(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.02)
        return web.json_response(good(body))

    fakes[0].answer = slowly
    pool = await pool_of(fakes[0])
    await asyncio.gather(*(pool.prefetch([number] * 40) for number in range(20)))
    assert fakes[0].most_busy == module.PREFETCHES
    await pool.close()


async def test_a_prefetched_prompt_is_in_the_servers_cache(real: TeacherPool, tiny_model: TinyModel) -> None:
    prompt = list(range(300, 380))
    await real.prefetch(prompt)
    replica = real._replicas.least_loaded()
    assert replica is not None
    answer = await real._send(replica, TeacherRequest("/generate", scoring_request(prompt, RESPONSE, None)), 84, 30)
    assert answer["meta_info"]["cached_tokens"] == len(prompt) - 1
    assert (await real.score(prompt, RESPONSE, None)).logprobs == pytest.approx(
        hf_logprobs(tiny_model(1), prompt, RESPONSE), abs=1e-4
    )


async def test_a_replica_never_has_more_requests_than_it_is_allowed(fakes: Any) -> None:
    async def slowly(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.02)
        return web.json_response(good(body))

    fakes[0].answer = slowly
    pool = await pool_of(fakes[0], concurrency=3)
    await asyncio.gather(*(pool.score([number], RESPONSE, None) for number in range(20)))
    assert fakes[0].most_busy == 3
    await pool.close()


async def test_the_backlog_of_a_teacher_is_what_waits_for_its_turn_and_what_is_under_way(fakes: Any) -> None:
    release = asyncio.Event()

    async def held(body: dict[str, Any]) -> web.Response:
        await release.wait()
        return web.json_response(good(body))

    pool = await pool_of(fakes[0], concurrency=2)
    fakes[0].answer = held
    asked = [asyncio.create_task(pool.score([number], RESPONSE, None)) for number in range(7)]
    while fakes[0].busy < 2:
        await asyncio.sleep(0.01)
    assert (pool.requests, fakes[0].busy) == (7, 2)
    release.set()
    await asyncio.gather(*asked)
    assert pool.requests == 0
    await pool.close()


async def test_addresses_that_join_and_leave_the_service_are_followed(
    fakes: Any, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fakes
    addresses = [first]

    async def lookup(host: str, port: int, type: int = 0) -> Any:
        return [(2, 1, 6, "", ("127.0.0.1", fake.port)) for fake in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    pool = await pool_of(first)
    await pool.score([1], RESPONSE, None)
    monkeypatch.setattr(replicas, "RESOLVE_SECONDS", 0.0)
    addresses[:] = [second]
    await pool.score([2], RESPONSE, None)
    assert [body["input_ids"][0] for body in first.bodies] == [1]
    assert [body["input_ids"][0] for body in second.bodies] == [1, 2], "first what the other has scored, to compare"
    await pool.close()


async def test_a_replica_that_joins_later_and_scores_otherwise_gets_no_requests(
    fakes: Any, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fakes
    addresses = [first]

    async def lookup(host: str, port: int, type: int = 0) -> Any:
        return [(2, 1, 6, "", ("127.0.0.1", fake.port)) for fake in addresses]

    def half_a_nat_off(info: dict[str, Any]) -> None:
        for entry in info["input_token_logprobs"][1:]:
            entry[0] -= 0.5

    second.answer = corrupt(half_a_nat_off)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    monkeypatch.setattr(replicas, "RESOLVE_SECONDS", 0.0)
    pool = await pool_of(first, unreachable=1.0)
    await pool.score([1], RESPONSE, None)
    addresses.append(second)
    for prompt in range(2, 8):
        assert (await pool.score([prompt], RESPONSE, None)).logprobs == [-1.5] * 4
        await asyncio.sleep(0.01)
    assert [body["input_ids"][0] for body in second.bodies] == [1]
    assert pool._observer.codes["disagrees"] == 1  # type: ignore[attr-defined]
    addresses.remove(first)
    with pytest.raises(TeacherUnreachable, match=rf"last: 127.0.0.1:{second.port}: joined later, and scores otherwise"):
        await pool.score([9], RESPONSE, None)
    await pool.close()
