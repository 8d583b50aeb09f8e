"""Pipeline stages: where each parameter is, what it is called there, and one pass through all stages.

Stage s of n holds layers [s * layers / n, (s + 1) * layers / n); the first has the embedding too, the last the final
norm and the output head. A tied head is a copy of the embedding on the last stage, whose gradient Megatron adds to
the embedding's (finalize_model_grads), so that both stay equal. Part e of n of a layer's experts are those from
e * experts / n to (e + 1) * experts / n.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from distill_workers.megatron.architecture import Mapping, Shape, UnsupportedModel, mappings
from distill_workers.megatron.batch import MicroBatch
from distill_workers.megatron.context import own_positions
from distill_workers.megatron.parallel import Ranks

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+")

Outputs = Callable[[MicroBatch, torch.Tensor], torch.Tensor]
"""A function of a micro-batch and the last stage's hidden states [sequence, samples, hidden]."""


@dataclass(frozen=True)
class OwningRanks:
    """The ranks that hold a parameter: those of one pipeline stage and, for an expert's, of one part of the experts."""

    pipeline_stage: int
    part: int | None

    def is_here(self, ranks: Ranks) -> bool:
        """Return whether this process is one of them."""
        return self.pipeline_stage == ranks.pipeline_rank and self.part in (None, ranks.expert_rank)

    def is_first_here(self, ranks: Ranks) -> bool:
        """Return whether this process is one of them in the first replica that holds the parameter."""
        return self.is_here(ranks) and ranks.is_first(with_experts=self.part is not None)

    def first_rank(self, ranks: Ranks) -> int:
        """Return the global rank of the first of them."""
        return (self.pipeline_stage * ranks.replicas + (self.part or 0)) * ranks.tensor_size


def check(shape: Shape, ranks: Ranks) -> None:
    """Raises UnsupportedModel when layers or experts cannot be dealt out evenly."""
    if shape.layers % ranks.pipeline_size:
        raise UnsupportedModel(
            f"parallelism.pipeline {ranks.pipeline_size} does not divide the student's {shape.layers} layers; "
            "set it to a divisor of them"
        )
    if ranks.expert_size > 1 and shape.experts is None:
        raise UnsupportedModel(f"parallelism.expert {ranks.expert_size}: the student has no experts; set it to 1")
    if shape.experts is not None and shape.experts.count % ranks.expert_size:
        raise UnsupportedModel(
            f"parallelism.expert {ranks.expert_size} does not divide the student's {shape.experts.count} experts; "
            "set it to a divisor of them"
        )


def all_parameters(shape: Shape, ranks: Ranks) -> Iterator[tuple[OwningRanks, Mapping]]:
    """Yield every parameter of the model once, in the order of the layers: its ranks, and its names there."""
    for mapping in mappings(shape):
        names, part = mapping.megatron, None
        layer = _LAYER.match(names[0])
        if layer is None:
            pipeline_stage = 0 if names[0] == EMBEDDING else ranks.pipeline_size - 1
        else:
            pipeline_stage, number = divmod(int(layer[1]), shape.layers // ranks.pipeline_size)
            names = tuple(_LAYER.sub(f"decoder.layers.{number}.", name) for name in names)
        if mapping.expert is not None and shape.experts is not None:
            part, number = divmod(mapping.expert, shape.experts.count // ranks.expert_size)
            names = tuple(_EXPERT.sub(str(number), name) for name in names)
        yield OwningRanks(pipeline_stage, part), replace(mapping, megatron=names)


def local_parameters(shape: Shape, ranks: Ranks) -> Iterator[Mapping]:
    """Yield the parameters of this rank, on the last stage also its copy of a tied head."""
    for owners, mapping in all_parameters(shape, ranks):
        if owners.is_here(ranks):
            yield mapping
        elif shape.tied_embeddings and mapping.megatron[0] == EMBEDDING and ranks.is_last_pipeline_stage:
            yield replace(mapping, megatron=(HEAD,))


def to_rank_0(
    tensors: list[torch.Tensor] | None, owners: OwningRanks, count: int, dtype: torch.dtype, ranks: Ranks
) -> list[torch.Tensor] | None:
    """Return on rank 0 `count` vectors or matrices of the first rank that owns them; None on all others."""
    source = owners.first_rank(ranks)
    if source == 0:
        return tensors if ranks.rank == 0 else None
    if ranks.rank == source:
        for tensor in tensors or []:
            # The receiver has no such parameter, so the shape goes ahead; 0 stands for no second dimension.
            dist.send(torch.tensor([*tensor.shape, 0][:2], device=ranks.device), 0)
            dist.send(tensor.contiguous(), 0)
    if ranks.rank != 0:
        return None
    received = []
    for _ in range(count):
        size = torch.empty(2, dtype=torch.long, device=ranks.device)
        dist.recv(size, source)
        received.append(torch.empty([n for n in size.tolist() if n], dtype=dtype, device=ranks.device))
        dist.recv(received[-1], source)
    return received


def run(model: Any, batches: Sequence[MicroBatch], outputs: Outputs, *, backward: bool) -> list[torch.Tensor]:
    """Run micro-batches through the stages, in the 1F1B order (arXiv 2104.04473, section 2.2.1) where there are
    several.

    Each stage is given the same micro-batches. `outputs` is called on the last stage alone: for a scalar, a sum over
    tokens, whose gradient is added to those of earlier calls; or with backward=False for any tensor. Returns what it
    gave, without gradient, in the order of the micro-batches; elsewhere nothing.
    """
    if not batches:
        return []
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        found = []
        for batch in batches:
            output = outputs(batch, _hidden(model, batch))
            if backward:
                output.backward()  # type: ignore[no-untyped-call]  # torch.Tensor.backward is untyped
            found.append(output.detach())
        return found

    def collect(batch: MicroBatch, hidden: torch.Tensor, non_loss_data: bool = False) -> Any:
        output = outputs(batch, hidden)
        # Three values mean to Megatron: a sum over tokens, not to be divided by the number of micro-batches.
        return output if non_loss_data else (output, torch.zeros((), dtype=torch.int), output.detach())

    def forward(waiting: Iterator[MicroBatch], pipeline_stage: Any) -> tuple[torch.Tensor, Any]:
        batch = next(waiting)
        return _hidden(pipeline_stage, batch), partial(collect, batch)

    collected: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        # Micro-batches differ in shape: stages tell each other (variable_seq_lengths), so these are not used.
        seq_length=1,
        micro_batch_size=1,
        forward_only=not backward,
        collect_non_loss_data=not backward,
    )
    return collected


def _hidden(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Of this stage, [sequence, samples, hidden], with context parallelism this rank's part of the sequence; on the
    last one, where the head needs it, not split further."""
    ids, config = batch.input_ids, model.config
    size = config.context_parallel_size
    # Equal parts for all: the sequence is padded at its end.
    parts = (2 * size if size > 1 else 1) * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % parts))
    positions = own_positions(ids.shape[1], parallel_state.get_context_parallel_rank(), size).to(ids.device)
    hidden: torch.Tensor = model(ids[:, positions], positions.expand(len(ids), -1), None)
    if config.sequence_parallel and parallel_state.is_pipeline_last_stage():
        # The gradient is whole on each rank (logprobs.py), so backward takes this rank's part of it.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden
