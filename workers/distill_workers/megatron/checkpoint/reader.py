"""Reading of an exact checkpoint (state.py), whichever ranks wrote a tensor and however it was split."""

import json
import math
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch

from distill_workers.megatron.architecture import Mapping, Shape
from distill_workers.megatron.checkpoint.tensor_file import TensorFile
from distill_workers.megatron.parallel import Ranks
from distill_workers.megatron.shards import cut, join

FORMAT = "3"
PARAMETER, MAIN, RANDOM, AVERAGE = "parameter", "main", "random", "average"
"""Kinds of tensors; the others are the optimiser's own names, such as exp_avg."""

Parts = dict[int, dict[int | None, TensorFile]]
"""Files by tensor parallel rank, and by the start of the range in the flattened tensor, None for the whole."""


class IncompatibleCheckpoint(ValueError):
    """Raised when these ranks cannot continue the checkpoint."""


def name_of(kind: str, mapping: Mapping) -> str:
    """Return the name of a tensor in a file."""
    return f"{kind}/{mapping.hf[0]}"


class CheckpointReader:
    """A reader of the files of a checkpoint's ranks, which knows in which of them each tensor is."""

    def __init__(self, folder: Path, pipeline_stage: int, stack: ExitStack) -> None:
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
        self._pipeline_stage = pipeline_stage
        self._where: dict[str, dict[int, Parts]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
        """By name and pipeline stage; a tied embedding is on two."""
        for file in self._files:
            self.steps |= json.loads(file.metadata["steps"])
            starts = json.loads(file.metadata["starts"])
            for name in file.entries:
                parts = self._where[name][int(file.metadata["pipeline_rank"])]
                parts[int(file.metadata["tensor_rank"])][starts.get(name)] = file

    def moments(self, mapping: Mapping) -> list[str]:
        """Return the optimiser's kinds of tensors of a parameter."""
        parts = (name.partition("/") for name in self._where)
        return [kind for kind, _, of in parts if of == mapping.hf[0] and kind not in (PARAMETER, MAIN, AVERAGE)]

    def dtype(self, kind: str, mapping: Mapping) -> torch.dtype:
        """Return the dtype of a tensor in the files."""
        name = name_of(kind, mapping)
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
        name = name_of(kind, mapping)
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
        """Return the random state of the rank, or of another if fewer wrote: nothing that is trained depends on it."""
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
        return stages.get(self._pipeline_stage) or next(iter(stages.values()), {})

    def _part(self, kind: str, mapping: Mapping, rank: int) -> torch.Tensor:
        """Return the whole tensor of one tensor parallel rank, also where its data parallel replicas had a range
        each."""
        name, parameter = name_of(kind, mapping), name_of(PARAMETER, mapping)
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
