"""Exact state of the trainer's ranks: parameters, optimiser, random numbers. One file for each rank.

Data parallel replicas hold equal parameters and moments: the first replica writes them, the others only their random
numbers, and their own part of the moments where those are split (optimizer.distributed). A checkpoint is read by the
layout that wrote it; another is refused (the moments would have to be split anew).
"""

import os
from pathlib import Path
from typing import Any

import torch

from distill_workers.megatron.parallel import Ranks

FORMAT = 2


class IncompatibleCheckpoint(ValueError):
    """The checkpoint cannot be continued by these ranks."""


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def save(folder: Path, ranks: Ranks, model: torch.nn.Module, optimizer: Any) -> None:
    """Write this rank's file into an existing folder and wait until it is on disk. The caller renames the folder."""
    content: dict[str, Any] = {"format": FORMAT, "layout": _layout(ranks, optimizer), "random": _random_state()}
    if ranks.data_rank == 0:
        content["parameters"] = {name: p.detach() for name, p in model.named_parameters()}
    if ranks.data_rank == 0 or _is_distributed(optimizer):
        content["optimizers"] = [
            {"inner": part.optimizer.state_dict(), "main": [p.detach() for p in _main_parameters(part)]}
            for part in optimizer.chained_optimizers
        ]
    with rank_file(folder, ranks.rank).open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path, ranks: Ranks, model: torch.nn.Module, optimizer: Any) -> None:
    """Restore what `save` wrote, to the last bit. Raises IncompatibleCheckpoint when another layout wrote it."""
    own = _read(folder, ranks.rank)
    written = own["layout"]
    if own["format"] != FORMAT:
        raise IncompatibleCheckpoint(
            f"{folder} has format {own['format']}, and this version reads {FORMAT}: continue it with the version that "
            "wrote it, or begin in a new folder"
        )
    if written != _layout(ranks, optimizer):
        raise IncompatibleCheckpoint(
            f"{folder} was written by {written['world_size']} ranks with parallelism.tensor {written['tensor_size']} "
            f"and pipeline {written['pipeline_size']}; this trainer has {ranks.world_size} with {ranks.tensor_size} "
            f"and {ranks.pipeline_size}. Set nodes, gpusPerNode, parallelism and optimizer.distributed as they were."
        )
    shared = own if ranks.data_rank == 0 else _read(folder, ranks.in_first_replica)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shared["parameters"][name])
        moments = own if _is_distributed(optimizer) else shared
        for part, content in zip(optimizer.chained_optimizers, moments["optimizers"], strict=True):
            part.optimizer.load_state_dict(content["inner"])
            for main, saved in zip(_main_parameters(part), content["main"], strict=True):
                main.copy_(saved)
    _set_random_state(own["random"])


def _read(folder: Path, rank: int) -> dict[str, Any]:
    path = rank_file(folder, rank)
    if not path.exists():
        found = len(list(folder.glob("rank-*.pt")))
        raise IncompatibleCheckpoint(f"{folder} has no {path.name} but {found} files of ranks: another layout wrote it")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _layout(ranks: Ranks, optimizer: Any) -> dict[str, int]:
    sizes = {"tensor_size": ranks.tensor_size, "pipeline_size": ranks.pipeline_size}
    return {"world_size": ranks.world_size, **sizes, "distributed": int(_is_distributed(optimizer))}


def _is_distributed(optimizer: Any) -> bool:
    """Whether each data parallel rank has only a part of the moments."""
    return any(hasattr(part, "shard_fp32_from_float16_groups") for part in optimizer.chained_optimizers)


def _main_parameters(part: Any) -> list[torch.Tensor]:
    """The fp32 parameters behind bf16 ones; none when the model itself is in fp32."""
    whole = getattr(part, "fp32_from_float16_groups", [])
    return [p for group in getattr(part, "shard_fp32_from_float16_groups", whole) for p in group]


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
