"""Baselines: what is subtracted from a sampled token's divergence so that its gradient varies less.

The gradient of log pi(y_t) has expectation 0 in every state, so that any number which does not depend on y_t, nor on
what comes after it, leaves the expected gradient as it is. It varies least where that number is what is expected.
"""

import torch

from distill_api.spec.job_spec import Divergence
from distill_workers.objective.divergences import support_divergence


def top_k_value(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(student || teacher) over the teacher's top-k and the tail, nats: [tokens], detached (vOPD, arXiv
    2605.07865: the value of a state, negated, since the reward is log pi_T - log pi).

    student, teacher [tokens, k]: log-probs at the teacher's top-k. It is a lower bound of what is expected over the
    whole vocabulary. The sampled token has no column of its own: with one the value would depend on it, and the
    gradient would be biased.
    """
    return support_divergence(Divergence.REVERSE_KL, student.detach(), teacher)


def leave_one_out_values(penalties: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return for each response the mean over the tokens of the others: [responses], nats, 0 for one alone.

    The responses are those to a prompt, or of a step. Its own tokens are not in the mean of a response, since with them
    it would depend on what was sampled, and the gradient would be biased by one part in the number of responses.
    penalties [tokens]: the divergence at each sampled token, response after response; lengths [responses].
    """
    response = torch.repeat_interleave(lengths)
    sums = penalties.new_zeros(len(lengths)).index_add(0, response, penalties)
    return (sums.sum() - sums) / (lengths.sum() - lengths).clamp(min=1)
