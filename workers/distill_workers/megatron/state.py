"""Exact state of the trainer's ranks: parameters, optimiser, random numbers. One safetensors file for each rank.

Replicas hold equal parameters: the first that has one writes it, and its moments where each holds all of them; where
they are split (optimizer.distributed) every rank writes its own, which is a range of the flattened tensor. A tensor is
called KIND/NAME, NAME being the first of its Hugging Face tensors, so it is found whatever stage and rank reads it: by
the same split as it was written straight into place and to the last bit; by another, the parts of all tensor parallel
ranks are joined and cut anew, moments and fp32 main parameters as the weights are (shards.py).
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill_workers.megatron import lora, tensor_file
from distill_workers.megatron.architecture import Layout, Mapping, Shape
from distill_workers.megatron.parallel import Ranks
from distill_workers.megatron.shards import cut, join
from distill_workers.megatron.stages import held
from distill_workers.megatron.tensor_file import BadTensorFile, TensorFile

FORMAT = "3"
PARAMETER, MAIN, RANDOM = "parameter", "main", "random"
"""Kinds of tensors; the others are the optimiser's own names, such as exp_avg."""

Parts = dict[int, dict[int | None, TensorFile]]
"""Files by tensor parallel rank, and the start of the range in the flattened tensor, or None for the whole."""

log = logging.getLogger(__name__)


class IncompatibleCheckpoint(ValueError):
    """The checkpoint cannot be continued by these ranks."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank has to keep, in host memory."""

    rank: int
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Optimised:
    """What the optimiser works on for one parameter: itself, its fp32 main parameter, or a range of either."""

    main: torch.Tensor
    inner: torch.optim.Optimizer
    start: int | None
    """Of the range in the flattened parameter; None for the whole."""


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def snapshot(ranks: Ranks, shape: Shape, model: torch.nn.Module, optimizer: Any, *, copied: bool) -> Snapshot:
    """This rank's state. Of tensors in host memory, `copied` or as they are: then no step may come before `write`."""
    tensors: dict[str, torch.Tensor] = {f"{RANDOM}/{name}": value for name, value in _random_state().items()}
    steps: dict[str, float] = {}
    starts: dict[str, int] = {}
    for mapping, parameter in _parameters(model, shape, ranks):
        is_first = ranks.is_first(with_experts=mapping.expert is not None)
        found: dict[str, torch.Tensor] = {PARAMETER: parameter} if is_first else {}
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
                    starts[_name(kind, mapping)] = optimised.start
        for kind, value in found.items():
            tensors[_name(kind, mapping)] = value.detach().to("cpu", copy=copied)
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


def load(folder: Path, ranks: Ranks, shape: Shape, model: torch.nn.Module, optimizer: Any) -> None:
    """Restore what was written, by however many ranks and in whatever split. Raises IncompatibleCheckpoint."""
    with ExitStack() as stack:
        try:
            saved = _Saved(folder, ranks.pipeline_rank, stack)
            old, new = (saved.world_size, saved.tensor_size), (ranks.world_size, ranks.tensor_size)
            if old != new:
                log.info("%s is of %d ranks with parallelism.tensor %d: split anew for %d with %d", folder, *old, *new)
            for mapping, parameter in _parameters(model, shape, ranks):
                saved.read(PARAMETER, mapping, parameter.data, None, parameter.shape, shape, ranks)
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
            saved = _Saved(folder, ranks.pipeline_rank, stack)
            for mapping, parameter in _parameters(model, shape, ranks):
                saved.read(PARAMETER, mapping, parameter.data, None, parameter.shape, shape, ranks)
        except BadTensorFile as error:
            raise IncompatibleCheckpoint(str(error)) from error


