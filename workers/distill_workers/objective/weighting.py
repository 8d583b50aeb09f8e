"""Weights of tokens in the divergence: by what stands before them, by how much they can teach, by the outcome."""

import torch

from distill_api.spec.objective import Weighting
from distill_workers.objective.responses import highest_share, response_sum

CORRECT = 1.0
"""Reward from which on a response is correct, as in an evaluation's pass@k."""


def token_weights(
    weighting: Weighting,
    *,
    reverse_kl: torch.Tensor,
    divergence: torch.Tensor,
    entropy: torch.Tensor | None,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Return the weight of each token, detached: [tokens], in the dtype of reverse_kl.

    reverse_kl, divergence [tokens], nats: log pi - log pi_T at the sampled token, and the divergence of the support.
    entropy [tokens], nats: of the student, needed where share is below 1. Whole responses; lengths [responses].
    """
    weights = torch.ones_like(reverse_kl)
    if weighting.prefix > 0:
        weights = weights + weighting.prefix * prefix_agreement(reverse_kl, lengths).to(weights.dtype)
    if weighting.share < 1:
        if entropy is None:
            raise ValueError("weighting.share needs the entropy of the student at each token")
        kept = most_informative(entropy, divergence, lengths, weighting.share)
        weights = torch.where(kept, weights, 0.0)
    return weights.detach()


def prefix_agreement(reverse_kl: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return 1 - sum_{s<t} |d_s| / sum_s |d_s| over the response of each token: [tokens], float64, 1 where all d are 0.

    1 + gamma times that is the weight of IW-OPD (arXiv 2606.22600, as TRL has it): 1 + gamma at the first token, near 1
    where the response has left what the teacher would write. It looks at the whole response, so that the weighted
    gradient is no longer one of the reverse KL.
    """
    gaps = reverse_kl.detach().double().abs()
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    before = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])[:-1]  # in the whole row
    total = response_sum(gaps, lengths)
    return 1 - torch.where(total > 0, (before - before[starts]) / total, 0.0)


def most_informative(
    entropy: torch.Tensor, divergence: torch.Tensor, lengths: torch.Tensor, share: float
) -> torch.Tensor:
    """Return which tokens are the ceil(share n) most informative of their response of n: [tokens], bool.

    Informative is h + d - h d, the soft OR of TIP (arXiv 2604.14084), of entropy and divergence each over its maximum
    in the response: a token at which the student is unsure, or sure and wrong. Of equals the earlier is taken.
    """
    responses = torch.repeat_interleave(lengths)

    def over_maximum(values: torch.Tensor) -> torch.Tensor:
        values = values.detach().double().clamp(min=0)
        highest = values.new_zeros(len(lengths)).scatter_reduce(0, responses, values, "amax")[responses]
        return torch.where(highest > 0, values / highest, 0.0)

    unsure, far = over_maximum(entropy), over_maximum(divergence)
    return highest_share(unsure + far - unsure * far, lengths, share)


def outcome_weight(weighting: Weighting, reward: float | None) -> float:
    """Return the weight of a response by its reward; 1 where it has none."""
    if reward is None:
        return 1.0
    return weighting.correct if reward >= CORRECT else weighting.wrong
