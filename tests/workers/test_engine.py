"""A rollout engine draws what its weights say, and a dead or hung server never holds up its caller."""

import os
import signal
import time
from typing import Any

import pytest
from conftest import TinyModel, hf_logprobs, spec_of

from distill_workers.engine.engine import Engine, EngineRefused, EngineUnavailable, read_response
from distill_workers.serving.server import shared_memory_files

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = list(range(40, 60))


async def test_log_probabilities_of_drawn_tokens_equal_those_of_transformers(
    engine: Any, tiny_model: TinyModel
) -> None:
    await engine.load_folder(str(tiny_model(0)), 0, 60)  # tests of another module may have pushed others
    responses = await engine.sample(PROMPT, seeds=[1, 2, 3], max_new_tokens=24)
    assert len(responses) == 3
    assert len({tuple(r.ids) for r in responses}) == 3, "siblings differ"
    for response in responses:
        assert response.versions == [0] * len(response.ids)
        assert response.truncated == (len(response.ids) == 24)
        assert response.logprobs == pytest.approx(hf_logprobs(tiny_model(0), PROMPT, response.ids), abs=1e-4)


async def test_a_refused_request_says_why_and_the_engine_lives_on(engine: Any) -> None:
    with pytest.raises(EngineRefused, match="context length"):
        await engine.sample([5] * 5000, seeds=[0], max_new_tokens=4)
    await engine.health()


async def test_a_paused_engine_is_healthy_and_goes_on_when_resumed(engine: Any) -> None:
    await engine.pause()
    await engine.health(timeout_seconds=10)
    await engine.resume()
    [response] = await engine.sample(PROMPT, seeds=[1], max_new_tokens=2)
    assert 1 <= len(response.ids) <= 2


async def test_a_hung_server_does_not_block_longer_than_the_timeout(engine: Any) -> None:
    pid = (await engine.info())["server_pid"]
    os.killpg(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(EngineUnavailable, match="not answered within 1 s"):
            await engine.sample(PROMPT, seeds=[0], max_new_tokens=4, timeout_seconds=1)
        with pytest.raises(EngineUnavailable):
            await engine.health(timeout_seconds=1)
        assert time.monotonic() - begin < 20
    finally:
        os.killpg(pid, signal.SIGCONT)
    await engine.health()


async def test_an_engine_that_was_not_started_is_unavailable(tiny_spec: Any, tmp_path: Any) -> None:
    fresh = Engine(tiny_spec, 9, host="127.0.0.1", port=None, log_folder=str(tmp_path))
    with pytest.raises(EngineUnavailable, match="has not been started"):
        await fresh.health()


async def test_the_same_seeds_draw_the_same_tokens_after_a_restart(tiny_model: TinyModel, tmp_path: Any) -> None:
    spec = spec_of(tiny_model(0), tiny_model(1), deterministic=True)
    engine = Engine(spec, 1, host="127.0.0.1", port=None, log_folder=str(tmp_path))
    try:
        await engine.start(str(tiny_model(0)))
        first = await engine.sample(PROMPT, seeds=[7, 8], max_new_tokens=16)
        # What was drawn before, and in which order, must not matter.
        await engine.sample(PROMPT[:7], seeds=[99], max_new_tokens=5)
        swapped = await engine.sample(PROMPT, seeds=[8, 7], max_new_tokens=16)
        assert [first[1], first[0]] == swapped
        assert first[0].ids != first[1].ids
        assert engine._server is not None and engine._server.pid is not None
        left = shared_memory_files(engine._server.pid)
        assert left, "SGLang's scheduler publishes its load there"
        await engine.start(str(tiny_model(0)))
        assert not any(os.path.exists(path) for path in left), "a killed server leaves nothing in shared memory"
        assert await engine.sample(PROMPT, seeds=[7, 8], max_new_tokens=16) == first, "to the last bit"
        assert first[0].logprobs == pytest.approx(hf_logprobs(tiny_model(0), PROMPT, first[0].ids), abs=1e-4)
    finally:
        await engine.stop()


async def test_seeded_draws_follow_the_distribution() -> None:
    import torch

    from distill_workers.cpu.seeded_sampling import sample

    logprobs = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, 4)
    sampled = sample(logprobs, torch.arange(4000), torch.full((4000,), 17)).flatten()
    shares = torch.bincount(sampled, minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


async def test_a_response_that_was_aborted_or_has_no_finite_log_probability_is_refused() -> None:
    def answer(reason: str, logprob: float | None) -> dict[str, Any]:
        return {
            "meta_info": {
                "finish_reason": {"type": reason},
                "output_token_logprobs": [[logprob, 5, None], [logprob, 6, None]],
                "weight_version": "3",
                "weight_versions": [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 2}],
            }
        }

    assert read_response(answer("stop", -1.0)).versions == [2, 3], "each token's own"
    with pytest.raises(EngineRefused, match="abort"):
        read_response(answer("abort", -1.0))
    with pytest.raises(EngineRefused, match="finite"):
        read_response(answer("stop", None))
