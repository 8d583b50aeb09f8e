"""The engine pool, over a real Ray and two real engines: one that dies in a push comes back with the same weights."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fork_servers
import pytest
import torch
from conftest import TinyModel, hf_logprobs, spec_of
from runs import arithmetic, servers_of
from safetensors.torch import load_file

from distill_api.base import API_VERSION, KIND
from distill_api.job import DistillationJob, parse_job
from distill_api.protocol import Variable
from distill_workers.engine.request import EngineUnavailable, Request
from distill_workers.metrics import Metrics
from distill_workers.rollout.engine_pool import EnginePool
from distill_workers.rollout.request_batching import RequestBatcher
from distill_workers.run_folder.run_folder import RunFolder
from distill_workers.weight_sync.broadcast import DistributedSync
from distill_workers.weight_sync.buckets import Buffers, WeightPass

PROMPT = list(range(40, 60))


async def holds(engine: Any, model: Path, version: int) -> None:
    [response] = await engine.generate([Request(PROMPT, 3, 8)])
    assert response.versions == [version] * len(response.ids)
    assert response.logprobs == pytest.approx(hf_logprobs(model, PROMPT, response.ids), abs=1e-3)


def job_of(tiny_model: TinyModel, tmp_path: Path) -> DistillationJob:
    rollout = {"replicas": 2, "maxPromptTokens": 256, "maxResponseTokens": 256}
    spec = spec_of(tiny_model(0), tiny_model(1), rollout=rollout, output={"path": str(tmp_path)})
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "local"}}
    return parse_job({**manifest, "spec": spec.model_dump(mode="json", by_alias=True)})


class Gone:
    """An engine whose RayCluster is deleted."""

    async def start(self, model: str) -> float:
        raise EngineUnavailable("no actor can be created")


def test_a_trainer_that_is_asked_to_go_does_not_wait_for_a_ray_that_is_gone(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a job is suspended: RayCluster and trainer are deleted together, and the engines go first."""
    tries, answered = threading.Event(), threading.Event()

    def connect(address: str) -> None:
        tries.set()
        answered.wait()

    monkeypatch.setenv(Variable.RAY, "ray://127.0.0.1:1")
    monkeypatch.setattr("distill_workers.engine.ray_connection.connect", connect)
    job = job_of(tiny_model, tmp_path)
    pool = EnginePool(job, RunFolder(job), Metrics())
    pool._engines = {0: Gone()}  # type: ignore[dict-item]  # all that is asked of it

    async def lose_everything_and_close() -> None:
        pool._scheduler.add(0)
        pool._mark_lost(0, "the pod is gone")
        async with asyncio.timeout(60):
            while not tries.is_set():
                await asyncio.sleep(0.05)
            await pool.close()

    try:
        asyncio.run(lose_everything_and_close())
        assert pool._ray._thread is not None
        assert pool._ray._thread.is_alive(), "it was closed before Ray answered"
    finally:
        # A thread that goes on would end the Ray of the tests after this one.
        answered.set()
        if pool._ray._thread is not None:
            pool._ray._thread.join(60)


class EndsWithItsRequests:
    """An engine whose requests end with it."""

    def __init__(self) -> None:
        self.stopped, self.starts, self.incarnation = asyncio.Event(), 0, 1

    async def generate(self, requests: list[Request]) -> Any:
        await self.stopped.wait()
        raise EngineUnavailable("the actor died")

    async def stop(self) -> None:
        self.stopped.set()
        await asyncio.sleep(0.05)

    async def start(self, model: str) -> float:
        self.starts += 1
        raise EngineUnavailable("the run is over")


async def test_a_request_that_ends_with_its_engine_at_the_end_of_a_run_starts_no_other(tmp_path: Path) -> None:
    """An agent's request that was given up is generated to the end, or to that of the run."""
    job = parse_job(arithmetic(tmp_path, "closed"))
    pool, engine = EnginePool(job, RunFolder(job), Metrics()), EndsWithItsRequests()
    pool._engines, pool._batchers = {0: engine}, {0: RequestBatcher(engine)}  # type: ignore[dict-item]
    pool._scheduler.add(0)
    request = asyncio.create_task(pool.generate([1], max_new_tokens=100, temperature=1.0, top_p=1.0, seed=1))
    await asyncio.sleep(0.01)
    await pool.close()
    assert engine.stopped.is_set() and engine.starts == 0 and not request.done()
    request.cancel()


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.timeout(600)
async def test_an_engine_killed_in_one_push_and_hung_in_others_holds_up_nobody_and_comes_back(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_workers.rollout.engine_pool.CATCH_UP_SECONDS", 10.0)
    job = job_of(tiny_model, tmp_path)
    folder = RunFolder(job)
    pool = EnginePool(job, folder, Metrics())
    weights = list(load_file(tiny_model(2) / "model.safetensors").items())
    thread = ThreadPoolExecutor(1)
    # The first push, and the one to the engine that came back; later the next one to both.
    passes, signals = 0, {1: signal.SIGKILL, 3: signal.SIGSTOP}
    try:
        await asyncio.to_thread(fork_servers.wait_until_preloaded)  # Ray starts within 30 s or not at all
        await pool.start(str(tiny_model(0)))
        pool._sync = DistributedSync(job.spec, "127.0.0.1", timeout_seconds=120, bucket_bytes=200_000)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for number, (name, tensor) in enumerate(weights):
                if passes in signals and number == len(weights) // 2:
                    for pid in servers_of(folder.root, engine=1):
                        os.kill(pid, signals[passes])
                yield name, tensor

        def source(buffers: Buffers) -> WeightPass:
            nonlocal passes
            passes += 1
            return WeightPass(thread, tensors, buffers)

        async def push(version: int) -> float:
            begin = time.monotonic()
            async with pool.updating_weights():
                await asyncio.get_running_loop().run_in_executor(thread, print, "a step of training")
                await pool.push(source, version)
            return time.monotonic() - begin

        assert await push(1) < 100, "the others did not wait for the dead one"
        assert pool._scheduler.open == {0}
        assert passes == 2, "what the first pass had sent is not trusted"
        await holds(pool._engines[0], tiny_model(2), 1)
        async with asyncio.timeout(200):
            while passes < 3:
                await asyncio.sleep(0.05)
        assert await push(2) < 60, "training goes on while the engine that came back hangs"
        assert pool._scheduler.open == {0}
        await holds(pool._engines[0], tiny_model(2), 2)
        async with asyncio.timeout(200):
            while pool._scheduler.open != {0, 1}:
                await asyncio.sleep(0.1)
        assert passes >= 5, "a pass of its own, or several on a busy machine"
        await holds(pool._engines[1], tiny_model(2), 2)
        monkeypatch.setattr("distill_workers.weight_sync.broadcast.PATIENCE_SECONDS", 5.0)
        signals[passes + 1] = signal.SIGSTOP
        assert await push(3) < 100, "neither the group's timeout nor a request's"
        assert pool._scheduler.open == {0}
        await holds(pool._engines[0], tiny_model(2), 3)
    finally:
        await pool.close()


class Ready:
    """An engine that starts at once."""

    def __init__(self, number: int, job: DistillationJob, *, local: bool, log_folder: str) -> None:
        self.number, self.incarnation, self.placed = number, 0, False

    async def start(self, model: str) -> float:
        self.incarnation += 1
        self.placed = True
        return 0.0


def test_engines_join_a_running_job_and_those_that_are_too_many_do_not_come_back(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tiny_model, tmp_path)
    file = tmp_path / "job.json"
    monkeypatch.setenv(Variable.RAY, "ray://127.0.0.1:1")
    monkeypatch.setenv(Variable.JOB_FILE, str(file))
    monkeypatch.setattr("distill_workers.rollout.engine_pool.RayEngine", Ready)
    monkeypatch.setattr("distill_workers.rollout.engine_pool.HEALTH_SECONDS", 0.01)

    def ask(replicas: int) -> None:
        manifest = job.model_dump(mode="json", by_alias=True, exclude_none=True)
        manifest["spec"]["rollout"]["replicas"] = replicas
        file.write_text(json.dumps(manifest))

    async def until(open_engines: set[int]) -> None:
        async with asyncio.timeout(60):
            while pool._scheduler.open != open_engines:
                await asyncio.sleep(0.01)

    async def live() -> None:
        for number in (0, 1):
            await pool._engines[number].start("")
            pool._scheduler.add(number)
        assert pool.count_placed() == 2
        ask(4)
        watch = asyncio.create_task(pool._check_health())
        await until({0, 1, 2, 3})
        assert pool.count_placed() == 4, "what is paid for"
        ask(3)
        async with asyncio.timeout(60):
            while pool._wanted != 3:
                await asyncio.sleep(0.01)
        pool._mark_lost(1, "its pod was taken away")
        async with asyncio.timeout(60):
            while 1 in pool._engines:
                await asyncio.sleep(0.01)
        await until({0, 2, 3})
        assert pool.count_placed() == 3
        # One that is lost by another cause is wanted still.
        pool._mark_lost(2, "it crashed")
        await until({0, 2, 3})
        file.write_text("nonsense")
        await asyncio.sleep(0.1)
        assert pool._wanted == 3
        watch.cancel()

    async def health(self: Any, timeout_seconds: float = 0.0) -> None:
        return None

    monkeypatch.setattr(Ready, "health", health, raising=False)
    pool = EnginePool(job, RunFolder(job), Metrics())
    asyncio.run(live())


def test_engines_are_checked_beside_each_other(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check here waits for the other's: one after the other they would never end."""
    checked = asyncio.Event()

    async def live() -> None:
        both = asyncio.Barrier(2)

        async def health(self: Any, timeout_seconds: float = 0.0) -> None:
            await both.wait()
            checked.set()

        monkeypatch.setattr(Ready, "health", health, raising=False)
        for number in (0, 1):
            pool._scheduler.add(number)
        watch = asyncio.create_task(pool._check_health())
        async with asyncio.timeout(60):
            await checked.wait()
        watch.cancel()

    monkeypatch.setattr("distill_workers.rollout.engine_pool.RayEngine", Ready)
    monkeypatch.setattr("distill_workers.rollout.engine_pool.HEALTH_SECONDS", 0.01)
    job = job_of(tiny_model, tmp_path)
    pool = EnginePool(job, RunFolder(job), Metrics())
    asyncio.run(live())
