"""Ranks: torch.distributed and Megatron's groups, tensor x context x data x pipeline parallel.

Ranks that differ in context or data alone are replicas: they hold the same parameters. Experts are the exception: with
expert parallelism, so many replicas in a row have a part of each layer's experts each, and their tokens meet there.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from distill_api.spec.job_spec import Parallelism

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of this process: rank = (pipeline_rank x replicas + replica) x tensor_size + tensor_rank."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    """Which part of each sequence."""
    context_size: int
    data_rank: int
    """Which share of the samples."""
    data_size: int
    expert_size: int
    pipeline_rank: int
    """The pipeline stage: 0 has the embedding, the last has the output head."""
    pipeline_size: int
    device: torch.device
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    """Data x context."""
    pipeline_group: dist.ProcessGroup

    @property
    def is_last_pipeline_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def replicas(self) -> int:
        return self.data_size * self.context_size

    @property
    def replica(self) -> int:
        return self.data_rank * self.context_size + self.context_rank

    @property
    def expert_rank(self) -> int:
        """Which part of each layer's experts."""
        return self.replica % self.expert_size

    def is_first(self, *, with_experts: bool = False) -> bool:
        """Return whether this is the first replica that holds its parameters, or its experts."""
        return self.replica < (self.expert_size if with_experts else 1)


def initialise(split: Parallelism, *, on_cpu: bool, timeout_seconds: int) -> Ranks:
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
            tensor_model_parallel_size=split.tensor,
            pipeline_model_parallel_size=split.pipeline,
            context_parallel_size=split.context,
            expert_model_parallel_size=split.expert,
            distributed_timeout_minutes=timeout_seconds / 60,
            # Those are for the distributed optimiser's checkpoints, which are not used.
            create_gloo_process_groups=False,
        )
    wanted = (split.tensor, split.pipeline, split.context, split.expert)
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    if found != wanted:
        raise ValueError(f"this process already has tensor x pipeline x context x expert {found}, not {wanted}")
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=split.tensor,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=split.context,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_size=split.expert,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=split.pipeline,
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def gather_shards(shard: torch.Tensor, ranks: Ranks) -> list[torch.Tensor] | None:
    """Return the parts of all tensor parallel ranks on the first of them; None on the others."""
    if ranks.tensor_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(ranks.tensor_size)] if ranks.tensor_rank == 0 else None
    dist.gather(shard, shards, dst=dist.get_global_rank(ranks.tensor_group, 0), group=ranks.tensor_group)
    return shards


def gather_objects(own: T, group: dist.ProcessGroup) -> list[T]:
    """Return the objects of all ranks of the group, in their order, on each of them."""
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
