"""The control: whatever the teacher says, the gradient is the same to the last bit, and what it is."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_language import TOKENS, TinyLanguage

from distill_api.spec.job_spec import Objective
from distill_workers.objective.coefficients import StepCoefficients
from distill_workers.objective.control import least_likely
from distill_workers.objective.loss import token_losses

LENGTHS = [7, 1, 12, 5]
TOP = 4

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sampled token": {},
    "top-k": {"support": "top-k", "topK": TOP},
    "forward KL": {"support": "top-k", "topK": TOP, "divergence": "forward-kl", "entryClip": 0.5},
    "baseline of the state": {"baseline": "top-k", "topK": TOP},
    "baseline of the others": {"baseline": "leave-one-out"},
    "return": {"discount": 1, "discountedReturn": "sum"},
    "entropy-aware": {"forwardKlAboveEntropy": 0.1, "topK": TOP},
    "prefix weights": {"weighting": {"prefix": 2}},
    "selection": {"support": "top-k", "topK": TOP, "weighting": {"share": 0.5}},
    "clip": {"advantageClip": 0.01},
    "reference": {"reference": "base", "extrapolation": 1.5, "referenceCoefficient": 0.1},
    "reward": {"reward": {"source": "exact-match"}},
    "spans": {},
}


def objective(fields: dict[str, Any], **more: Any) -> Objective:
    return Objective.model_validate({**fields, **more})


def gradients(spec: Objective, teacher: int, *, spans: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its gradient of the same responses of the same student, scored by the teacher of a seed.

    The student's log-probs at the teacher's top-k depend on which tokens those are, and so on the teacher too.
    """
    tokens = sum(LENGTHS)
    student, of_teacher = (torch.Generator().manual_seed(seed) for seed in (1, 100 + teacher))

    def drawn(generator: torch.Generator, *shape: int) -> torch.Tensor:
        return -4 * torch.rand(*shape, dtype=torch.float64, generator=generator)

    logprobs, engine, reference = (drawn(student, tokens) for _ in range(3))
    advantages = torch.randn(tokens, dtype=torch.float64, generator=student)
    logprobs.requires_grad_()
    given: dict[str, Any] = {
        "teacher_logprobs": drawn(of_teacher, tokens),
        "baselines": drawn(of_teacher, tokens),
        "entropy": -drawn(student, tokens),
    }
    if spec.teacher_top_k is not None:
        ids = torch.stack([torch.randperm(9, generator=of_teacher)[:TOP] for _ in range(tokens)])
        given |= {
            "support_logprobs": logprobs[:, None] - 0.3 * ids - 3,
            "teacher_support_logprobs": drawn(of_teacher, tokens, TOP).log_softmax(-1) - 0.1,
            "sampled_in_support": torch.rand(tokens, generator=of_teacher) < 0.5,
        }
    if spec.reference is not None:
        given["reference_logprobs"] = reference
    if spans:
        ends = torch.rand(tokens, generator=of_teacher) < 0.5
        ends[torch.tensor(LENGTHS).cumsum(0) - 1] = True
        given["span_ends"] = ends
    loss, _ = token_losses(
        spec,
        StepCoefficients(divergence=0.7, reward=2.0),
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        engine_logprobs=engine,
        advantages=advantages,
        lengths=torch.tensor(LENGTHS),
        supervised=torch.zeros(tokens, dtype=torch.bool),
        teacher_coefficients=torch.full((tokens,), 0.5, dtype=torch.float64),
        **given,
    )
    return loss.detach(), torch.autograd.grad(loss.sum(), logprobs)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_teachers_give_the_same_gradient_to_the_last_bit(name: str) -> None:
    fields, spans = OBJECTIVES[name], name == "spans"
    control = objective(fields, control="fixed-advantage")
    found = [gradients(control, teacher, spans=spans) for teacher in range(5)]
    for one, other in pairwise(found):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert found[0][1].abs().max() > 0
    taught = [gradients(objective(fields), teacher, spans=spans)[1] for teacher in (0, 1)]
    assert not torch.allclose(*taught), "the same job without the control is taught by its teacher"


def test_a_teacher_without_a_number_changes_nothing_either() -> None:
    """A teacher that gives a sampled token no probability, or one whose answer is not a number."""
    spec = objective({}, control="fixed-advantage")
    student = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    found = []
    for said in (-1.0, -math.inf, math.nan):
        logprobs = student.clone().requires_grad_()
        loss, _ = token_losses(
            spec,
            StepCoefficients(1.0, 1.0),
            logprobs=logprobs,
            old_logprobs=student,
            engine_logprobs=student,
            teacher_logprobs=torch.full_like(student, said),
            advantages=torch.zeros_like(student),
            lengths=torch.tensor([3]),
            supervised=torch.zeros(3, dtype=torch.bool),
        )
        found.append(torch.autograd.grad(loss.sum(), logprobs)[0].tolist())
    assert found[0] == found[1] == found[2] == [0.0, 0.5, 0.0]


@pytest.mark.parametrize("name", ["sampled token", "top-k"])
def test_the_advantage_is_a_half_below_zero_at_the_fifth_that_is_least_likely(name: str) -> None:
    """Against a plain loop: -w (c_reward A + c_divergence c_teacher (-0.5) 1[...]), w the truncated ratio."""
    _, found = gradients(objective(OBJECTIVES[name], control="fixed-advantage"), 0)
    generator = torch.Generator().manual_seed(1)
    student, engine, _ = (-4 * torch.rand(sum(LENGTHS), dtype=torch.float64, generator=generator) for _ in range(3))
    advantages = torch.randn(sum(LENGTHS), dtype=torch.float64, generator=generator)
    expected, start = [], 0
    for length in LENGTHS:
        places = range(start, start + length)
        chosen = sorted(places, key=lambda place: student[place].item())[: -(-length // 5)]
        for place in places:
            advantage = 2.0 * advantages[place] + 0.7 * 0.5 * (-0.5 if place in chosen else 0.0)
            expected.append(-min(math.exp(student[place] - engine[place]), 2.0) * advantage)
        start += length
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_of_equally_likely_tokens_the_earlier_are_chosen() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -0.5, -9.0])
    assert least_likely(logprobs, torch.tensor([6, 2])).tolist() == [True, True, *[False] * 5, True]


def test_the_expected_gradient_is_that_of_an_enumeration_of_all_responses() -> None:
    """Of each response of two tokens the less likely one is pushed down, by as much as the response is likely."""
    language = TinyLanguage.random(3)
    loss, _ = language.token_losses(objective({}, control="fixed-advantage"))
    probabilities = language.probabilities.detach()
    found = language.gradient((probabilities * loss.view(-1, TOKENS).sum(-1)).sum())

    expected = torch.zeros_like(language.logits)
    student = language.student.detach()
    for response, probability in zip(language.responses, probabilities, strict=True):
        first, second = response
        steps = [(0, first), (1 + first, second)]
        state, token = min(steps, key=lambda step: student[step].item())
        # d log pi(token) / d logits = 1[token] - pi; the loss is 0.5 log pi.
        slope = -student[state].exp()
        slope[token] += 1
        expected[state] += 0.5 * probability * slope
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_is_measured_is_still_the_distance_to_the_teacher() -> None:
    language = TinyLanguage.random(3)
    for fields in ({}, {"support": "top-k", "topK": 2}):
        _, plain = language.token_losses(objective(fields))
        _, control = language.token_losses(objective(fields, control="fixed-advantage"))
        for name in ("reverse_kl", "divergence"):
            torch.testing.assert_close(plain[name], control[name])
        assert control["selected_ratio"].mean().item() == 0.5, "one of two tokens"
