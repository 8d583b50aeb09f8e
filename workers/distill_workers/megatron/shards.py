"""The layout table: which block of a Hugging Face tensor lies where in one rank's Megatron tensor. No input or output.

Reading a file, cutting a tensor in memory and joining the ranks' parts are three uses of one list, `pieces`; weights
and the optimiser's moments are cut alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from distill_workers.megatron.architecture import Layout, Shape


@dataclass(frozen=True)
class Piece:
    """Rows (and with COLUMNS, columns) of a Hugging Face tensor, and the rows of the rank's tensor that they fill."""

    source: int
    """Which of the mapping's Hugging Face tensors."""
    rows: slice
    columns: slice
    to: slice
    """Rows of the Megatron tensor."""


EVERY = slice(None)


def pieces(layout: Layout, shape: Shape, local: Sequence[int], *, rank: int, size: int) -> Iterator[Piece]:
    """Yield the pieces of which the Megatron tensor of shape `local` on tensor parallel rank `rank` of `size` consists.

    Rows that no piece fills (the padding of a vocabulary, at the end) are zero. The others are filled in their order.
    """
    rows = local[0]
    match layout:
        case Layout.REPLICATED:
            yield Piece(0, slice(0, rows), EVERY, slice(0, rows))
        case Layout.COLUMNS:
            yield Piece(0, slice(0, rows), slice(rank * local[1], (rank + 1) * local[1]), slice(0, rows))
        case Layout.ROWS:
            begin = min(rank * rows, shape.vocab_size)
            end = min(begin + rows, shape.vocab_size)
            yield Piece(0, slice(begin, end), EVERY, slice(0, end - begin))
        case Layout.GATE_UP:
            half = rows // 2
            for source in range(2):
                to = slice(source * half, (source + 1) * half)
                yield Piece(source, slice(rank * half, (rank + 1) * half), EVERY, to)
        case Layout.GROUPED_QKV:
            groups = shape.query_groups // size
            filled = 0
            for group in range(rank * groups, (rank + 1) * groups):
                for source, heads in enumerate(_heads_per_group(shape)):
                    count = heads * shape.head_size
                    yield Piece(source, slice(group * count, (group + 1) * count), EVERY, slice(filled, filled + count))
                    filled += count


def whole_shapes(layout: Layout, shape: Shape, local: Sequence[int], *, size: int) -> list[tuple[int, ...]]:
    """Return the shapes of the Hugging Face tensors of which each of `size` ranks has a Megatron tensor of shape
    `local`."""
    rows, rest = local[0], tuple(local[1:])
    match layout:
        case Layout.REPLICATED:
            return [(rows, *rest)]
        case Layout.COLUMNS:
            return [(rows, rest[0] * size)]
        case Layout.ROWS:
            return [(shape.vocab_size, *rest)]
        case Layout.GATE_UP:
            return [(rows // 2 * size, *rest)] * 2
        case Layout.GROUPED_QKV:
            return [(shape.query_groups * heads * shape.head_size, *rest) for heads in _heads_per_group(shape)]


def cut(
    wholes: Sequence[torch.Tensor], into: torch.Tensor, layout: Layout, shape: Shape, *, rank: int, size: int
) -> None:
    """Fill the Megatron tensor of one rank from the whole Hugging Face tensors."""
    filled = 0
    for piece in pieces(layout, shape, into.shape, rank=rank, size=size):
        block = wholes[piece.source][piece.rows]
        into[piece.to] = block if piece.columns == EVERY else block[:, piece.columns]
        filled = piece.to.stop
    into[filled:].zero_()


def join(shards: Sequence[torch.Tensor], layout: Layout, shape: Shape) -> list[torch.Tensor]:
    """Return the whole Hugging Face tensors from the Megatron tensors of all tensor parallel ranks: the inverse of
    `cut`.

    A tensor that lies in one piece is a view of it, not a copy: with one rank that is nearly the whole model.
    """
    local, size = shards[0].shape, 1 if layout is Layout.REPLICATED else len(shards)
    wholes = whole_shapes(layout, shape, local, size=size)
    found: list[list[tuple[Piece, torch.Tensor]]] = [[] for _ in wholes]
    for rank in range(size):
        for piece in pieces(layout, shape, local, rank=rank, size=size):
            found[piece.source].append((piece, shards[rank][piece.to]))
    return [_assembled(parts, whole) for parts, whole in zip(found, wholes, strict=True)]


def _assembled(parts: list[tuple[Piece, torch.Tensor]], whole: tuple[int, ...]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0][1]
    tensor = parts[0][1].new_empty(whole)
    for piece, part in parts:
        block = tensor[piece.rows]
        (block if piece.columns == EVERY else block[:, piece.columns]).copy_(part)
    return tensor


def _heads_per_group(shape: Shape) -> tuple[int, int, int]:
    """Return the heads of q, k and v in one query group."""
    return shape.attention_heads // shape.query_groups, 1, 1
