"""Exact state of the trainer's ranks: parameters, optimiser, random numbers. One safetensors file for each rank.

Replicas hold equal parameters: the first that has one writes it, and its moments where each holds all of them; where
they are split (optimizer.distributed) every rank writes its own, which is a range of the flattened tensor. A tensor is
called KIND/NAME, NAME being the first of its Hugging Face tensors, so it is found whatever stage and rank reads it: by
the same split as it was written straight into place and to the last bit; by another, the parts of all tensor parallel
ranks are joined and cut anew, moments and fp32 main parameters as the weights are (shards.py).
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill_workers.megatron import lora, memory
from distill_workers.megatron.architecture import Layout, Mapping, Shape
from distill_workers.megatron.checkpoint import tensor_file
from distill_workers.megatron.checkpoint.host_copies import HostCopies
from distill_workers.megatron.checkpoint.reader import (
    AVERAGE,
    FORMAT,
    MAIN,
    PARAMETER,
    RANDOM,
    CheckpointReader,
    IncompatibleCheckpoint,
    name_of,
)
from distill_workers.megatron.checkpoint.tensor_file import BadTensorFile
from distill_workers.megatron.checkpoint.weight_average import WeightAverage
from distill_workers.megatron.parallel import Ranks
from distill_workers.megatron.pipeline import local_parameters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The state of one rank, in host memory."""

    rank: int
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class OptimizedParameter:
    """The tensor that the optimiser updates for one parameter: itself, its fp32 main parameter, or a range of
    either."""

    main: torch.Tensor
    inner: torch.optim.Optimizer
    start: int | None
    """Start of the range in the flattened parameter; None for the whole."""


def rank_file(folder: Path, rank: int) -> Path:
    """Return the file of a rank in a checkpoint."""
    return folder / f"rank-{rank:05d}.safetensors"


def snapshot(
    ranks: Ranks,
    shape: Shape,
    model: torch.nn.Module,
    optimizer: Any,
    *,
    copied: bool,
    copies: HostCopies | None = None,
    average: WeightAverage | None = None,
) -> Snapshot:
    """Return this rank's state. Tensors in host memory are copied if `copied`; if not, no step may come before
    `write`. Those of a GPU are copied into `copies`, where given: the snapshot then holds until the next one."""
    tensors: dict[str, torch.Tensor] = {f"{RANDOM}/{name}": value for name, value in _random_state().items()}
    steps: dict[str, float] = {}
    starts: dict[str, int] = {}
    for mapping, parameter in _parameters(model, shape, ranks):
        is_first = ranks.is_first(with_experts=mapping.expert is not None)
        found: dict[str, torch.Tensor] = {PARAMETER: parameter} if is_first else {}
        if average is not None and is_first:
            found[AVERAGE] = _averaged(average, mapping)
        optimised = _optimised(parameter, optimizer)
        if optimised is not None and (is_first or optimised.start is not None):
            moments = dict(optimised.inner.state.get(optimised.main, {}))
            if optimised.main.dtype != parameter.dtype:
                moments[MAIN] = optimised.main
            for kind, value in moments.items():
                if not value.ndim:
                    steps[mapping.hf[0]] = value.item()
                    continue
                found[kind] = value
                if optimised.start is not None:
                    starts[name_of(kind, mapping)] = optimised.start
        for kind, value in found.items():
            name = name_of(kind, mapping)
            if copies is not None and value.is_cuda:
                tensors[name] = copies.copy(name, value.detach())
            else:
                tensors[name] = value.detach().to("cpu", copy=copied)
    if copies is not None:
        copies.wait()
    metadata = {
        "format": FORMAT,
        "world_size": str(ranks.world_size),
        "pipeline_rank": str(ranks.pipeline_rank),
        "tensor_rank": str(ranks.tensor_rank),
        "tensor_size": str(ranks.tensor_size),
        "steps": json.dumps(steps),
        "starts": json.dumps(starts),
        "group_step": json.dumps(max((group.get("step", 0) for group in optimizer.param_groups), default=0)),
    }
    return Snapshot(ranks.rank, tensors, metadata)


def write(folder: Path, taken: Snapshot) -> None:
    """Write a snapshot into an existing folder and wait until it is on disk. The caller renames the folder."""
    tensor_file.write(rank_file(folder, taken.rank), taken.tensors, taken.metadata)


def load(
    folder: Path,
    ranks: Ranks,
    shape: Shape,
    model: torch.nn.Module,
    optimizer: Any,
    average: WeightAverage | None = None,
) -> None:
    """Restore what was written, by however many ranks and in whatever split. Raises IncompatibleCheckpoint."""
    with ExitStack() as stack:
        try:
            saved = CheckpointReader(folder, ranks.pipeline_rank, stack)
            old, new = (saved.world_size, saved.tensor_size), (ranks.world_size, ranks.tensor_size)
            if old != new:
                log.info("%s is of %d ranks with parallelism.tensor %d: split anew for %d with %d", folder, *old, *new)
            for mapping, parameter in _parameters(model, shape, ranks):
                saved.read(PARAMETER, mapping, parameter.data, None, parameter.shape, shape, ranks)
                if average is not None:
                    into = _averaged(average, mapping)
                    saved.read(AVERAGE, mapping, into, None, parameter.shape, shape, ranks)
                optimised = _optimised(parameter, optimizer)
                if optimised is not None:
                    _restore(saved, mapping, parameter, optimised, shape, ranks)
            for group in optimizer.param_groups:
                if saved.group_step:  # by an optimiser that counts steps by group; all go together
                    group["step"] = saved.group_step
            _set_random_state(saved.random_state(ranks.rank))
        except BadTensorFile as error:
            raise IncompatibleCheckpoint(str(error)) from error


def load_parameters(folder: Path, ranks: Ranks, shape: Shape, model: torch.nn.Module) -> None:
    """The trained weights alone, for a model that is not to be trained. Raises IncompatibleCheckpoint."""
    with ExitStack() as stack:
        try:
            saved = CheckpointReader(folder, ranks.pipeline_rank, stack)
            for mapping, parameter in _parameters(model, shape, ranks):
                saved.read(PARAMETER, mapping, parameter.data, None, parameter.shape, shape, ranks)
        except BadTensorFile as error:
            raise IncompatibleCheckpoint(str(error)) from error


def _restore(
    saved: CheckpointReader,
    mapping: Mapping,
    parameter: torch.Tensor,
    optimised: OptimizedParameter,
    shape: Shape,
    ranks: Ranks,
) -> None:
    """The optimiser's state of one parameter; none, if the checkpoint was written before the first step."""
    main, start = optimised.main, optimised.start
    if main.dtype != parameter.dtype:
        saved.read(MAIN, mapping, main.data, start, parameter.shape, shape, ranks)
    state = {}
    for kind in saved.moments(mapping):
        state[kind] = torch.empty_like(main, dtype=saved.dtype(kind, mapping), requires_grad=False)
        saved.read(kind, mapping, state[kind], start, parameter.shape, shape, ranks)
    if mapping.hf[0] in saved.steps:
        state["step"] = memory.step_count(saved.steps[mapping.hf[0]], main)
    optimised.inner.state.pop(main, None)
    if state:
        optimised.inner.state[main] = state


def _parameters(model: torch.nn.Module, shape: Shape, ranks: Ranks) -> Iterator[tuple[Mapping, torch.nn.Parameter]]:
    """Yield what is trained on this rank, in the order of the layers. Frozen weights are read from the model."""
    parameters = dict(model.named_parameters())
    for mapping in local_parameters(shape, ranks):
        name = next(name for name in mapping.megatron if name in parameters)
        if parameters[name].requires_grad:
            yield mapping, parameters[name]
        layouts = {lora.A: Layout.REPLICATED, lora.B: mapping.layout}
        if mapping.layout is Layout.COLUMNS:
            layouts = {lora.A: Layout.COLUMNS, lora.B: Layout.REPLICATED}
        for adapter, layout in layouts.items():
            of_weight = f"{name.removesuffix('weight')}{adapter}"
            if of_weight in parameters:
                name_in_file = f"{mapping.hf[0]}.{adapter}"
                yield Mapping((of_weight,), (name_in_file,), layout, mapping.expert), parameters[of_weight]


def _averaged(average: WeightAverage, mapping: Mapping) -> torch.Tensor:
    return next(average.values[name] for name in mapping.megatron if name in average.values)


def _optimised(parameter: torch.nn.Parameter, optimizer: Any) -> OptimizedParameter | None:
    """Return what the optimiser updates; None where another data parallel rank updates all of the parameter."""
    for part in optimizer.chained_optimizers:
        if hasattr(part, "model_param_group_index_map"):  # Megatron's DistributedOptimizer
            if parameter in part.model_param_group_index_map:
                group, order = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][order]
                return OptimizedParameter(
                    main, part.optimizer, part._get_model_param_range_map(parameter)["param"].start
                )
            continue
        main = getattr(parameter, "main_param", parameter)
        if any(p is main for group in part.optimizer.param_groups for p in group["params"]):
            return OptimizedParameter(main, part.optimizer, None)
    return None


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
