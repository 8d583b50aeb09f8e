"""The weights leave the trainer in two buffers, as often as they are wanted, and no rank is left waiting."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks

from distill_workers.weight_sync.buckets import Bucket, Buffers, WeightPass, pack


def packed(tensors: list[tuple[str, torch.Tensor]], limit_bytes: int) -> list[list[str]]:
    def lend(size_bytes: int) -> tuple[int, torch.Tensor]:
        return 0, torch.empty(size_bytes, dtype=torch.uint8)

    return [bucket.names for bucket in pack(tensors, limit_bytes, lend)]


def buffers_of(limit_bytes: int) -> Buffers:
    return Buffers(limit_bytes, torch.device("cpu"))


def opened(bucket: Bucket) -> dict[str, torch.Tensor]:
    """Copies of the tensors of a bucket, found as SGLang and safetensors find them: one after another."""
    found, begin = {}, 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        found[name] = bucket.flat[begin:end].view(dtype).view(shape).clone()
        begin = end
    assert begin == len(bucket.flat)
    return found


def test_buckets_stay_below_the_limit_and_every_tensor_is_aligned() -> None:
    f32, half, odd = torch.zeros(10), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    tensors = [("a", f32), ("b", half), ("c", f32), ("d", odd), ("e", f32), ("f", torch.zeros(100)), ("g", half)]
    assert packed(tensors, 100) == [["a"], ["b", "c", "d"], ["e"], ["f"], ["g"]], "the first is a quarter at most"
    assert packed([("a", odd), ("b", odd), ("c", odd), ("d", f32)], 100) == [["a", "b", "c"], ["d"]]


async def test_the_next_bucket_is_filled_while_one_is_in_hand_and_never_more() -> None:
    taken: list[int] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(5):
            taken.append(i)
            yield str(i), torch.full((4,), float(i))

    with ThreadPoolExecutor(1) as thread:
        async with aclosing(WeightPass(thread, tensors, buffers_of(16))) as weights:
            seen = {}
            async for bucket in weights:
                # In hand: one. Filled: one. Known, since it did not fit into that one: one.
                async with asyncio.timeout(60):
                    while len(taken) < min(5, len(seen) + 3):
                        await asyncio.sleep(0.005)
                await asyncio.sleep(0.05)
                assert len(taken) == min(5, len(seen) + 3)
                assert bucket.last == (len(seen) == 4)
                seen |= opened(bucket)
    assert {name: tensor.tolist() for name, tensor in seen.items()} == {str(i): [float(i)] * 4 for i in range(5)}


async def test_a_pass_that_is_given_up_runs_to_its_end_and_the_next_begins_afresh() -> None:
    taken: list[int] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(6):
            taken.append(i)
            yield str(i), torch.full((4,), float(i))

    buffers = buffers_of(16)
    with ThreadPoolExecutor(1) as thread:
        async with aclosing(WeightPass(thread, tensors, buffers)) as weights:
            assert opened(await anext(weights))["0"].tolist() == [0.0] * 4
        async with aclosing(WeightPass(thread, tensors, buffers)) as weights:
            names = [bucket.names async for bucket in weights]
    assert names == [[str(i)] for i in range(6)]
    assert taken == [*range(6), *range(6)]


async def test_what_ends_a_pass_early_reaches_its_consumer() -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(4)
        yield "b", torch.zeros(4)
        raise RuntimeError("a rank is gone")

    with ThreadPoolExecutor(1) as thread:
        weights = WeightPass(thread, tensors, buffers_of(16))
        assert (await anext(weights)).names == ["a"]
        with pytest.raises(RuntimeError, match="a rank is gone"):
            await anext(weights)
        await weights.aclose()


def two_ranks(folder: Path) -> dict[str, Any]:
    """On each rank with tensor parallel 2: a pass given up, log-probs, and a whole pass with its tensors."""
    import torch.distributed as dist

    from distill_workers.megatron.student import MegatronStudent
    from distill_workers.run.trainer_ranks import TrainerRanks, follow

    student = MegatronStudent(make_spec(trainer=make_trainer(tensor=2, ranks=2)), folder)
    if dist.get_rank() != 0:
        follow(student)
        return {}

    async def drive() -> dict[str, Any]:
        ranks, buffers = TrainerRanks(student), buffers_of(20_000)
        async with aclosing(ranks.weights(buffers)) as weights:
            await anext(weights)
        await ranks.logprobs(make_samples(2))
        found: dict[str, Any] = {}
        buckets = []
        async with aclosing(ranks.weights(buffers)) as weights:
            async for bucket in weights:
                found |= {name: tensor.numpy() for name, tensor in opened(bucket).items()}
                buckets.append(len(bucket.flat))
        ranks.dismiss()
        return {"tensors": found, "buckets": buckets}

    return asyncio.run(drive())


def test_tensor_parallel_ranks_take_part_in_every_pass_also_in_one_that_is_given_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make_checkpoint(tmp_path)
    rank_0, _ = run_ranks(2, two_ranks, folder=tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert rank_0["tensors"].keys() == expected.keys()
    assert all((rank_0["tensors"][name] == tensor.numpy()).all() for name, tensor in expected.items())
    assert len(rank_0["buckets"]) > 3
