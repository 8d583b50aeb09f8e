"""Cutting Hugging Face tensors into one rank's Megatron tensor, and putting them together again. No input or output."""

from collections.abc import Sequence
from typing import Protocol

import torch

from distill_workers.megatron.architecture import Layout, Shape


class Slice(Protocol):
    """A tensor of a safetensors file (safe_open(...).get_slice(name)), read where it is indexed."""

    def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor: ...

    def get_shape(self) -> list[int]: ...


def cut(sources: Sequence[Slice], layout: Layout, shape: Shape, *, rank: int, size: int) -> torch.Tensor:
    """The Megatron tensor of tensor parallel rank `rank` of `size`, reading only its part of the sources."""
    match layout:
        case Layout.REPLICATED:
            return sources[0][:]
        case Layout.COLUMNS:
            width = sources[0].get_shape()[1] // size
            return sources[0][:, rank * width : (rank + 1) * width]
        case Layout.ROWS:
            rows = shape.padded_vocab_size(size) // size
            part = sources[0][rank * rows : min((rank + 1) * rows, shape.vocab_size)]
            padding = part.new_zeros(rows - part.shape[0], *part.shape[1:])
            return torch.cat([part, padding])
        case Layout.GATE_UP:
            rows = shape.ffn_hidden_size // size
            return torch.cat([source[rank * rows : (rank + 1) * rows] for source in sources])
        case Layout.GROUPED_QKV:
            groups = shape.query_groups // size
            parts = []
            for source, heads in zip(sources, _heads_per_group(shape), strict=True):
                rows = groups * heads * shape.head_size
                part = source[rank * rows : (rank + 1) * rows]
                parts.append(part.reshape(groups, heads * shape.head_size, *part.shape[1:]))
            joined = torch.cat(parts, dim=1)
            return joined.reshape(-1, *joined.shape[2:])


def join(shards: Sequence[torch.Tensor], layout: Layout, shape: Shape) -> list[torch.Tensor]:
    """The Hugging Face tensors, whole, from the Megatron tensors of all tensor parallel ranks: the inverse of `cut`."""
    match layout:
        case Layout.REPLICATED:
            return [shards[0]]
        case Layout.COLUMNS:
            return [_cat(shards, 1)]
        case Layout.ROWS:
            return [_cat(shards)[: shape.vocab_size]]
        case Layout.GATE_UP:
            halves = [shard.chunk(2) for shard in shards]
            return [_cat([half[i] for half in halves]) for i in range(2)]
        case Layout.GROUPED_QKV:
            whole = _cat(shards)
            heads = _heads_per_group(shape)
            grouped = whole.view(shape.query_groups, sum(heads) * shape.head_size, *whole.shape[1:])
            parts = torch.split_with_sizes(grouped, [h * shape.head_size for h in heads], dim=1)
            return [part.reshape(-1, *whole.shape[1:]) for part in parts]


def _cat(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Without a copy where there is one part: at tensor parallel 1 that is nearly the whole model."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _heads_per_group(shape: Shape) -> tuple[int, int, int]:
    """Heads of q, k and v in one query group."""
    return shape.attention_heads // shape.query_groups, 1, 1
