"""The reference: extrapolation and the KL to it, by exact expectations over the tiny language."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_language import TOKENS, TinyLanguage

from distill_api.spec.job_spec import Objective


def objective(**fields: Any) -> Objective:
    return Objective.model_validate({"advantageClip": 1000.0, "reference": "base", **fields})


def expected(language: TinyLanguage, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss of a response as it is expected: [states, vocabulary]."""
    return language.gradient((language.probabilities.detach() * loss.view(-1, TOKENS).sum(-1)).sum())


def definition(language: TinyLanguage, extrapolation: float, reference_coefficient: float) -> torch.Tensor:
    """[states]: KL(pi || pi_T) - (lambda - 1) E[log pi_T - log pi_ref] + beta KL(pi || pi_ref), with gradient."""
    assert language.reference is not None
    rewards = (language.student.exp() * (language.teacher - language.reference)).sum(-1)
    held = reference_coefficient * language.reverse_kl(language.reference)
    return language.reverse_kl() - (extrapolation - 1) * rewards + held


METHODS = [
    pytest.param(1.25, 0.0, id="extrapolation"),
    pytest.param(0.5, 0.0, id="interpolation"),
    pytest.param(1.0, 0.3, id="held"),
    pytest.param(1.5, 0.2, id="both"),
]


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize(("extrapolation", "beta"), METHODS)
def test_the_expected_gradient_is_that_of_the_definition(extrapolation: float, beta: float, discount: float) -> None:
    language = TinyLanguage.random(1)
    returns = {"discount": 1.0, "discountedReturn": "sum"} if discount else {}

    loss, _ = language.token_losses(objective(extrapolation=extrapolation, referenceCoefficient=beta, **returns))

    visits = language.visits() if discount else language.visits().detach()
    right = language.gradient(visits @ definition(language, extrapolation, beta))
    torch.testing.assert_close(expected(language, loss), right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("extrapolation", "beta"), METHODS)
def test_the_loss_is_the_advantage_negated(extrapolation: float, beta: float) -> None:
    language = TinyLanguage.random(2)
    _, plain = language.token_losses(Objective(advantage_clip=1000.0))
    fields = {"extrapolation": extrapolation, "referenceCoefficient": beta, "coefficient": 2.0}

    loss, stats = language.token_losses(objective(**fields))

    torch.testing.assert_close(stats["reverse_kl"], plain["reverse_kl"], rtol=0, atol=0)
    gap = stats["reverse_kl"] - (extrapolation - 1) * stats["implicit_reward"]
    torch.testing.assert_close(stats["divergence"], gap)
    torch.testing.assert_close(loss.detach(), 2 * gap + beta * stats["reference_kl"])
    # log pi - log pi_ref is log pi - log pi_T and log pi_T - log pi_ref.
    torch.testing.assert_close(stats["reference_kl"], stats["reverse_kl"] + stats["implicit_reward"])


def test_without_a_reference_nothing_is_said_of_one() -> None:
    _, stats = TinyLanguage.random(2).token_losses(Objective())
    assert not {"implicit_reward", "reference_kl"} & stats.keys()


def test_an_extrapolation_of_0_makes_the_reference_the_teacher() -> None:
    language = TinyLanguage.random(3)
    assert language.reference is not None
    loss, _ = language.token_losses(objective(extrapolation=0))

    swapped, _ = TinyLanguage(language.logits, language.reference).token_losses(Objective(advantage_clip=1000.0))

    torch.testing.assert_close(loss, swapped)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_of_an_extrapolation_earns_more_of_the_implicit_reward_than_the_teacher(seed: int) -> None:
    """What the teacher's own training rewarded, if that was the KL-regularised kind and began at the reference."""
    language = TinyLanguage.random(seed)
    assert language.reference is not None
    implicit = language.teacher - language.reference
    earned = [(language.optimum(objective(extrapolation=e)).exp() * implicit).sum(-1) for e in (0.5, 1.25, 1.5)]
    of_teacher = (language.teacher.exp() * implicit).sum(-1)
    assert (earned[0] < of_teacher).all() and (of_teacher < earned[1]).all() and (earned[1] < earned[2]).all()


def test_the_kl_to_the_reference_is_weighed_by_its_own_coefficient_alone() -> None:
    """A response that a teacher's coefficient or its outcome leaves out is held all the same."""
    language = TinyLanguage.random(4)

    loss, stats = language.token_losses(objective(referenceCoefficient=0.25), teacher_coefficients=0.0)

    torch.testing.assert_close(loss.detach(), 0.25 * stats["reference_kl"])


def test_a_step_without_a_divergence_holds_the_student_all_the_same() -> None:
    language = TinyLanguage.random(4)

    loss, stats = language.token_losses(objective(referenceCoefficient=0.25, coefficient=0.0))

    torch.testing.assert_close(loss.detach(), 0.25 * stats["reference_kl"])


def test_each_of_the_two_terms_is_clipped_in_nats() -> None:
    language = TinyLanguage.random(5)
    fields = {"extrapolation": 1.5, "referenceCoefficient": 0.5, "advantageClip": 1.0}

    loss, stats = language.token_losses(objective(**fields))

    gap, held = stats["divergence"], stats["reference_kl"]
    torch.testing.assert_close(loss.detach(), gap.clamp(-1.0, 1.0) + 0.5 * held.clamp(-1.0, 1.0))
    torch.testing.assert_close(stats["advantage_clipped_ratio"].bool(), gap.abs() > 1.0)
    assert stats["advantage_clipped_ratio"].any() and not stats["advantage_clipped_ratio"].all()


def test_the_mean_of_the_others_is_a_baseline_of_the_extrapolated_divergence_too() -> None:
    language = TinyLanguage.random(6)
    plain, _ = language.token_losses(objective(extrapolation=1.5))

    steadied, _ = language.token_losses(objective(extrapolation=1.5, baseline="leave-one-out"), baselines=0.7)

    torch.testing.assert_close(steadied, plain - 0.7)
    torch.testing.assert_close(expected(language, steadied), expected(language, plain), rtol=1e-12, atol=1e-14)


def test_a_reference_that_did_not_score_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"objective\.reference needs"):
        TinyLanguage.random().token_losses(objective(extrapolation=1.5), reference_logprobs=None)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "and they with it"),
        ({"extrapolation": 1.5, "support": "top-k"}, "at the sampled token alone"),
        ({"extrapolation": 1.5, "baseline": "top-k"}, "at the sampled token alone"),
        ({"extrapolation": 1.5, "forwardKlAboveEntropy": 0.5}, "at the sampled token alone"),
        ({"reference": None, "extrapolation": 1.5}, "and they with it"),
        ({"reference": None, "referenceCoefficient": 0.5}, "and they with it"),
    ],
)
def test_what_a_reference_cannot_do_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        objective(**fields)
