"""Ranks: torch.distributed and Megatron's groups, tensor x data x pipeline parallel."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: rank = (pipeline_rank x data_size + data_rank) x tensor_size + tensor_rank."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    pipeline_rank: int
    """The stage: 0 has the embedding, the last has the output head."""
    pipeline_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def in_first_replica(self) -> int:
        """The rank that holds the same shard in the first data parallel replica."""
        return self.pipeline_rank * self.data_size * self.tensor_size + self.tensor_rank


def initialise(tensor_size: int, pipeline_size: int, *, on_cpu: bool, timeout_seconds: int) -> Ranks:
    """Join the other ranks, named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Once for each process.

    gloo on a CPU; with CUDA, NCCL for tensors there and gloo for objects. Raises RuntimeError when a rank does not come
    within the timeout, as does every later collective: it must exceed the longest wait of a step.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        if not on_cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=pipeline_size,
            distributed_timeout_minutes=timeout_seconds / 60,
            # Those are for the distributed optimiser's checkpoints, which are not used.
            create_gloo_process_groups=False,
        )
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if found != (tensor_size, pipeline_size):
        raise ValueError(f"this process already has tensor x pipeline {found}, not {(tensor_size, pipeline_size)}")
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline_size,
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def gather_objects(own: T, group: dist.ProcessGroup) -> list[T]:
    """What each rank of the group gives, in their order, on each of them."""
    if group.size() == 1:
        return [own]
    parts: list[T] = [own] * group.size()
    dist.all_gather_object(parts, own, group=group)
    return parts


def shut_down() -> None:
    """Leave the groups; a later `initialise` joins anew."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