def _restore(
    saved: "_Saved", mapping: Mapping, parameter: torch.Tensor, optimised: Optimised, shape: Shape, ranks: Ranks
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
        state["step"] = torch.tensor(saved.steps[mapping.hf[0]])
    optimised.inner.state.pop(main, None)
    if state:
        optimised.inner.state[main] = state


class _Saved:
    """The files of a checkpoint's ranks, and which tensor is where."""

    def __init__(self, folder: Path, stage: int, stack: ExitStack) -> None:
        self._folder = folder
        paths = sorted(folder.glob("rank-*.safetensors"))
        if not paths:
            what = "was written by an earlier version" if list(folder.glob("rank-*.pt")) else "has no files of ranks"
            raise IncompatibleCheckpoint(f"{folder} {what}: continue it with the version that wrote it, or begin anew")
        self._files = [stack.enter_context(TensorFile(path)) for path in paths]
        for file in self._files:
            if file.metadata.get("format") != FORMAT:
                raise IncompatibleCheckpoint(
                    f"{file.path} has format {file.metadata.get('format')}, and this version reads {FORMAT}: "
                    "continue it with the version that wrote it, or begin anew"
                )
        first = self._files[0].metadata
        self.world_size, self.tensor_size = int(first["world_size"]), int(first["tensor_size"])
        if len(self._files) != self.world_size:
            raise IncompatibleCheckpoint(f"{folder} has {len(self._files)} files of {self.world_size} ranks")
        self.group_step: int = json.loads(first["group_step"])
        self.steps: dict[str, float] = {}
        self._stage = stage
        self._where: dict[str, dict[int, Parts]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
        """By name and pipeline stage; a tied embedding is on two."""
        for file in self._files:
            self.steps |= json.loads(file.metadata["steps"])
            starts = json.loads(file.metadata["starts"])
            for name in file.entries:
                parts = self._where[name][int(file.metadata["pipeline_rank"])]
                parts[int(file.metadata["tensor_rank"])][starts.get(name)] = file

    def moments(self, mapping: Mapping) -> list[str]:
        """The optimiser's kinds of tensors of a parameter."""
        parts = (name.partition("/") for name in self._where)
        return [kind for kind, _, of in parts if of == mapping.hf[0] and kind not in (PARAMETER, MAIN)]

    def dtype(self, kind: str, mapping: Mapping) -> torch.dtype:
        name = _name(kind, mapping)
        file = next(file for ranges in self._parts(name).values() for file in ranges.values())
        return file.entries[name].dtype

    def read(
        self,
        kind: str,
        mapping: Mapping,
        into: torch.Tensor,
        start: int | None,
        local: torch.Size,
        shape: Shape,
        ranks: Ranks,
    ) -> None:
        """Fill this rank's part of a parameter or a moment, of which it is to have the shape `local` or, flattened,
        the range that begins at `start`."""
        name = _name(kind, mapping)
        if (found := len(self._parts(name))) != self.tensor_size:
            raise IncompatibleCheckpoint(f"{self._folder} has {found} of {self.tensor_size} parts of {name}")
        if self.dtype(kind, mapping) != into.dtype:
            raise IncompatibleCheckpoint(
                f"{self._folder}: {name} is {self.dtype(kind, mapping)}, and this trainer's {into.dtype}: "
                "set spec.precision as it was"
            )
        if self.tensor_size != ranks.tensor_size:
            whole = torch.empty(local, dtype=into.dtype)
            parts = [self._part(kind, mapping, rank) for rank in range(self.tensor_size)]
            wholes = join(parts, mapping.layout, shape)
            cut(wholes, whole, mapping.layout, shape, rank=ranks.tensor_rank, size=ranks.tensor_size)
        else:
            file = self._parts(name)[ranks.tensor_rank].get(start)
            if file is not None and file.entries[name].shape == into.shape:
                file.read(name, into)
                return
            whole = self._part(kind, mapping, ranks.tensor_rank)
        if whole.shape != local:
            raise IncompatibleCheckpoint(
                f"{self._folder}: {name} is {list(whole.shape)}, and this trainer's {list(local)}: another model"
            )
        into.copy_(whole if start is None else whole.view(-1)[start : start + into.numel()])

    def random_state(self, rank: int) -> dict[str, torch.Tensor]:
        """Of the rank; where there were fewer, of another, since nothing that is trained depends on it."""
        file = self._files[rank % len(self._files)]
        found = {}
        for name, entry in file.entries.items():
            if name.startswith(f"{RANDOM}/"):
                value = torch.empty(entry.shape, dtype=entry.dtype)
                file.read(name, value)
                found[name.removeprefix(f"{RANDOM}/")] = value
        return found

    def _parts(self, name: str) -> Parts:
        """Of a tensor that several stages have, equal ones, those of this rank's own stage: they are read in place."""
        stages = self._where.get(name, {})
        return stages.get(self._stage) or next(iter(stages.values()), {})

    def _part(self, kind: str, mapping: Mapping, rank: int) -> torch.Tensor:
        """The whole tensor of one tensor parallel rank, also where its data parallel replicas had a range each."""
        name, parameter = _name(kind, mapping), _name(PARAMETER, mapping)
        (file,) = self._parts(parameter)[rank].values()
        shape = file.entries[parameter].shape
        part = torch.empty(shape, dtype=self.dtype(kind, mapping))
        left = math.prod(shape)
        for start, file in self._parts(name)[rank].items():
            if start is None:
                file.read(name, part)
                return part
            size = file.entries[name].shape[0]
            file.read(name, part.view(-1)[start : start + size])
            left -= size
        if left:
            raise IncompatibleCheckpoint(f"{self._folder}: {left} elements of {name} are in no file")
        return part


def _parameters(model: torch.nn.Module, shape: Shape, ranks: Ranks) -> Iterator[tuple[Mapping, torch.nn.Parameter]]:
    """What is trained on this rank, in the order of the layers. Frozen weights are those of the model it began as."""
    parameters = dict(model.named_parameters())
    for mapping in held(shape, ranks):
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


def _optimised(parameter: torch.nn.Parameter, optimizer: Any) -> Optimised | None:
    """None where another data parallel rank works on all of the parameter."""
    for part in optimizer.chained_optimizers:
        if hasattr(part, "model_param_group_index_map"):  # Megatron's DistributedOptimizer
            if parameter in part.model_param_group_index_map:
                group, order = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][order]
                return Optimised(main, part.optimizer, part._get_model_param_range_map(parameter)["param"].start)
            continue
        main = getattr(parameter, "main_param", parameter)
        if any(p is main for group in part.optimizer.param_groups for p in group["params"]):
            return Optimised(main, part.optimizer, None)
    return None


def _name(kind: str, mapping: Mapping) -> str:
    return f"{kind}/{mapping.hf[0]}"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
