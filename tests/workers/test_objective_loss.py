"""The loss of a token: gradient in expectation, clips and caps, and what is reported."""

import math
from typing import Any

import pytest
import torch

from distill_api.spec.job_spec import Divergence, Objective
from distill_workers.objective.coefficients import StepCoefficients, step_coefficients
from distill_workers.objective.divergences import support_divergence
from distill_workers.objective.loss import policy_gradient, token_losses


def objective(**fields: Any) -> Objective:
    return Objective.model_validate({"advantageClip": 1000.0, "correction": {"high": 100.0}, **fields})


def losses(
    spec: Objective, logprobs: torch.Tensor, coefficients: StepCoefficients | None = None, **given: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """token_losses on-policy, of one response of the student's own, with no reward, unless told otherwise."""
    detached = logprobs.detach()
    defaults = {
        "old_logprobs": detached,
        "engine_logprobs": detached,
        "teacher_logprobs": detached,
        "advantages": torch.zeros_like(detached),
        "lengths": torch.tensor([len(detached)]),
        "supervised": torch.zeros(len(detached), dtype=torch.bool),
    }
    return token_losses(spec, coefficients or step_coefficients(spec, 0), logprobs=logprobs, **{**defaults, **given})


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


def test_the_coefficients_of_the_step_weigh_divergence_and_reward() -> None:
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, -3.0], dtype=torch.float64)

    advantages = torch.tensor([0.7, -0.2], dtype=torch.float64)

    loss, _ = losses(objective(), logprobs, StepCoefficients(3.0, 2.0), teacher_logprobs=teacher, advantages=advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)

    # -(c_reward A - c_divergence (log pi - log pi_T))
    expected = [-(2 * 0.7 - 3 * -0.5), -(2 * -0.2 - 3 * 1.0)]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_the_importance_weights_are_reported_as_they_are_used() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    spec = objective(correction={"importanceWeight": "gated", "low": 0.5, "high": 2.0})

    _, stats = losses(spec, logprobs, engine_logprobs=torch.tensor([-1.0, -1.5, -4.0]))

    torch.testing.assert_close(stats["importance_weight"], torch.tensor([1.0, math.exp(0.5), 0.0]))


def test_the_sampled_term_is_clipped_in_nats() -> None:
    logprobs = torch.tensor([-1.0, -30.0], requires_grad=True)

    loss, stats = losses(objective(advantageClip=4.0), logprobs, teacher_logprobs=torch.tensor([-20.0, -1.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)

    assert gradient.tolist() == pytest.approx([4.0, -4.0])
    assert stats["advantage_clipped_ratio"].tolist() == [1.0, 1.0]
    assert stats["reverse_kl"].tolist() == pytest.approx([19.0, -29.0]), "what is reported is not clipped"


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
    forward = support_divergence(Divergence.FORWARD_KL, *unions, present=present)
    torch.testing.assert_close(stats["forward_kl"], forward.detach())
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
    with pytest.raises(ValueError, match="support top-k, baseline top-k and forwardKlAboveEntropy need"):
        losses(objective(support="top-k"), torch.zeros(2))


@pytest.mark.parametrize("support", ["sampled-token", "top-k"])
def test_every_statistic_is_reported_detached_for_each_token(support: str) -> None:
    _, given = top_k_inputs([0, 3, 5])
    del given["union_student"], given["union_teacher"]

    loss, stats = losses(objective(support=support), **given)

    assert all(value.shape == loss.shape and not value.requires_grad for value in stats.values())
    torch.testing.assert_close(stats["trainer_engine_gap"], torch.zeros_like(loss))


def naive_sampled_loss(spec: Objective, response: list[tuple[float, float, float, float]], place: int) -> float:
    """The gradient's factor of one token of a response of (student, engine, teacher, advantage), from the formulas."""
    terms = [max(-spec.advantage_clip, min(spec.advantage_clip, s - t)) for s, _, t, _ in response]
    student, engine, _, advantage = response[place]
    penalty, later = terms[place], terms[place + 1 :]
    if spec.discount and later:
        weights = [spec.discount**i for i in range(len(later))]
        penalty += spec.discount * sum(w * d for w, d in zip(weights, later, strict=True)) / sum(weights)
    weight = min(math.exp(student - engine), spec.correction.high)
    return -weight * (spec.reward_coefficient * advantage - spec.coefficient * penalty)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1.0])
def test_sampled_token_equals_a_plain_loop_over_each_response(discount: float) -> None:
    spec = objective(discount=discount, advantageClip=2.0, coefficient=0.5, rewardCoefficient=3.0)
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 1, 17, 2]
    student, engine, teacher = (-4 * torch.rand(25, dtype=torch.float64, generator=generator) for _ in range(3))
    advantages = torch.randn(25, dtype=torch.float64, generator=generator)
    student.requires_grad_()

    loss, _ = losses(
        spec, student, engine_logprobs=engine, teacher_logprobs=teacher, advantages=advantages,
        lengths=torch.tensor(lengths),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), student)

    expected, start = [], 0
    for length in lengths:
        columns = (x.tolist()[start : start + length] for x in (student.detach(), engine, teacher, advantages))
        response = list(zip(*columns, strict=True))
        expected += [naive_sampled_loss(spec, response, place) for place in range(length)]
        start += length
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", list(Divergence))
def test_the_data_sets_tokens_get_the_divergence_and_no_policy_gradient(divergence: Divergence) -> None:
    logits, given = top_k_inputs([0, 3, 5, 8])
    del given["union_student"], given["union_teacher"]
    given |= {
        "engine_logprobs": torch.zeros(4, dtype=torch.float64),  # as they come: no engine drew them
        "advantages": torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64),
        "lengths": torch.tensor([2, 2]),
        "supervised": torch.tensor([True, True, False, False]),
    }
    spec = {"support": "top-k", "divergence": divergence}

    rewarded, _ = losses(objective(**spec, reward={"source": "exact-match"}), **given)
    plain, stats = losses(objective(**spec), **given)

    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (rewarded, plain)]
    torch.testing.assert_close(rewarded[:2], plain[:2])
    torch.testing.assert_close(gradients[0][:2], gradients[1][:2])
    torch.testing.assert_close(plain, stats["divergence"])
    assert (gradients[0][2:] - gradients[1][2:]).abs().max() > 0.1, "the student's own do get it"


