"""Context parallelism: ranks that each have a part of every sequence (Llama 3, arXiv 2407.21783, section 3.3.2).

A sequence of 2n chunks on n ranks: rank r has chunks r and 2n - 1 - r, so that causal attention costs each the same.
Megatron's rotary embedding and Transformer Engine's attention deal them out alike. In attention each rank gathers the
keys and values of all; of everything else it computes its own tokens. What a token's loss takes from others of its
sequence (discounted penalties, masks of whole responses) are log-probs, and those are brought together.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn.attention.bias import causal_lower_right

from distill_workers.megatron.batch import MicroBatch
from distill_workers.megatron.parallel import Ranks


def own_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Return the positions of a sequence that a rank has, in its order: [length / size]. `length` must be a multiple
    of 2 * size; a single rank has all positions of any length."""
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * size, -1)
    return chunks[[rank, 2 * size - 1 - rank]].flatten()


@dataclass(frozen=True)
class OwnTokens:
    """The response tokens of a micro-batch that this rank predicts."""

    rows: torch.Tensor
    """[own]: where, in this rank's hidden states [sequence / ranks * samples], each prediction stands."""
    among: torch.Tensor | None
    """[tokens], bool: which of the micro-batch's they are; None where they are all."""
    group: dist.ProcessGroup

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """Return those of [tokens, …] that this rank predicts: [own, …]."""
        return values if self.among is None else values[self.among]

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """Return [tokens, …] on every rank of the group, from [own, …] on each. Every rank may compute the same loss
        from it: the gradient of the own values counts once."""
        joined: torch.Tensor = values if self.among is None else _Join.apply(values, self.among, self.group)
        return joined


def own_tokens(batch: MicroBatch, length: int, ranks: Ranks) -> OwnTokens:
    """Return this rank's tokens of a micro-batch whose sequences have `length` positions on it."""
    if ranks.context_size == 1:
        return OwnTokens(batch.rows, None, ranks.context_group)
    samples = len(batch.input_ids)
    own = own_positions(length * ranks.context_size, ranks.context_rank, ranks.context_size).to(batch.rows.device)
    place = own.new_full((length * ranks.context_size,), -1)
    place[own] = torch.arange(length, device=own.device)
    places = place[batch.rows // samples]
    among = places >= 0
    return OwnTokens((places * samples + batch.rows % samples)[among], among, ranks.context_group)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, among: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.save_for_backward(among)
        joined = values.new_zeros(len(among), *values.shape[1:])
        joined[among] = values
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (among,) = ctx.saved_tensors
        return gradients[0][among], None, None


def gather_sequence(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return keys or values of whole sequences [batch, groups, sequence, head], gathered from all ranks."""
    # Backward sums the gradients that the queries of all ranks give this rank's part.
    gathered: torch.Tensor = gather_from_sequence_parallel_region(own.permute(2, 0, 1, 3), group=group)
    size = group.size()
    order = torch.cat([own_positions(len(gathered), rank, size) for rank in range(size)]).argsort()
    return gathered[order.to(own.device)].permute(1, 2, 0, 3)


def causal_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Causal attention of this rank's queries: query [batch, heads, own, head], keys and values [batch, heads,
    sequence, head] -> [batch, heads, own, head]."""
    rank, size = group.rank(), group.size()
    chunk = query.shape[2] // 2
    found = []
    for i, number in enumerate((rank, 2 * size - 1 - rank)):
        seen = (number + 1) * chunk
        mask: Any = causal_lower_right(chunk, seen)
        part = query[:, :, i * chunk : (i + 1) * chunk]
        found.append(F.scaled_dot_product_attention(part, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask))
    return torch.cat(found, dim=2)
