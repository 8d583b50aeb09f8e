"""The loss of each response token.

sampled-token (on-policy distillation as in the Qwen3 report, Thinking Machines and slime):
    A'_t = A_t - coefficient clip(log pi_old(y_t) - log pi_T(y_t), +-advantage_clip)              detached
    L_t  = -w_t min(rho_t A'_t, clip(rho_t, 1 - ratio_clip, 1 + ratio_clip) A'_t),  rho_t = pi_theta(y_t) / pi_old(y_t)
    w_t  = min(pi_old(y_t) / mu(y_t), importance_cap)                                             detached
mu is the engine's own probability when it drew y_t: w_t corrects both for its other arithmetic and for its older
weights (truncated importance sampling). The gradient at rho = 1 is -w_t A'_t grad log pi_theta: in expectation, with no
reward, that of the reverse KL.

top-k:
    L_t = coefficient D(student, teacher; top-k and the drawn token, tail) + L_t of sampled-token with A'_t = A_t
"""

import torch

from distill_api.spec import Objective, RewardSource, Support
from distill_workers.objective.divergences import sampled_reverse_kl, support_divergence

STATS = (
    "loss",
    "reverse_kl",
    "divergence",
    "trainer_engine_gap",
    "importance_capped_ratio",
    "ratio_clipped_ratio",
    "advantage_clipped_ratio",
)
"""What `token_losses` reports of each token. divergence is what is minimised: with sampled-token its k1 estimate."""


def importance_weights(old: torch.Tensor, engine: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """min(exp(old - engine), cap) of log-probs [tokens], and which were capped, bool: both [tokens], detached."""
    weights = (old - engine).detach().exp()
    return weights.clamp(max=cap), weights > cap


def policy_gradient(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, ratio_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), negated, and where the clip stops the gradient: [tokens]."""
    ratio = (logprobs - old.detach()).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * advantages
    return -torch.minimum(plain, clipped), clipped.detach() < plain.detach()


def token_losses(
    objective: Objective,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    engine_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    support_logprobs: torch.Tensor | None = None,
    teacher_support_logprobs: torch.Tensor | None = None,
    sampled_in_support: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each token [tokens], nats, and STATS, each [tokens] and detached.

    All log-probs are of response tokens at temperature 1, natural, [tokens]: `logprobs` the trainer's, with gradient;
    `old_logprobs` the trainer's before the step (`logprobs.detach()` when a batch is one update); `engine_logprobs`
    those the token was drawn with. advantages [tokens]: group-normalised reward times its coefficient, 0 without one.

    Support top-k needs the student's log-probs [tokens, k], with gradient, at the teacher's top-k ids, the teacher's
    own [tokens, k], and `sampled_in_support` [tokens], bool: the drawn token is one of the k, and not counted again.
    """
    old, current = old_logprobs.detach(), logprobs.detach()
    weights, capped = importance_weights(old, engine_logprobs, objective.importance_cap)
    reverse_kl = sampled_reverse_kl(current, teacher_logprobs)
    clip = objective.advantage_clip
    if objective.support is Support.SAMPLED_TOKEN:
        penalty = sampled_reverse_kl(old, teacher_logprobs).clamp(-clip, clip)
        total_advantages = (advantages - objective.coefficient * penalty).detach()
        surrogate, held = policy_gradient(logprobs, old, total_advantages, objective.ratio_clip)
        loss = weights * surrogate
        divergence, clipped = reverse_kl, reverse_kl.abs() > clip
    else:
        if support_logprobs is None or teacher_support_logprobs is None or sampled_in_support is None:
            raise ValueError("support top-k needs the log-probs of student and teacher at the teacher's top-k tokens")
        inside = torch.ones_like(support_logprobs, dtype=torch.bool)
        divergence = support_divergence(
            objective.divergence,
            torch.cat([support_logprobs, logprobs[:, None]], -1),
            torch.cat([teacher_support_logprobs, teacher_logprobs[:, None]], -1),
            present=torch.cat([inside, ~sampled_in_support[:, None]], -1),
            jsd_beta=objective.jsd_beta,
        )
        loss = objective.coefficient * divergence
        held = clipped = torch.zeros_like(capped)
        if objective.reward.source is not RewardSource.NONE:
            surrogate, held = policy_gradient(logprobs, old, advantages.detach(), objective.ratio_clip)
            loss = loss + weights * surrogate
    stats = {
        "loss": loss,
        "reverse_kl": reverse_kl,
        "divergence": divergence,
        "trainer_engine_gap": (current - engine_logprobs).abs(),
        "importance_capped_ratio": capped,
        "ratio_clipped_ratio": held,
        "advantage_clipped_ratio": clipped,
    }
    return loss, {name: value.detach().to(current.dtype) for name, value in stats.items()}
