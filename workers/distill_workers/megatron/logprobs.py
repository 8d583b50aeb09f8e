"""Log-probs of given tokens from hidden states, without [tokens, vocabulary] in memory.

The head's logits are made for a chunk of tokens at a time, reduced to what is asked for, and thrown away; the backward
pass makes them again. Under tensor parallelism each rank holds a part of the vocabulary: the maximum and the sums are
all-reduced, as in Megatron's vocab_parallel_cross_entropy.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CHUNK_BYTES = 64 * 1024**2
"""Logits of one chunk, in fp32. The chunk exists about three times at once."""


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
        """Row of each id on this rank, 0 where it is elsewhere, and whether it is here."""
        here = (ids >= self.start) & (ids < self.start + self.rows)
        return torch.where(here, ids - self.start, 0), here

    def reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
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
    """Log-probs of m ids at each token [tokens, m], nats, with gradient, and the entropy [tokens], nats, without.

    hidden [tokens, hidden], the same on every rank of the group; head [rows + padding, hidden], this rank's part;
    ids [tokens, m], whole-vocabulary ids. Sums are in fp32, or in the inputs' type if that is wider. The gradient of
    `hidden` is summed over the group, so the layers below need no further reduction.
    """
    if chunk_tokens is None:
        chunk_tokens = max(16, CHUNK_BYTES // (4 * max(1, vocabulary.rows)))
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, ids, vocabulary, chunk_tokens)
    return logprobs, entropy


def _logits(hidden: torch.Tensor, head: torch.Tensor, rows: int) -> torch.Tensor:
    """[chunk, rows] of this rank, fp32 or wider."""
    logits = hidden @ head[:rows].t()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, vocabulary: Vocabulary, chunk_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(ids.shape, dtype=wide, device=hidden.device)
        log_normaliser = torch.empty(len(ids), dtype=wide, device=hidden.device)
        entropy = torch.empty_like(log_normaliser)
        for start in range(0, len(ids), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _logits(hidden[rows], head, vocabulary.rows)
            highest = vocabulary.reduce(logits.max(-1).values, dist.ReduceOp.MAX)
            logits -= highest[:, None]
            index, here = vocabulary.local(ids[rows])
            wanted = logits.gather(-1, index).masked_fill_(~here, 0.0)
            weights = logits.exp()
            # One reduction for all sums: of exp(z), of z exp(z), and the wanted logits, which one rank each has.
            sums = [weights.sum(-1, keepdim=True), logits.mul_(weights).sum(-1, keepdim=True), wanted]
            reduced = vocabulary.reduce(torch.cat(sums, -1))
            log_sum = reduced[:, 0].log()
            logprobs[rows] = reduced[:, 2:] - log_sum[:, None]
            entropy[rows] = log_sum - reduced[:, 1] / reduced[:, 0]
            log_normaliser[rows] = highest + log_sum
        ctx.save_for_backward(hidden, head, ids, log_normaliser)
        ctx.vocabulary, ctx.chunk_tokens = vocabulary, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, head, ids, log_normaliser = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        gradient = gradients[0].to(log_normaliser.dtype)
        of_hidden = torch.empty_like(hidden)
        of_head = torch.zeros(head.shape, dtype=log_normaliser.dtype, device=head.device)
        for start in range(0, len(ids), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            # d logp(v) / d z_u = [u = v] - p_u
            of_logits = _logits(hidden[rows], head, vocabulary.rows).sub_(log_normaliser[rows, None]).exp_()
            of_logits *= -gradient[rows].sum(-1, keepdim=True)
            index, here = vocabulary.local(ids[rows])
            of_logits.scatter_add_(-1, index, gradient[rows] * here)
            narrow = of_logits.to(hidden.dtype)
            of_hidden[rows] = narrow @ head[: vocabulary.rows]
            of_head[: vocabulary.rows] += narrow.t() @ hidden[rows]
        return vocabulary.reduce(of_hidden), of_head.to(head.dtype), None, None, None
