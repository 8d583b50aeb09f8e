"""The reference: a third model, away from which a student is led beyond its teacher, or near which it is held.

Extrapolation (G-OPD, arXiv 2602.12125) is KL-regularised reinforcement learning whose reward is what the teacher's own
training rewarded, log pi_T - log pi_ref, times lambda, and whose anchor is the reference:
    max E[lambda (log pi_T - log pi_ref)] - KL(pi || pi_ref)
        = -min KL(pi || pi_T) - (lambda - 1) E[log pi_T - log pi_ref]
lambda 1 is distillation, 0 a KL to the reference alone. Each token by itself is best at pi_T^lambda pi_ref^(1-lambda),
normalised. The KL to the reference as a stabiliser (StableOPD, arXiv 2604.08527) is a term of its own in loss.py.
"""

import torch

from distill_api.spec.objective import Objective
from distill_workers.objective.divergences import sampled_reverse_kl


def implicit_reward(teacher: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return log pi_T(y) - log pi_ref(y) at sampled tokens, nats: [tokens]."""
    return teacher - reference


def sampled_divergence(
    objective: Objective, student: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor | None
) -> torch.Tensor:
    """Return what sampled-token minimises, from log-probs at sampled tokens: [tokens], nats, not clipped.

    d_t - (lambda - 1) (log pi_T - log pi_ref), d_t = log pi - log pi_T; d_t alone without a reference.
    """
    gaps = sampled_reverse_kl(student, teacher)
    if objective.reference is None:
        return gaps
    if reference is None:
        raise ValueError("objective.reference needs the log-probs of the reference at the sampled tokens")
    return gaps - (objective.extrapolation - 1) * implicit_reward(teacher, reference)
