"""Divergences of student and teacher over a support of k tokens and one tail bucket.

The vocabulary is coarsened to k + 1 outcomes: each token of the support, and "any other token". A divergence of the two
coarsened distributions is a true divergence: never negative, 0 only where they agree, and a lower bound of the one over
the whole vocabulary (data processing inequality). Dropping the tail instead gives a sum that can be negative, and
clamping that at 0 kills its gradient (verl#7855); on the teacher's top-k alone the student can leave the set at no cost
(verl#5041).
"""

import math

import torch

from distill_api.spec.job_spec import Divergence

TAIL_FLOOR = 1e-6
"""Smallest mass of the tail. Log-probs in fp32 leave 1e-7 of rounding in 1 - sum p: below that the tail is noise.
The gradient is not large on either side of it; but a student's tail below it is not pulled up any more."""

ESTIMATE_NATS = 20.0
"""Bound of the exponent in an estimate of the reverse KL."""

ABSENT_NATS = -1e4
"""Log-prob of a column that is not part of the support: exp is 0 on both sides, and no infinity enters a gradient."""


def coarsen(logprobs: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """Return log-probs of the k tokens and of the tail bucket: [tokens, k] -> [tokens, k + 1], float64, each row sums
    to 1.

    present [tokens, k], bool: columns that belong to the support; absent ones get no mass. Float64, because the terms
    of a divergence cancel; the tensors are k wide, not a vocabulary wide.
    """
    inside = logprobs.double()
    if present is not None:
        inside = torch.where(present, inside, ABSENT_NATS)
    log_mass = inside.logsumexp(-1, keepdim=True)
    # log(1 - mass) without cancellation (Mächler 2012, log1mexp), for a mass that leaves at least the floor.
    bounded = log_mass.clamp(max=math.log1p(-TAIL_FLOOR))
    half = bounded > -math.log(2)
    near_one = torch.log(-torch.expm1(torch.where(half, bounded, -1.0)))
    near_zero = torch.log1p(-torch.exp(torch.where(half, -1.0, bounded)))
    tail = torch.where(half, near_one, near_zero)
    # Where the floor was used, or rounding made the mass exceed 1, the row is normalised again.
    return torch.log_softmax(torch.cat([inside, tail], -1), -1)


def kl(p: torch.Tensor, q: torch.Tensor, entry_clip: float = math.inf) -> torch.Tensor:
    """Return KL(p || q) of log-probs [..., outcomes], nats: [...]; with entry_clip, of terms that are at most so."""
    return (p.exp() * (p - q)).clamp(max=entry_clip).sum(-1)


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """Return beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S, nats: [...]. Log-probs are
    [..., outcomes].

    Generalised JSD of GKD (arXiv 2306.13649, eq. 1): beta -> 0 has the gradient of forward KL, beta -> 1 of reverse KL.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def support_divergence(
    divergence: Divergence,
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    present: torch.Tensor | None = None,
    jsd_beta: float = 0.5,
    entry_clip: float | None = None,
) -> torch.Tensor:
    """Return the divergence over support and tail, nats: [tokens], differentiable in `student`, in its dtype.

    student, teacher [tokens, k]: log-probs of the same ids, normalised over the whole vocabulary. An id that the
    student lacks (log-prob -inf) is no part of the support: what the teacher gives to it is in the tail. Reverse KL is
    KL(student || teacher), forward KL is KL(teacher || student). The tail bucket makes this the coarsened form of
    GKD (arXiv 2306.13649); one detached number per token instead would not distil (miles#2362). entry_clip bounds the
    term of each outcome in forward KL (OPSD, arXiv 2601.18734): a clipped one has no gradient.
    """
    possible = student != -math.inf
    present = possible if present is None else present & possible
    s, t = coarsen(student, present), coarsen(teacher, present)
    match divergence:
        case Divergence.REVERSE_KL:
            value = kl(s, t)
        case Divergence.FORWARD_KL:
            value = kl(t, s, math.inf if entry_clip is None else entry_clip)
        case Divergence.JSD:
            value = jensen_shannon(t, s, jsd_beta)
    return value.to(student.dtype)


def sampled_reverse_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """Return the k1 estimate log pi_theta(y) - log pi_T(y) of the reverse KL at sampled tokens, nats: [tokens].

    Its mean over tokens sampled from the student is KL(student || teacher). It may be negative at one token. Used as a
    reward only: differentiated directly, its expected gradient is 0 (Schulman, "Approximating KL divergence", k1).
    """
    return student_logprobs - teacher_logprobs


def higher_estimates(k1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k2 = k1^2 / 2 and k3 = exp(-k1) - 1 + k1 of the reverse KL, from k1 [tokens], nats: both [tokens].

    For reports alone (Schulman, "Approximating KL divergence"): neither is negative at any token; k3 is unbiased like
    k1, with less variance where the two models are close. k1 is taken as at least -20 nats in k3, as verl does: the
    exponential of one token would drown all others.
    """
    return k1.square() / 2, torch.expm1((-k1).clamp(max=ESTIMATE_NATS)) + k1.clamp(min=-ESTIMATE_NATS)
