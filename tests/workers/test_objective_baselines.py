"""Baselines of the sampled-token gradient: the same expectation, exactly, and a smaller variance."""

from typing import Any

import pytest
import torch
from tiny_language import RESPONSES, TOKENS, TinyLanguage

from distill_api.spec.job_spec import Objective
from distill_workers.objective.baselines import leave_one_out_values, top_k_value


def objective(**fields: Any) -> Objective:
    return Objective.model_validate(
        {"advantageClip": 1000.0, "topK": 2 if "top-k" in fields.values() else 16, **fields}
    )


def gradients(language: TinyLanguage, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of each response's loss: [responses, states * vocabulary]."""
    totals = loss.view(-1, TOKENS).sum(-1)
    return torch.stack([language.gradient(total).flatten() for total in totals])


def mean_and_variance(probabilities: torch.Tensor, samples: torch.Tensor) -> tuple[torch.Tensor, float]:
    mean = (probabilities[:, None] * samples).sum(0)
    return mean, (probabilities * (samples - mean).square().sum(-1)).sum().item()


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_top_k_value_leaves_the_expected_gradient_as_it_is_and_lowers_its_variance_where_the_teacher_is_surer(
    seed: int, discount: float
) -> None:
    language = TinyLanguage.random(seed, sharpness=3.0)
    probabilities = language.probabilities.detach()
    returns = {"discount": discount, "discountedReturn": "sum"} if discount else {}
    plain, _ = language.token_losses(objective(**returns))
    steadied, stats = language.token_losses(objective(baseline="top-k", **returns))

    mean, variance = mean_and_variance(probabilities, gradients(language, plain))
    steadied_mean, steadied_variance = mean_and_variance(probabilities, gradients(language, steadied))

    torch.testing.assert_close(steadied_mean, mean, rtol=1e-12, atol=1e-14)
    if discount:  # the gradient of the reverse KL of whole responses
        right = language.gradient((language.visits() * language.reverse_kl()).sum()).flatten()
    else:  # that of each token alone, at the states that the student comes to
        right = language.gradient((language.visits().detach() * language.reverse_kl()).sum()).flatten()
    torch.testing.assert_close(mean, right, rtol=1e-12, atol=1e-14)
    assert steadied_variance < 0.9 * variance
    assert stats["advantage_square"].mean() > 0


@pytest.mark.parametrize("baseline", ["top-k", "leave-one-out", "batch-mean"])
def test_a_baseline_may_raise_the_variance_where_the_student_is_surer_than_its_teacher(baseline: str) -> None:
    language = TinyLanguage.random(1, sharpness=0.3, distance=0.5)
    probabilities = language.probabilities.detach()
    mean_kl = (language.visits() @ language.reverse_kl()).detach() / TOKENS
    plain, _ = language.token_losses(objective())
    steadied, _ = language.token_losses(objective(baseline=baseline), baselines=mean_kl)

    _, variance = mean_and_variance(probabilities, gradients(language, plain))
    _, steadied_variance = mean_and_variance(probabilities, gradients(language, steadied))
    assert steadied_variance > 1.1 * variance


def test_the_top_k_value_is_the_reverse_kl_where_the_top_k_is_the_vocabulary() -> None:
    language = TinyLanguage.random(1)
    student = language.student.detach()

    value = top_k_value(student[:, :3], language.teacher[:, :3])  # the tail is the fourth

    torch.testing.assert_close(value, language.reverse_kl().detach())


def test_the_top_k_value_does_not_depend_on_the_token_that_was_sampled() -> None:
    """If it did, the gradient would be biased: the support has no place for the sampled token."""
    language = TinyLanguage.random(2)
    _, stats = language.token_losses(objective(baseline="top-k"))

    firsts = stats["baseline"].view(-1, TOKENS)[:, 0]
    assert firsts.unique().numel() == 1 and firsts[0] > 0
    plain = language.token_losses(objective())[1]
    assert "baseline" not in plain


def test_the_advantage_is_what_the_sampled_token_is_above_the_value() -> None:
    language = TinyLanguage.random(3)
    loss, stats = language.token_losses(objective(baseline="top-k", coefficient=2.0))

    advantage = -(stats["reverse_kl"] - stats["baseline"])
    torch.testing.assert_close(loss.detach(), -2.0 * advantage)
    torch.testing.assert_close(stats["advantage_square"], advantage.square())


def groups_of_two(language: TinyLanguage) -> TinyLanguage:
    """Every group of two responses."""
    every = [response for first in RESPONSES for second in RESPONSES for response in (first, second)]
    return TinyLanguage(language.logits, language.teacher, every)


@pytest.mark.parametrize("baseline", ["leave-one-out", "batch-mean"])
def test_the_mean_of_the_others_leaves_the_expected_gradient_as_it_is(baseline: str) -> None:
    language = TinyLanguage.random(4)
    one = language.probabilities.detach()
    probability = (one[:, None] * one).flatten().repeat_interleave(2 * TOKENS)  # of the group of each token
    groups = groups_of_two(language)
    plain, stats = groups.token_losses(objective())
    of_groups = stats["reverse_kl"].view(-1, 2 * TOKENS)
    others = torch.cat([leave_one_out_values(group, torch.tensor([TOKENS, TOKENS])) for group in of_groups])
    baselines = others.repeat_interleave(TOKENS)

    steadied, stats = groups.token_losses(objective(baseline=baseline), baselines=baselines)

    torch.testing.assert_close(stats["baseline"], baselines)
    expected = groups.gradient((probability * plain).sum())
    torch.testing.assert_close(groups.gradient((probability * steadied).sum()), expected, rtol=1e-12, atol=1e-14)


def test_a_mean_with_the_response_itself_would_bias_the_gradient() -> None:
    """So the batch mean is that of the others: by as much as it would be, the whole mean is off."""
    language = TinyLanguage.random(4)
    one = language.probabilities.detach()
    probability = (one[:, None] * one).flatten().repeat_interleave(2 * TOKENS)
    groups = groups_of_two(language)
    plain, stats = groups.token_losses(objective())
    whole = stats["reverse_kl"].view(-1, 2 * TOKENS).mean(-1).repeat_interleave(2 * TOKENS)

    biased, _ = groups.token_losses(objective(baseline="batch-mean"), baselines=whole)

    right = groups.gradient((probability * plain).sum())
    assert (groups.gradient((probability * biased).sum()) - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_of_many_others_lowers_the_variance(seed: int) -> None:
    """Of so many that it is what they are expected to be."""
    language = TinyLanguage.random(seed, sharpness=4.0)
    probabilities = language.probabilities.detach()
    plain, stats = language.token_losses(objective())
    expected = (probabilities.repeat_interleave(TOKENS) * stats["reverse_kl"]).sum() / TOKENS

    steadied, _ = language.token_losses(objective(baseline="leave-one-out"), baselines=expected)

    mean, variance = mean_and_variance(probabilities, gradients(language, plain))
    steadied_mean, steadied_variance = mean_and_variance(probabilities, gradients(language, steadied))
    torch.testing.assert_close(steadied_mean, mean, rtol=1e-12, atol=1e-14)
    assert steadied_variance < 0.95 * variance


def test_the_mean_of_the_others_is_over_their_tokens_and_a_response_alone_has_none() -> None:
    penalties = torch.tensor([1.0, 2.0, 3.0, 10.0, -4.0, 0.0], dtype=torch.float64)

    found = leave_one_out_values(penalties, torch.tensor([3, 1, 2]))

    assert found.tolist() == pytest.approx([(10 - 4) / 3, (6 - 4) / 5, (6 + 10) / 4])
    assert leave_one_out_values(penalties, torch.tensor([6])).tolist() == [0.0]


def test_a_baseline_of_the_top_k_without_the_teachers_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline top-k and forwardKlAboveEntropy need"):
        TinyLanguage.random().token_losses(objective(baseline="top-k"), support_logprobs=None)
