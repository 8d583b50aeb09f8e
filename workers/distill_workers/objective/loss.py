"""The loss of each response token.

sampled-token (on-policy distillation as in the Qwen3 report, Thinking Machines and slime):
    d_t  = clip(log pi_old(y_t) - log pi_T(y_t), +-advantage_clip)                                detached
    A'_t = c_reward A_t - c_divergence c_teacher u_t (d_t - b_t + discount return_discount(d_s: s > t))     detached
           - c_reference (the same of log pi_old(y_t) - log pi_ref(y_t), without b_t), with a reference
    L_t  = -w_t min(rho_t A'_t, clip(rho_t, 1 - ratio_clip, 1 + ratio_clip) A'_t),  rho_t = pi_theta(y_t) / pi_old(y_t)
w_t is made of pi_old(y_t) / mu(y_t) (corrections.py), mu being the engine's own probability when it sampled y_t: it
corrects the train-rollout mismatch, which other arithmetic and older weights cause. With w_t that ratio itself and
discount 0 the gradient at rho = 1 is, in expectation and with no reward, that of the reverse KL, whatever the baseline
b_t (baselines.py). The return of later tokens is their discounted mean or sum. u_t is 1 without weighting.py. An
extrapolation has another d_t (reference.py). With a teacher of another tokenizer d_t and the ratio of w_t are those of
the token's whole span, and later tokens are those behind it (spans.py).

top-k:
    L_t = c_divergence c_teacher u_t D(student, teacher; top-k and the sampled token, tail)
          + L_t of sampled-token with A'_t = c_reward A_t
Both, with a control (control.py): L_t of sampled-token, with
    A'_t = c_reward A_t + c_divergence c_teacher A 1[y_t is among the least likely of its response], and c_reference's
Both, with forwardKlAboveEntropy (EOPD, arXiv 2603.07079):
    L_t + c_divergence c_teacher u_t 1[H_T(s_t) > tau] KL(teacher || student; the same)

target (supervised fine-tuning), of responses of the data set alone:
    L_t = -c_divergence log pi(y_t), the forward KL from the target, all of whose mass is at y_t

The divergence is taken on any sequence, the data set's included (GKD, arXiv 2306.13649); the policy gradient on the
student's own alone.
"""

import torch

from distill_api.spec.job_spec import Divergence, Objective, RewardSource, Support
from distill_api.spec.objective import Baseline, DiscountedReturn
from distill_api.teacher.control import Control
from distill_workers.objective.baselines import top_k_value
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.objective.control import ADVANTAGE, least_likely
from distill_workers.objective.corrections import correct
from distill_workers.objective.divergences import higher_estimates, sampled_reverse_kl
from distill_workers.objective.reference import implicit_reward, sampled_divergence
from distill_workers.objective.responses import future_mean, future_sum
from distill_workers.objective.spans import ONE_TOKEN_EACH, Spans
from distill_workers.objective.teacher_top_k import TeacherTopK
from distill_workers.objective.weighting import token_weights


