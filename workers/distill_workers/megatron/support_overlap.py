"""Overlap of the supports: the share of the student's own top-k tokens that are among the teacher's."""

import torch
import torch.distributed as dist

from distill_workers.megatron.logprobs import CHUNK_BYTES, Vocabulary


@torch.no_grad()
def support_overlap(
    hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, vocabulary: Vocabulary
) -> torch.Tensor:
    """Return the share of the student's top-k tokens that are among the k `ids`, at each token: [tokens].

    hidden [tokens, hidden], the same on every rank of the vocabulary's group; head [rows + padding, hidden], this
    rank's part; ids [tokens, k], the teacher's top-k. Collective over the group. Logits of CHUNK_BYTES exist at once.
    """
    shares = torch.zeros(len(ids), device=hidden.device)
    chunk_tokens = max(16, CHUNK_BYTES // (4 * max(1, vocabulary.rows)))
    k = ids.shape[-1]
    for start in range(0, len(ids), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = (hidden[rows] @ head[: vocabulary.rows].t()).float()
        highest = logits.topk(min(k, vocabulary.rows), -1).values
        if vocabulary.group is not None:
            # A rank with fewer than k rows sends as many as the others.
            highest = torch.nn.functional.pad(highest, (0, k - highest.shape[-1]), value=-torch.inf)
            parts = [torch.empty_like(highest) for _ in range(dist.get_world_size(vocabulary.group))]
            dist.all_gather(parts, highest, group=vocabulary.group)
            highest = torch.cat(parts, -1).topk(k, -1).values
        index, here = vocabulary.local(ids[rows])
        among = (logits.gather(-1, index) >= highest[:, -1:]) & here
        shares[rows] = vocabulary.reduce(among.sum(-1).to(shares.dtype)) / k
    return shares
