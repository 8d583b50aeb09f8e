"""The layout table: what is cut over ranks and joined again is what it was, and nothing is read twice."""

from dataclasses import replace

import pytest
import torch

from distill_workers.megatron.architecture import ARCHITECTURES, Layout, Shape
from distill_workers.megatron.shards import EVERY, cut, join, pieces, whole_shapes

SHAPE = Shape(
    architecture=ARCHITECTURES["qwen2"], layers=1, hidden_size=24, ffn_hidden_size=32, experts=None, attention_heads=8,
    query_groups=4, head_size=3, vocab_size=29, max_positions=64, norm_epsilon=1e-6, rope_theta=1e4,
    rope_scaling=None, tied_embeddings=False,
)  # fmt: skip
WHOLE = {
    Layout.REPLICATED: [(24,)],
    Layout.ROWS: [(29, 24)],
    Layout.COLUMNS: [(24, 32)],
    Layout.GROUPED_QKV: [(24, 24), (12, 24), (12, 24)],
    Layout.GATE_UP: [(32, 24), (32, 24)],
}
"""Of the Hugging Face tensors of each layout, in SHAPE."""


def local(layout: Layout, size: int) -> tuple[int, ...]:
    match layout:
        case Layout.REPLICATED:
            return (24,)
        case Layout.ROWS:
            return (SHAPE.padded_vocab_size(size) // size, 24)
        case Layout.COLUMNS:
            return (24, 32 // size)
        case Layout.GROUPED_QKV:
            return (48 // size, 24)
        case Layout.GATE_UP:
            return (64 // size, 24)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", Layout)
def test_what_is_cut_and_joined_is_what_it_was(layout: Layout, size: int) -> None:
    wholes = [torch.randn(shape) for shape in WHOLE[layout]]
    shards = [torch.full(local(layout, size), torch.nan) for _ in range(size)]
    for rank, shard in enumerate(shards):
        cut(wholes, shard, layout, SHAPE, rank=rank, size=size)

    assert whole_shapes(layout, SHAPE, shards[0].shape, size=size) == WHOLE[layout]
    assert all(torch.equal(a, b) for a, b in zip(join(shards, layout, SHAPE), wholes, strict=True))
    assert not any(shard.isnan().any() for shard in shards), "padding is zero"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", [layout for layout in Layout if layout is not Layout.REPLICATED])
def test_every_element_is_on_one_rank_alone(layout: Layout, size: int) -> None:
    seen = [torch.zeros(shape) for shape in WHOLE[layout]]
    for rank in range(size):
        filled = torch.zeros(local(layout, size)[0])
        for piece in pieces(layout, SHAPE, local(layout, size), rank=rank, size=size):
            block = seen[piece.source][piece.rows]
            (block if piece.columns == EVERY else block[:, piece.columns]).add_(1)
            filled[piece.to] += 1
        assert filled.max() == 1
    assert all(count.eq(1).all() for count in seen)


def test_a_rank_behind_a_small_vocabulary_has_padding_alone() -> None:
    shape = replace(SHAPE, vocab_size=9)  # 3 rows a rank
    (piece,) = pieces(Layout.ROWS, shape, (3, 24), rank=3, size=4)
    assert piece.rows == slice(9, 9) and piece.to == slice(0, 0)


def test_with_one_rank_a_joined_tensor_is_the_parameter_itself() -> None:
    shard = torch.randn(local(Layout.GATE_UP, 1))
    gate, up = join([shard], Layout.GATE_UP, SHAPE)
    assert gate.data_ptr() == shard.data_ptr() and up.data_ptr() == shard[32:].data_ptr()
