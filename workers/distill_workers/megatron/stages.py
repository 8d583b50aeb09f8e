"""Pipeline stages: which layers each one holds, what its parameters are called there, and one pass through all of them.

Stage s of n holds layers [s * layers / n, (s + 1) * layers / n); the first has the embedding too, the last the final
norm and the output head. A tied head is a copy of the embedding on the last stage, whose gradient Megatron adds to
the embedding's (finalize_model_grads), so that both stay equal.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from distill_workers.megatron.architecture import Mapping, Shape, UnsupportedModel, mappings
from distill_workers.megatron.batch import MicroBatch
from distill_workers.megatron.parallel import Ranks

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")

Outputs = Callable[[MicroBatch, torch.Tensor], torch.Tensor]
"""Of a micro-batch and the last stage's hidden states [sequence, samples, hidden]."""


def check(shape: Shape, ranks: Ranks) -> None:
    """Raises UnsupportedModel when the layers cannot be dealt out evenly."""
    if shape.layers % ranks.pipeline_size:
        raise UnsupportedModel(
            f"parallelism.pipeline {ranks.pipeline_size} does not divide the student's {shape.layers} layers; "
            "set it to a divisor of them"
        )


def owned(shape: Shape, stages: int) -> Iterator[tuple[int, Mapping]]:
    """Every parameter of the model once, in the order of the layers: the stage that holds it, and its names there."""
    for mapping in mappings(shape):
        layer = _LAYER.match(mapping.megatron[0])
        if layer is not None:
            stage, local = divmod(int(layer[1]), shape.layers // stages)
            names = tuple(_LAYER.sub(f"decoder.layers.{local}.", name) for name in mapping.megatron)
            yield stage, replace(mapping, megatron=names)
        else:
            yield 0 if mapping.megatron[0] == EMBEDDING else stages - 1, mapping


def held(shape: Shape, ranks: Ranks) -> Iterator[Mapping]:
    """The parameters of this rank's stage; of a tied head its copy too."""
    for stage, mapping in owned(shape, ranks.pipeline_size):
        if stage == ranks.pipeline_rank:
            yield mapping
        elif shape.tied_embeddings and mapping.megatron[0] == EMBEDDING and ranks.is_last_stage:
            yield replace(mapping, megatron=(HEAD,))


def to_first_stage(
    tensors: list[torch.Tensor] | None, stage: int, count: int, dtype: torch.dtype, ranks: Ranks
) -> list[torch.Tensor] | None:
    """`count` vectors or matrices that the first rank of a later stage has, on the first rank of the first stage.

    None on all others. Called by the first tensor parallel rank of every stage of a replica.
    """
    source, target = (dist.get_global_rank(ranks.pipeline_group, i) for i in (stage, 0))
    for tensor in tensors or []:
        # The receiver has no such layer, so the shape goes ahead; 0 stands for no second dimension.
        dist.send(torch.tensor([*tensor.shape, 0][:2], device=ranks.device), target, group=ranks.pipeline_group)
        dist.send(tensor.contiguous(), target, group=ranks.pipeline_group)
    if ranks.rank != target:
        return None
    received = []
    for _ in range(count):
        size = torch.empty(2, dtype=torch.long, device=ranks.device)
        dist.recv(size, source, group=ranks.pipeline_group)
        received.append(torch.empty([n for n in size.tolist() if n], dtype=dtype, device=ranks.device))
        dist.recv(received[-1], source, group=ranks.pipeline_group)
    return received


def run(model: Any, batches: Sequence[MicroBatch], outputs: Outputs, *, backward: bool) -> list[torch.Tensor]:
    """Micro-batches through the stages, in the 1F1B order (arXiv 2104.04473, section 2.2.1) where there are several.

    Each stage is given the same micro-batches. `outputs` is asked on the last stage alone: for a scalar, a sum over
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

    def forward(waiting: Iterator[MicroBatch], stage: Any) -> tuple[torch.Tensor, Any]:
        batch = next(waiting)
        return _hidden(stage, batch), partial(collect, batch)

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
    """Of this stage, [sequence, samples, hidden]: whole on the last one, where the head needs it."""
    ids, config = batch.input_ids, model.config
    if config.sequence_parallel:
        # Each tensor parallel rank has an equal part of the sequence: it is padded at its end.
        ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % config.tensor_model_parallel_size))
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden: torch.Tensor = model(ids, positions, None)
    if config.sequence_parallel and parallel_state.is_pipeline_last_stage():
        # The gradient is whole on each rank (logprobs.py), so backward takes this rank's part of it.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden
