"""The fleet, over a real Ray and two real engines: one that dies in a push comes back with the same weights."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel, hf_logprobs, spec_of
from safetensors.torch import load_file

from distill_api.base import API_VERSION, KIND
from distill_api.job import parse_job
from distill_workers.buckets import Buffers, Pass
from distill_workers.fleet import Fleet
from distill_workers.metrics import Metrics
from distill_workers.runfolder import RunFolder
from distill_workers.weights import DistributedSync

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = list(range(40, 60))


async def holds(engine: Any, model: Path, version: int) -> None:
    [response] = await engine.generate(PROMPT, [3], 8)
    assert response.versions == [version] * len(response.ids)
    assert response.logprobs == pytest.approx(hf_logprobs(model, PROMPT, response.ids), abs=1e-3)


async def test_an_engine_killed_in_a_push_gets_the_weights_later_by_a_pass_of_its_own(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    rollout = {"replicas": 2, "maxPromptTokens": 256, "maxResponseTokens": 256}
    spec = spec_of(tiny_model(0), tiny_model(1), rollout=rollout, output={"path": str(tmp_path)})
    manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "local"}}
    job = parse_job({**manifest, "spec": spec.model_dump(mode="json", by_alias=True)})
    fleet = Fleet(job, RunFolder(job), Metrics())
    weights = list(load_file(tiny_model(2) / "model.safetensors").items())
    thread = ThreadPoolExecutor(1)
    passes = 0
    try:
        await fleet.start(str(tiny_model(0)))
        fleet._sync = DistributedSync(spec, "127.0.0.1", timeout_seconds=30, bucket_bytes=200_000)
        victim: Any = fleet._engines[1]
        pid = (await victim.whereabouts())["server_pid"]

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for number, (name, tensor) in enumerate(weights):
                if passes == 1 and number == len(weights) // 2:
                    os.kill(pid, signal.SIGKILL)
                yield name, tensor

        def source(buffers: Buffers) -> Pass:
            nonlocal passes
            passes += 1
            return Pass(thread, tensors, buffers)

        async with fleet.weights_change():
            begin = time.monotonic()
            await fleet.push(source, 1)
            assert time.monotonic() - begin < 30, "the others did not wait for the dead one"
        assert fleet._slots.open == {0}
        assert passes == 2, "what the first pass had sent is not trusted"
        await holds(fleet._engines[0], tiny_model(2), 1)
        async with asyncio.timeout(90):
            while fleet._slots.open != {0, 1}:
                await asyncio.sleep(0.1)
        assert passes == 3
        await holds(victim, tiny_model(2), 1)
    finally:
        await fleet.close()