def policy_gradient(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, ratio_clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's clipped surrogate (arXiv 1707.06347, eq. 7), negated, and where the clip stops the gradient: both
    [tokens]."""
    ratio = (logprobs - old.detach()).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * advantages
    return -torch.minimum(plain, clipped), clipped.detach() < plain.detach()


def token_losses(
    objective: Objective,
    coefficients: StepCoefficients,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    engine_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor,
    supervised: torch.Tensor,
    support_logprobs: torch.Tensor | None = None,
    teacher_support_logprobs: torch.Tensor | None = None,
    sampled_in_support: torch.Tensor | None = None,
    teacher_coefficients: torch.Tensor | float = 1.0,
    baselines: torch.Tensor | float = 0.0,
    entropy: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    span_ends: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each token [tokens], nats, and statistics by name (of statistics.SCOPES), each [tokens] and
    detached.

    The tokens are whole responses one after the other; lengths [responses] says how long each is. All log-probs are of
    response tokens at temperature 1, natural, [tokens]: `logprobs` the trainer's, with gradient; `old_logprobs` the
    trainer's before the step (`logprobs.detach()` when a batch is one update); `engine_logprobs` those the token was
    sampled with. advantages [tokens]: of the task reward, 0 without one. supervised [tokens], bool: of the data set.

    teacher_coefficients [tokens]: of the teacher that scored each, where a job has several, times the weight of the
    response's outcome: c_teacher above. entropy [tokens], nats: of the student, where weighting.share is below 1.

    Where Objective.teacher_top_k is not None, it needs the student's log-probs [tokens, k], with gradient, at the
    teacher's top-k ids (-inf at one that the student lacks), the teacher's own [tokens, k], and `sampled_in_support`
    [tokens], bool: the sampled token is one of the k, and not counted again.

    baselines [tokens]: of baseline leave-one-out, the mean divergence over the other responses to the prompt, nats; of
    batch-mean, over those of the step.
    reference_logprobs [tokens]: of objective.reference, where there is one.

    span_ends [tokens], bool: of a teacher with another tokenizer, the last token of each span, in which alone the sum
    of teacher_logprobs has a meaning. Statistics of the reverse KL are then of the span's mean at each of its tokens.
    """
    old, current = old_logprobs.detach(), logprobs.detach()
    spans = Spans(span_ends)
    control = objective.control is not Control.NONE
    # Where a span ends, the teacher's tokenizer says.
    weights = correct(objective.correction, old, engine_logprobs, lengths, ONE_TOKEN_EACH if control else spans)
    # Tokens that the student did not sample have no policy gradient.
    importance = torch.where(supervised, 0.0, weights.values)
    reverse_kl = spans.means(sampled_reverse_kl(current, teacher_logprobs))
    total_advantages = coefficients.reward * advantages
    top_k: TeacherTopK | None = None
    if objective.teacher_top_k is not None:
        if support_logprobs is None or teacher_support_logprobs is None or sampled_in_support is None:
            raise ValueError(
                "support top-k, baseline top-k and forwardKlAboveEntropy need the log-probs of both models at the "
                "teacher's top-k tokens"
            )
        top_k = TeacherTopK(support_logprobs, teacher_support_logprobs, logprobs, teacher_logprobs, sampled_in_support)
    sampled = objective.support is Support.SAMPLED_TOKEN
    divergence = spans.means(sampled_divergence(objective, current, teacher_logprobs, reference_logprobs))
    differentiated = torch.zeros_like(logprobs)
    if not sampled and top_k is not None:
        divergence = differentiated = top_k.divergence(objective.divergence, objective.jsd_beta, objective.entry_clip)
    if objective.support is Support.TARGET:
        divergence = differentiated = -logprobs
    of_method: dict[str, torch.Tensor] = {} if span_ends is None else {"aligned_ratio": spans.single(span_ends)}
    factor = teacher_coefficients * token_weights(
        objective.weighting, reverse_kl=reverse_kl, divergence=divergence, entropy=entropy, lengths=lengths
    )
    if top_k is not None:
        forward_kl, teacher_entropy = top_k.divergence(Divergence.FORWARD_KL), top_k.teacher_entropy()
        of_method |= top_k.statistics(forward_kl, teacher_entropy)
        if objective.forward_kl_above_entropy is not None:
            uncertain = teacher_entropy > objective.forward_kl_above_entropy
            added = torch.where(uncertain, forward_kl, 0.0)
            differentiated, divergence = differentiated + added, divergence + added
            of_method["uncertain_ratio"] = uncertain
    clipped = held = torch.zeros_like(supervised)
    if control:
        factor = teacher_coefficients * least_likely(old, lengths).to(old.dtype)
        differentiated = torch.zeros_like(logprobs)
        total_advantages = total_advantages + coefficients.divergence * (factor * ADVANTAGE)
    elif sampled:
        baseline = _baseline(objective, top_k, baselines, current)
        gaps = spans.totals(sampled_divergence(objective, old, teacher_logprobs, reference_logprobs))
        clipped = gaps.abs() > objective.advantage_clip
        penalty = _penalty(objective, gaps, baseline, lengths, spans)
        if objective.baseline is not Baseline.NONE:
            of_method["baseline"] = baseline
        of_method["advantage_square"] = penalty.square()
        total_advantages = total_advantages - coefficients.divergence * (factor * penalty)
    if reference_logprobs is not None:
        held_back = _penalty(objective, sampled_reverse_kl(old, reference_logprobs), 0.0, lengths, spans)
        total_advantages = total_advantages - objective.reference_coefficient * held_back
        of_method["reference_kl"] = sampled_reverse_kl(current, reference_logprobs)
        of_method["implicit_reward"] = implicit_reward(teacher_logprobs, reference_logprobs)
    loss = coefficients.divergence * (factor * differentiated)
    has_policy_gradient = sampled or control or objective.reward.source is not RewardSource.NONE
    if has_policy_gradient:
        clip_range = objective.correction.ratio_clip
        surrogate, held = policy_gradient(logprobs, old, total_advantages.detach(), clip_range)
        loss = loss + importance * surrogate
    k2, k3 = higher_estimates(reverse_kl)
    stats = {
        "loss": loss,
        "divergence": divergence,
        "reverse_kl": reverse_kl,
        "reverse_kl_k2": k2,
        "reverse_kl_k3": k3,
        "trainer_engine_gap": (current - engine_logprobs).abs(),
        "importance_weight": weights.values,
        "importance_capped_ratio": weights.capped,
        "importance_gated_ratio": weights.gated,
        "sequence_masked_ratio": weights.masked,
        "ratio_clipped_ratio": held,
        "advantage_clipped_ratio": clipped,
        "divergence_weight": factor,
        "selected_ratio": factor > 0,
        **of_method,
    }
    return loss, {name: value.detach().to(current.dtype) for name, value in stats.items()}


def _penalty(
    objective: Objective, gaps: torch.Tensor, baseline: torch.Tensor | float, lengths: torch.Tensor, spans: Spans
) -> torch.Tensor:
    """Return d_t - b_t + discount return(d_s: s > t), nats: [tokens]; d is `gaps`, each that of its span, clipped.

    The return is of the divergence alone: a later baseline depends on this token, and would bias its gradient.
    """
    gaps = gaps.clamp(-objective.advantage_clip, objective.advantage_clip)
    own = gaps - baseline
    if objective.discount == 0:
        return own
    later = future_mean if objective.discounted_return is DiscountedReturn.MEAN else future_sum
    shares = spans.shares(gaps)
    return own + objective.discount * spans.at_end(later(shares, lengths, objective.discount))


def _baseline(
    objective: Objective, top_k: TeacherTopK | None, baselines: torch.Tensor | float, like: torch.Tensor
) -> torch.Tensor:
    """Return the baseline of each token, nats: [tokens], detached, in the dtype of `like`."""
    zeros = torch.zeros_like(like)
    match objective.baseline:
        case Baseline.NONE:
            return zeros
        case Baseline.LEAVE_ONE_OUT | Baseline.BATCH_MEAN:
            return zeros + baselines
        case Baseline.TOP_K:
            assert top_k is not None
            return top_k_value(top_k.student, top_k.teacher)
