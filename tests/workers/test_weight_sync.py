"""New weights arrive in every engine that lives, and the ones that do not are named."""

import asyncio
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyModel, hf_logprobs, source_of, weights_of

from distill_workers.engine.engine import Response
from distill_workers.weight_sync import shared_memory
from distill_workers.weight_sync.base import EngineLost
from distill_workers.weight_sync.broadcast import DistributedSync
from distill_workers.weight_sync.disk import DiskSync
from distill_workers.weight_sync.shared_memory import SharedMemorySync

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = list(range(100, 120))


async def holds(engine: Any, model: Path, version: int) -> None:
    [response] = await engine.sample(PROMPT, seeds=[3], max_new_tokens=12)
    assert set(response.versions) == {version}
    assert response.logprobs == pytest.approx(hf_logprobs(model, PROMPT, response.ids), abs=1e-3)


@pytest.fixture(params=["distributed", "disk", "shared-memory"])
def sync(request: Any, tiny_spec: Any, tiny_model: TinyModel, tmp_path: Path) -> Any:
    if request.param == "disk":
        return DiskSync(tmp_path / "sync", tiny_model(0), bucket_bytes=200_000)
    if request.param == "shared-memory":
        return SharedMemorySync(bucket_bytes=200_000)
    return DistributedSync(tiny_spec, "127.0.0.1", timeout_seconds=20, bucket_bytes=200_000)


async def test_an_engine_has_the_weights_that_were_pushed(sync: Any, engine: Any, tiny_model: TinyModel) -> None:
    for version, seed in ((1, 2), (2, 0), (3, 2)):
        await sync.push(weights_of(tiny_model(seed)), version, {0: engine})
        await holds(engine, tiny_model(seed), version)
    await sync.close()


async def test_a_request_in_flight_goes_on_with_new_weights_and_each_token_names_its_own(
    sync: Any, engine: Any, tiny_model: TinyModel
) -> None:
    prompt = [7] * 30
    spanning: list[Response] = []
    for _ in range(10):  # a response may end by itself before the push, or begin after it
        if spanning:
            break
        await sync.push(weights_of(tiny_model(0)), 10, {0: engine})
        running = asyncio.create_task(engine.sample(prompt, seeds=[1, 2, 3, 4], max_new_tokens=400))
        await asyncio.sleep(0.3)
        await sync.push(weights_of(tiny_model(2)), 11, {0: engine})
        spanning = [response for response in await running if len(set(response.versions)) > 1]
    assert spanning
    for response in spanning:
        before, after = (response.versions.count(version) for version in (10, 11))
        assert response.versions == [10] * before + [11] * after
        # The new weights made the whole cache anew: their log-probs are those of a request that never knew others.
        by_version = [hf_logprobs(tiny_model(seed), prompt, response.ids) for seed in (0, 2)]
        expected = by_version[0][:before] + by_version[1][before:]
        assert response.logprobs == pytest.approx(expected, abs=1e-3)
    await holds(engine, tiny_model(2), 11)
    await sync.close()


async def test_tied_embeddings_can_be_pushed_through_a_folder(tmp_path: Path, tiny_model: TinyModel) -> None:
    sync = DiskSync(tmp_path, tiny_model(0))
    shared = torch.arange(16.0).view(4, 4)
    await sync.push(source_of([("a", shared), ("b", shared)]), 1, {})
    await sync.push(source_of([("a", shared), ("b", shared)]), 2, {})
    assert [p.name for p in tmp_path.iterdir()] == ["version-000002"], "the old folder is gone"
    assert (tmp_path / "version-000002" / "config.json").exists()


async def test_a_folder_of_weights_in_transit_is_one_that_transformers_reads(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    from transformers import AutoModelForCausalLM

    sync = DiskSync(tmp_path, tiny_model(0), bucket_bytes=200_000)
    await sync.push(weights_of(tiny_model(2)), 1, {})
    folder = tmp_path / "version-000001"
    assert len(list(folder.glob("*.safetensors"))) > 1
    read, expected = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, tiny_model(2)))
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


async def test_a_killed_engine_is_named_and_after_a_restart_a_push_to_it_works(
    engine: Any, tiny_spec: Any, tiny_model: TinyModel
) -> None:
    sync = DistributedSync(tiny_spec, "127.0.0.1", timeout_seconds=90)
    await sync.push(weights_of(tiny_model(0)), 1, {0: engine})
    os.kill((await engine.info())["server_pid"], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(EngineLost) as lost:
        await sync.push(weights_of(tiny_model(2)), 2, {0: engine})
    assert time.monotonic() - begin < 60
    assert list(lost.value.reasons) == [0]
    await engine.start(str(tiny_model(0)))
    await holds(engine, tiny_model(0), 0)
    await sync.push(weights_of(tiny_model(2)), 2, {0: engine})
    await holds(engine, tiny_model(2), 2)
    await sync.close()


async def test_an_engine_that_hangs_in_a_push_is_lost_after_the_timeout_and_the_others_get_the_weights(
    engine: Any, tiny_spec: Any, tiny_model: TinyModel, tmp_path: Path
) -> None:
    from distill_workers.engine.engine import Engine

    other = Engine(tiny_spec, 5, host="127.0.0.1", port=None, log_folder=str(tmp_path))
    sync = DistributedSync(tiny_spec, "127.0.0.1", timeout_seconds=15)
    try:
        await other.start(str(tiny_model(0)))
        await sync.push(weights_of(tiny_model(2)), 1, {0: engine, 1: other})
        for one in (engine, other):
            await holds(one, tiny_model(2), 1)
        pid, begin_update = (await other.info())["server_pid"], other.begin_update

        async def begin_and_hang() -> None:
            await begin_update()
            os.killpg(pid, signal.SIGSTOP)

        other.begin_update = begin_and_hang  # type: ignore[method-assign]
        weights, passes = weights_of(tiny_model(0)), 0

        def counted(buffers: Any) -> Any:
            nonlocal passes
            passes += 1
            return weights(buffers)

        begin = time.monotonic()
        with pytest.raises(EngineLost) as lost:
            await sync.push(counted, 2, {0: engine, 1: other})
        assert time.monotonic() - begin < 60
        assert list(lost.value.reasons) == [1]
        assert passes == 2, "the second attempt is a fresh pass"
        await holds(engine, tiny_model(0), 2)
        await sync.close()
    finally:
        await other.stop()


async def test_shared_memory_that_a_killed_run_left_behind_is_freed_by_the_next() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    left = shared_memory.FOLDER / f"{shared_memory.PREFIX}{ended.pid}-x"
    left.mkdir()
    first = SharedMemorySync()
    assert not left.exists()
    second = SharedMemorySync()
    mine = f"{shared_memory.PREFIX}{os.getpid()}-*"
    assert len(list(shared_memory.FOLDER.glob(mine))) >= 2, "that of a living process stays"
    await first.close()
    await second.close()


async def test_shared_memory_is_used_only_where_two_buckets_of_the_model_fit(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny_model(0) / "model.safetensors").stat().st_size
    assert shared_memory.bucket_bytes(tiny_model(0)) == 2 * size, "no more than the model can need"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * size - 1))
    assert shared_memory.bucket_bytes(tiny_model(0)) is None
