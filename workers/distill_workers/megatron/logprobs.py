"""Log-probs of given tokens from hidden states, without [tokens, vocabulary] in memory.

The head's logits are made for a chunk of tokens at a time, reduced to what is asked for a few rows at a time that stay
in the processor's cache, and thrown away; the backward pass makes them again, unless one chunk was enough. Under tensor
parallelism each rank holds a part of the vocabulary: maxima and sums are all-reduced, as in Megatron's
vocab_parallel_cross_entropy.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from distill_workers.megatron.logits import add_outer, block_rows, logits, slices

CHUNK_BYTES = 96 * 1024**2
"""Size of one chunk's logits in fp32, once in memory, and once more in a narrower dtype of the model."""


@dataclass(frozen=True)
class Vocabulary:
    """This rank's part of the output head."""

    start: int
    """Id of its first row."""
    rows: int
    """Rows that are tokens; those after them pad the vocabulary."""
    group: dist.ProcessGroup | None
    """The ranks with the other parts; None if there are none."""

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row of each id on this rank, 0 where it is elsewhere, and whether it is here."""
        here = (ids >= self.start) & (ids < self.start + self.rows)
        return torch.where(here, ids - self.start, 0), here

    def known(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which ids are tokens of any rank: [...] as the ids, bool. Collective over the group.

        A teacher of the family may have more rows, and -1 stands for an id that belongs to nobody's support.
        """
        end = self.reduce(torch.tensor([self.start + self.rows], device=ids.device), dist.ReduceOp.MAX)
        return (ids >= 0) & (ids < end)

    def reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce a tensor in place over the ranks of the vocabulary."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


def token_logprobs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    ids: torch.Tensor,
    vocabulary: Vocabulary,
    *,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs of m ids at each token [tokens, m], nats, with gradient, and the entropy [tokens], nats,
    without. An id that no rank has, a phantom of the teacher's, has log-prob -inf and no gradient.

    hidden [tokens, hidden], the same on every rank of the group; head [rows + padding, hidden], this rank's part;
    ids [tokens, m], whole-vocabulary ids. Sums are in fp32, or in the inputs' type if that is wider. The gradient of
    `hidden` is summed over the group, so the layers below need no further reduction.
    """
    if chunk_tokens is None:
        chunk_tokens = max(16, CHUNK_BYTES // (4 * max(1, vocabulary.rows)))
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, ids, vocabulary, chunk_tokens)
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, vocabulary: Vocabulary, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        own_head = head[: vocabulary.rows]
        logprobs = hidden.new_empty(ids.shape, dtype=wide)
        log_normaliser = hidden.new_empty(len(ids), dtype=wide)
        entropy = torch.empty_like(log_normaliser)
        buffer = hidden.new_empty(min(chunk_tokens, len(ids)), vocabulary.rows, dtype=wide)
        rows_at_once = block_rows(buffer)
        scratch = buffer.new_empty(rows_at_once, vocabulary.rows)
        known = vocabulary.known(ids)
        for chunk in slices(len(ids), chunk_tokens):
            z = logits(hidden[chunk], own_head, buffer)
            index, here = vocabulary.local(ids[chunk])
            wanted = z.gather(-1, index).masked_fill_(~here, 0.0)
            highest, sums = z.new_empty(len(z), 1), z.new_empty(len(z), 2)
            for block in slices(len(z), rows_at_once):
                torch.amax(z[block], -1, keepdim=True, out=highest[block])
                shifted = z[block] - highest[block]
                weights = torch.exp(shifted, out=scratch[: len(shifted)])
                torch.sum(weights, -1, out=sums[block, 0])
                torch.linalg.vecdot(weights, shifted, out=sums[block, 1])
            of_all = vocabulary.reduce(highest.clone(), dist.ReduceOp.MAX)
            # The sums are of exp(z - highest) and of that times z - highest: made those of the highest of all ranks.
            gap = highest - of_all
            sums[:, 1:] += sums[:, :1] * gap
            sums *= gap.exp()
            reduced = vocabulary.reduce(torch.cat([sums, wanted], -1))
            log_sum = reduced[:, :1].log()
            logprobs[chunk] = reduced[:, 2:] - of_all - log_sum
            logprobs[chunk].masked_fill_(~known[chunk], -torch.inf)
            entropy[chunk] = log_sum[:, 0] - reduced[:, 1] / reduced[:, 0]
            log_normaliser[chunk] = (of_all + log_sum)[:, 0]
        # One chunk is no more than a backward pass would hold anyway.
        kept = buffer if len(ids) <= chunk_tokens else None
        ctx.save_for_backward(hidden, head, ids, known, log_normaliser, kept)
        ctx.vocabulary, ctx.chunk_tokens = vocabulary, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, head, ids, known, log_normaliser, kept = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        own_head = head[: vocabulary.rows]
        gradient = gradients[0].to(log_normaliser.dtype).masked_fill(~known, 0.0)
        total = gradient.sum(-1, keepdim=True)
        of_hidden = torch.empty_like(hidden)
        # None for a head that is not trained.
        of_head = main_gradient(head, log_normaliser.dtype) if ctx.needs_input_grad[1] else None
        is_added = of_head is not None
        if of_head is None and ctx.needs_input_grad[1]:
            of_head = torch.zeros_like(head, dtype=log_normaliser.dtype)
        buffer = log_normaliser.new_empty(min(ctx.chunk_tokens, len(ids)), vocabulary.rows)
        for chunk in slices(len(ids), ctx.chunk_tokens):
            of_logits = buffer.copy_(kept) if kept is not None else logits(hidden[chunk], own_head, buffer)
            # d logp(v) / d z_u = [u = v] - p_u
            for block in slices(len(of_logits), block_rows(buffer)):
                at = slice(chunk.start + block.start, chunk.start + block.stop)
                of_logits[block].sub_(log_normaliser[at, None]).exp_().mul_(-total[at])
            index, here = vocabulary.local(ids[chunk])
            of_logits.scatter_add_(-1, index, gradient[chunk] * here)
            narrow = of_logits.to(hidden.dtype)
            torch.mm(narrow, own_head, out=of_hidden[chunk])
            if of_head is not None:
                add_outer(of_head[: vocabulary.rows], narrow, hidden[chunk])
        given = None if of_head is None or is_added else of_head.to(head.dtype)
        return vocabulary.reduce(of_hidden), given, None, None, None


def main_gradient(head: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the buffer in which Megatron sums up the gradient of a head in a wider type than its own; None without.

    What is added there is not rounded to the head's type before, and takes no memory of its size besides.
    """
    main: torch.Tensor | None = getattr(head, "main_grad", None)
    return main if main is not None and main.dtype == dtype != head.dtype else None
