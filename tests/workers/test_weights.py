"""New weights arrive in every engine that lives, and the ones that do not are named."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel, hf_logprobs
from safetensors.torch import load_file

from distill_workers.weights import DiskSync, DistributedSync, EngineLost, in_buckets

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = list(range(100, 120))


def tensors_of(model: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(model / "model.safetensors").items())


async def holds(engine: Any, model: Path, version: int) -> None:
    [response] = await engine.generate(PROMPT, seeds=[3], max_new_tokens=12)
    assert set(response.versions) == {version}
    assert response.logprobs == pytest.approx(hf_logprobs(model, PROMPT, response.ids), abs=1e-3)


@pytest.fixture(params=["distributed", "disk"])
def sync(request: Any, tiny_spec: Any, tiny_model: TinyModel, tmp_path: Path) -> Any:
    if request.param == "disk":
        return DiskSync(tmp_path / "sync", tiny_model(0))
    return DistributedSync(tiny_spec, "127.0.0.1", timeout_seconds=20, bucket_bytes=200_000)


async def test_an_engine_has_the_weights_that_were_pushed(sync: Any, engine: Any, tiny_model: TinyModel) -> None:
    for version, seed in ((1, 2), (2, 0), (3, 2)):
        await sync.push(tensors_of(tiny_model(seed)), version, {0: engine})
        await holds(engine, tiny_model(seed), version)
    await sync.close()


async def test_a_request_in_flight_survives_a_push_and_names_the_version_of_each_token(
    sync: Any, engine: Any, tiny_model: TinyModel
) -> None:
    await sync.push(tensors_of(tiny_model(0)), 10, {0: engine})
    running = asyncio.create_task(engine.generate([7] * 30, seeds=[1, 2], max_new_tokens=200))
    await asyncio.sleep(0.3)
    await sync.push(tensors_of(tiny_model(2)), 11, {0: engine})
    for response in await running:
        assert set(response.versions) == {10, 11} and response.versions == sorted(response.versions)
    await holds(engine, tiny_model(2), 11)
    await sync.close()


async def test_tied_embeddings_can_be_pushed_through_a_folder(tmp_path: Path, tiny_model: TinyModel) -> None:
    sync = DiskSync(tmp_path, tiny_model(0))
    shared = torch.ones(4, 4)
    await sync.push([("a", shared), ("b", shared)], 1, {})
    await sync.push([("a", shared), ("b", shared)], 2, {})
    assert [p.name for p in tmp_path.iterdir()] == ["version-000002"], "the old folder is gone"
    assert (tmp_path / "version-000002" / "config.json").exists()


async def test_a_killed_engine_is_named_and_after_a_restart_a_push_to_it_works(
    engine: Any, tiny_spec: Any, tiny_model: TinyModel
) -> None:
    sync = DistributedSync(tiny_spec, "127.0.0.1", timeout_seconds=20)
    await sync.push(tensors_of(tiny_model(0)), 1, {0: engine})
    os.kill((await engine.whereabouts())["server_pid"], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(EngineLost) as lost:
        await sync.push(tensors_of(tiny_model(2)), 2, {0: engine})
    assert time.monotonic() - begin < 15
    assert list(lost.value.reasons) == [0]
    await engine.start(str(tiny_model(0)))
    await holds(engine, tiny_model(0), 0)
    await sync.push(tensors_of(tiny_model(2)), 2, {0: engine})
    await holds(engine, tiny_model(2), 2)
    await sync.close()


async def test_an_engine_that_hangs_in_a_push_is_lost_after_the_timeout_and_the_others_get_the_weights(
    engine: Any, tiny_spec: Any, tiny_model: TinyModel, tmp_path: Path
) -> None:
    from distill_workers.engine import Engine

    other = Engine(tiny_spec, 5, host="127.0.0.1", port=None, log_folder=str(tmp_path))
    sync = DistributedSync(tiny_spec, "127.0.0.1", timeout_seconds=5)
    try:
        await other.start(str(tiny_model(0)))
        await sync.push(tensors_of(tiny_model(2)), 1, {0: engine, 1: other})
        for one in (engine, other):
            await holds(one, tiny_model(2), 1)
        pid, begin_update = (await other.whereabouts())["server_pid"], other.begin_update

        async def begin_and_hang() -> None:
            await begin_update()
            os.killpg(pid, signal.SIGSTOP)

        other.begin_update = begin_and_hang  # type: ignore[method-assign]
        begin = time.monotonic()
        with pytest.raises(EngineLost) as lost:
            await sync.push(tensors_of(tiny_model(0)), 2, {0: engine, 1: other})
        assert time.monotonic() - begin < 60
        assert list(lost.value.reasons) == [1]
        await holds(engine, tiny_model(0), 2)
        await sync.close()
    finally:
        await other.stop()


async def test_buckets_hold_one_type_and_stay_below_the_limit() -> None:
    f32, bf16 = torch.zeros(10), torch.zeros(10, dtype=torch.bfloat16)
    tensors = [("a", f32), ("b", f32), ("c", f32), ("d", bf16), ("e", torch.zeros(100)), ("f", bf16)]
    names = [[name for name, _ in bucket] for bucket in in_buckets(tensors, 80)]
    assert names == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
