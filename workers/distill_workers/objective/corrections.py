"""Off-policy corrections: the weight of a token's policy gradient when the engine sampled it with other probabilities.

ratio_t = pi_old(y_t) / mu(y_t): the trainer's probability before the step over the engine's own when it sampled y_t.
With spans (spans.py) it is pi_old(span) / mu(span), the product over the token's span: the advantage of a token is that
of its whole span, which was drawn as one action.
"""

from dataclasses import dataclass

import torch

from distill_api.spec.job_spec import Correction, ImportanceWeight
from distill_workers.objective.responses import response_mean
from distill_workers.objective.spans import ONE_TOKEN_EACH, Spans


@dataclass(frozen=True)
class TokenWeights:
    """The correction of each token; all tensors are [tokens], detached."""

    values: torch.Tensor
    """Factor of the token's policy gradient, >= 0."""
    capped: torch.Tensor
    """bool: the ratio was bounded."""
    gated: torch.Tensor
    """bool: the token has no weight, because of its own ratio, or that of its span."""
    masked: torch.Tensor
    """bool: the token has no weight, because of the ratios of its response."""


def correct(
    correction: Correction,
    old: torch.Tensor,
    engine: torch.Tensor,
    lengths: torch.Tensor,
    spans: Spans = ONE_TOKEN_EACH,
) -> TokenWeights:
    """Return the weights of tokens with log-probs old and engine [tokens], of responses with lengths [responses].

    truncated: min(max(ratio, low), high) (TIS, "Your efficient RL framework secretly brings you off-policy RL
    training", Yao et al. 2025); gated: ratio where low <= ratio <= high, else 0 (IcePop, arXiv 2510.18855).
    A response is masked when the geometric mean of its tokens' own ratios, exp(mean log ratio), is out of range, as in
    verl.
    """
    log_ratio = (old - engine).detach()
    ratio = spans.totals(log_ratio).exp()
    outside = (ratio < correction.low) | (ratio > correction.high)
    nowhere = torch.zeros_like(outside)
    capped = gated = nowhere
    match correction.importance_weight:
        case ImportanceWeight.TRUNCATED:
            values, capped = ratio.clamp(correction.low, correction.high), outside
        case ImportanceWeight.GATED:
            values, gated = torch.where(outside, 0.0, ratio), outside
        case ImportanceWeight.NONE:
            values = torch.ones_like(ratio)
    mean_ratio = response_mean(log_ratio, lengths).exp()
    masked = mean_ratio < correction.sequence_low
    if correction.sequence_high is not None:
        masked = masked | (mean_ratio > correction.sequence_high)
    return TokenWeights(torch.where(masked, 0.0, values), capped, gated, masked)
