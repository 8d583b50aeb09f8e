"""The loss of a token: gradient in expectation, clips and caps, and what is reported."""

import math
from typing import Any

import pytest
import torch

from distill_api.spec import Divergence, Objective
from distill_workers.objective.divergences import support_divergence
from distill_workers.objective.loss import STATS, importance_weights, policy_gradient, token_losses


def objective(**fields: Any) -> Objective:
    return Objective.model_validate({"advantageClip": 1000.0, "importanceCap": 100.0, **fields})


def losses(
    spec: Objective, logprobs: torch.Tensor, **given: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """token_losses on-policy, with no reward, unless told otherwise."""
    detached = logprobs.detach()
    defaults = {
        "old_logprobs": detached,
        "engine_logprobs": detached,
        "teacher_logprobs": detached,
        "advantages": torch.zeros_like(detached),
    }
    return token_losses(spec, logprobs=logprobs, **{**defaults, **given})


def test_the_expected_gradient_of_sampled_tokens_is_that_of_the_true_reverse_kl() -> None:
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([1.0, 0.2, -0.5, 0.0], dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)

    # Every token of the vocabulary once, weighted by the probability of drawing it.
    loss, _ = losses(objective(), logprobs, teacher_logprobs=teacher)
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * loss).sum(), logits, retain_graph=True)

    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_the_importance_weight_corrects_for_an_engine_with_other_probabilities() -> None:
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    engine = torch.tensor([0.1, 0.0, 0.4], dtype=torch.float64).log_softmax(-1)
    teacher = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)

    loss, _ = losses(objective(), logprobs, teacher_logprobs=teacher, engine_logprobs=engine)
    (gradient,) = torch.autograd.grad((engine.exp() * loss).sum(), logits, retain_graph=True)

    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_coefficient_and_reward_advantage_add_up() -> None:
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, -3.0], dtype=torch.float64)

    loss, _ = losses(
        objective(coefficient=3.0), logprobs, teacher_logprobs=teacher, advantages=torch.tensor([0.7, -0.2]).double()
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)

    # -(A - coefficient (log pi - log pi_T))
    torch.testing.assert_close(gradient, torch.tensor([-(0.7 - 3 * -0.5), -(-0.2 - 3 * 1.0)], dtype=torch.float64))


def test_the_sampled_term_is_clipped_in_nats() -> None:
    logprobs = torch.tensor([-1.0, -30.0], requires_grad=True)

    loss, stats = losses(objective(advantageClip=4.0), logprobs, teacher_logprobs=torch.tensor([-20.0, -1.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)

    assert gradient.tolist() == pytest.approx([4.0, -4.0])
    assert stats["advantage_clipped_ratio"].tolist() == [1.0, 1.0]
    assert stats["reverse_kl"].tolist() == pytest.approx([19.0, -29.0]), "what is reported is not clipped"


def test_the_importance_weight_is_capped_detached_and_counted() -> None:
    old, engine = torch.tensor([0.0, 0.0, -1.0]), torch.tensor([-3.0, 0.0, 0.0])

    weights, capped = importance_weights(old.requires_grad_(), engine, cap=2.0)

    assert weights.tolist() == pytest.approx([2.0, 1.0, math.exp(-1)])
    assert capped.tolist() == [True, False, False]
    assert not weights.requires_grad


def test_the_ratio_is_clipped_on_the_side_that_would_go_further() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_()

    surrogate, held = policy_gradient(logprobs, torch.zeros(4, dtype=torch.float64), advantages, ratio_clip=0.2)
    (gradient,) = torch.autograd.grad(surrogate.sum(), logprobs)

    assert surrogate.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert held.tolist() == [True, False, False, True]
    assert gradient.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])


def top_k_inputs(sampled: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    logits, teacher = (torch.randn(len(sampled), 9, dtype=torch.float64, generator=generator) for _ in range(2))
    logits.requires_grad_()
    student, teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    ids, drawn = teacher.topk(3, -1).indices, torch.tensor(sampled)[:, None]
    return logits, {
        "logprobs": student.gather(-1, drawn)[:, 0],
        "teacher_logprobs": teacher.gather(-1, drawn)[:, 0],
        "support_logprobs": student.gather(-1, ids),
        "teacher_support_logprobs": teacher.gather(-1, ids),
        "sampled_in_support": (ids == drawn).any(-1),
        "union_student": torch.cat([student.gather(-1, ids), student.gather(-1, drawn)], -1),
        "union_teacher": torch.cat([teacher.gather(-1, ids), teacher.gather(-1, drawn)], -1),
    }


@pytest.mark.parametrize("divergence", list(Divergence))
def test_top_k_is_the_coefficient_times_the_divergence_over_the_union(divergence: Divergence) -> None:
    logits, given = top_k_inputs([0, 3, 5, 8, 2, 1])
    unions = given.pop("union_student"), given.pop("union_teacher")
    inside = given["sampled_in_support"]
    assert inside.any() and not inside.all()

    loss, stats = losses(objective(support="top-k", divergence=divergence, coefficient=2.0), **given)

    present = torch.ones(len(inside), 4, dtype=torch.bool)
    present[:, 3] = ~inside
    expected = 2 * support_divergence(divergence, *unions, present=present)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats["divergence"], expected / 2)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_top_k_adds_the_policy_gradient_only_of_a_reward() -> None:
    _, given = top_k_inputs([0, 3, 5])
    del given["union_student"], given["union_teacher"]
    given["advantages"] = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    without, _ = losses(objective(support="top-k"), **given)
    rewarded, _ = losses(objective(support="top-k", reward={"source": "exact-match"}), **given)

    torch.testing.assert_close(rewarded - without, -given["advantages"])


def test_top_k_without_the_teachers_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="top-k needs"):
        losses(objective(support="top-k"), torch.zeros(2))


@pytest.mark.parametrize("support", ["sampled-token", "top-k"])
def test_every_statistic_is_reported_detached_for_each_token(support: str) -> None:
    _, given = top_k_inputs([0, 3, 5])
    del given["union_student"], given["union_teacher"]

    loss, stats = losses(objective(support=support), **given)

    assert tuple(stats) == STATS
    assert all(value.shape == loss.shape and not value.requires_grad for value in stats.values())
    torch.testing.assert_close(stats["trainer_engine_gap"], torch.zeros_like(loss))


def test_the_detached_old_policy_gives_no_gradient_through_the_advantage() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)

    loss, _ = losses(objective(), logprobs, old_logprobs=logprobs, teacher_logprobs=torch.tensor([-3.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)

    # d(ratio A') = A' alone; differentiating the penalty as well would add another 1.
    assert gradient.item() == pytest.approx(2.0)