def test_a_masked_response_has_no_policy_gradient_and_the_other_is_as_before() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    engine, teacher = torch.tensor([-1.0, -3.0, -1.0, -1.2]), torch.full((4,), -2.0)
    spec = objective(correction={"sequenceHigh": 2.0, "high": 100})

    loss, stats = losses(spec, logprobs, engine_logprobs=engine, teacher_logprobs=teacher, lengths=torch.tensor([2, 2]))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)

    # The first response's geometric mean is e, the second's exp(0.1).
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 1.0, math.exp(0.2)])
    assert stats["sequence_masked_ratio"].tolist() == [1, 1, 0, 0]


def test_masses_are_those_on_the_teachers_tokens() -> None:
    _, given = top_k_inputs([0, 3, 5])
    del given["union_student"], given["union_teacher"]

    _, stats = losses(objective(support="top-k"), **given)

    torch.testing.assert_close(stats["student_mass"], given["support_logprobs"].detach().exp().sum(-1))
    torch.testing.assert_close(stats["teacher_mass"], given["teacher_support_logprobs"].exp().sum(-1))
    without = losses(objective(), given["logprobs"])[1]
    assert not {"student_mass", "forward_kl"} & set(without)


def test_the_detached_old_policy_gives_no_gradient_through_the_advantage() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)

    loss, _ = losses(objective(), logprobs, old_logprobs=logprobs, teacher_logprobs=torch.tensor([-3.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)

    # d(ratio A') = A' alone; differentiating the penalty as well would add another 1.
    assert gradient.item() == pytest.approx(2.0)


@pytest.mark.parametrize("support", ["sampled-token", "top-k"])
def test_a_teachers_coefficient_weighs_the_divergence_of_its_samples_alone(support: str) -> None:
    def gradient(coefficients: torch.Tensor | float) -> torch.Tensor:
        if support == "top-k":
            _, given = top_k_inputs([0, 3, 5])
            del given["union_student"], given["union_teacher"]
        else:
            logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
            given = {"logprobs": logprobs, "teacher_logprobs": torch.tensor([-3.0, -1.0, -2.0])}
        loss, _ = losses(objective(support=support), teacher_coefficients=coefficients, **given)
        (found,) = torch.autograd.grad(loss.sum(), given["logprobs"])
        return found

    plain, weighted = gradient(1.0), gradient(torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 0.5, 0.0]))
    assert torch.equal(gradient(torch.ones(3)), plain), "without any it is the same to the last bit"


def test_the_masses_of_a_support_are_of_the_ids_that_both_models_have() -> None:
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    support = torch.tensor([[0.5, 0.2, 0.0], [0.1, 0.2, 0.3]], dtype=torch.float64).log()
    theirs = torch.tensor([[0.3, 0.2, 0.4], [0.1, 0.1, 0.1]], dtype=torch.float64).log()

    loss, stats = losses(
        objective(support="top-k", topK=3),
        logprobs,
        support_logprobs=support,
        teacher_support_logprobs=theirs,
        sampled_in_support=torch.tensor([False, False]),
    )
    loss.sum().backward()

    assert stats["student_mass"].tolist() == pytest.approx([0.7, 0.6])
    assert stats["teacher_mass"].tolist() == pytest.approx([0.5, 0.3])
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("rewarded", [False, True], ids=["alone", "beside a reward of other phases"])
def test_the_loss_of_given_targets_is_their_cross_entropy(rewarded: bool) -> None:
    """Value and gradient are those of torch's own, to the rounding of float64, whatever stands for the teacher."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 11, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(11, (7,), generator=generator)
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    reward = {"reward": {"source": "exact-match"}} if rewarded else {}
    spec = objective(divergence="forward-kl", support="target", datasetShare=1, coefficient=0.5, **reward)

    given = {"supervised": torch.ones(7, dtype=torch.bool), "lengths": torch.tensor([3, 4])}
    nothing = torch.zeros(7, dtype=torch.float64)
    loss, stats = losses(spec, logprobs, teacher_logprobs=nothing, engine_logprobs=nothing, **given)
    (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)

    expected = 0.5 * torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (right,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats["divergence"], expected.detach() / 0.5, rtol=1e-12, atol=1e-14)


def test_a_coefficient_of_0_leaves_the_gradient_of_the_reward_alone() -> None:
    """Reinforcement after distillation: the teacher is measured, and moves nothing."""
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    spec = objective(coefficient=0, rewardCoefficient=2, reward={"source": "exact-match"})

    loss, stats = losses(spec, logprobs, advantages=advantages, teacher_logprobs=torch.full_like(advantages, -9.0))
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * loss).sum(), logits, retain_graph=True)

    (right,) = torch.autograd.grad(-2 * (logprobs.exp() * advantages).sum(), logits)
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats["reverse_kl"], logprobs.detach() + 9.0)
