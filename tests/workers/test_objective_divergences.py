"""Divergences over a support and a tail, against naive float64 references."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_api.spec.job_spec import Divergence
from distill_workers.objective.divergences import coarsen, higher_estimates, sampled_reverse_kl, support_divergence

ALL = list(Divergence)
VOCABULARY = 12


def naive_divergence(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Of probabilities [tokens, outcomes], straight from the definitions (GKD, arXiv 2306.13649)."""

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * torch.log(p / q)).sum(-1)

    if divergence is Divergence.REVERSE_KL:
        return kl(student, teacher)
    if divergence is Divergence.FORWARD_KL:
        return kl(teacher, student)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def bucketed(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    inside = probabilities.gather(-1, ids)
    return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1)


def on_support(
    divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, beta: float = 0.5
) -> torch.Tensor:
    """support_divergence of logits [tokens, vocabulary]."""
    s, t = (logits.log_softmax(-1).gather(-1, ids) for logits in (student, teacher))
    return support_divergence(divergence, s, t, jsd_beta=beta)


def random_problem(k: int, seed: int = 0, tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(tokens, VOCABULARY, dtype=torch.float64, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, teacher.topk(k, -1).indices


@pytest.mark.parametrize("clip", [0.05, 0.3, 100.0])
def test_forward_kl_with_clipped_entries_equals_the_naive_reference(clip: float) -> None:
    """OPSD: the term of each outcome is at most `clip`, and one that is clipped has no gradient."""
    logits, teacher, ids = random_problem(4)
    s, t = (x.log_softmax(-1).gather(-1, ids) for x in (logits, teacher))

    value = support_divergence(Divergence.FORWARD_KL, s, t, entry_clip=clip)
    (gradient,) = torch.autograd.grad(value.sum(), logits)

    p, q = bucketed(teacher.softmax(-1), ids), bucketed(logits.softmax(-1), ids)
    terms = p * torch.log(p / q)
    naive = torch.where(terms < clip, terms, clip).sum(-1)
    (right,) = torch.autograd.grad(naive.sum(), logits)
    torch.testing.assert_close(value, naive)
    torch.testing.assert_close(gradient, right)
    assert (terms >= clip).any() == (clip < 1)


def test_entries_are_clipped_in_forward_kl_alone() -> None:
    logits, teacher, ids = random_problem(4)
    s, t = (x.log_softmax(-1).gather(-1, ids) for x in (logits, teacher))
    for divergence in (Divergence.REVERSE_KL, Divergence.JSD):
        plain = support_divergence(divergence, s, t)
        torch.testing.assert_close(support_divergence(divergence, s, t, entry_clip=1e-3), plain)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_value_and_gradient_equal_the_naive_reference(divergence: Divergence, k: int, beta: float) -> None:
    logits, teacher, ids = random_problem(k)
    weights = torch.linspace(0.5, 2, len(logits), dtype=torch.float64)

    value = on_support(divergence, logits, teacher, ids, beta)
    (gradient,) = torch.autograd.grad((value * weights).sum(), logits)

    naive = naive_divergence(divergence, bucketed(logits.softmax(-1), ids), bucketed(teacher.softmax(-1), ids), beta)
    (expected,) = torch.autograd.grad((naive * weights).sum(), logits)
    torch.testing.assert_close(value, naive, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("divergence", ALL)
def test_a_support_of_the_whole_vocabulary_gives_the_full_divergence(divergence: Divergence) -> None:
    logits, teacher, ids = random_problem(VOCABULARY)

    value = on_support(divergence, logits, teacher, ids)
    (gradient,) = torch.autograd.grad(value.sum(), logits)

    full = naive_divergence(divergence, logits.softmax(-1), teacher.softmax(-1), 0.5)
    (expected,) = torch.autograd.grad(full.sum(), logits)
    # The tail keeps its floor of 1e-6 on both sides.
    torch.testing.assert_close(value, full, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", ALL)
@settings(max_examples=150)
@given(
    student=st.lists(st.floats(-60, 60), min_size=6, max_size=6),
    teacher=st.lists(st.floats(-60, 60), min_size=6, max_size=6),
    k=st.integers(1, 6),
    single=st.booleans(),
)
def test_it_is_never_negative_and_its_gradient_is_finite_and_bounded(
    divergence: Divergence, student: list[float], teacher: list[float], k: int, single: bool
) -> None:
    dtype = torch.float32 if single else torch.float64
    logits = torch.tensor([student], dtype=dtype, requires_grad=True)
    scores = torch.tensor([teacher], dtype=dtype)
    ids = scores.topk(k, -1).indices

    value = on_support(divergence, logits, scores, ids)
    (gradient,) = torch.autograd.grad(value.sum(), logits)

    assert value.item() >= -1e-12
    assert torch.isfinite(gradient).all()
    # |d KL(p||q) / d logits| <= p (|log p/q| + KL): no log-prob here is below -121.
    assert gradient.abs().max() <= 2 * 121


@pytest.mark.parametrize("divergence", ALL)
def test_it_is_zero_with_zero_gradient_where_both_agree(divergence: Divergence) -> None:
    logits, _, ids = random_problem(4)

    value = on_support(divergence, logits, logits.detach(), ids)
    (gradient,) = torch.autograd.grad(value.sum(), logits)

    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("divergence", ALL)
def test_coarsening_never_adds_divergence(divergence: Divergence) -> None:
    logits, teacher, _ = random_problem(1)
    values = [on_support(divergence, logits, teacher, teacher.topk(k, -1).indices) for k in (1, 3, 6, 11)]

    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-9).all()


def test_an_absent_column_changes_nothing() -> None:
    logits, teacher, ids = random_problem(4)
    student_support, teacher_support = (x.log_softmax(-1).gather(-1, ids) for x in (logits, teacher))
    twice = [torch.cat([x, x[:, :1]], -1) for x in (student_support, teacher_support)]
    present = torch.ones(len(logits), 5, dtype=torch.bool)
    present[:, 4] = False

    with_duplicate = support_divergence(Divergence.REVERSE_KL, twice[0], twice[1], present=present)
    without = support_divergence(Divergence.REVERSE_KL, student_support, teacher_support)

    torch.testing.assert_close(with_duplicate, without, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (with_duplicate, without)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


MASSES = (0.9, 0.1, 1e-3, 1e-5, 2e-6, 1e-6, 5e-7, 1e-9, 1e-12)
"""Of the tail, on both sides of its floor."""


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tail_of_any_mass_makes_no_larger_gradient_than_the_full_divergence(
    divergence: Divergence, dtype: torch.dtype
) -> None:
    """d log(1 - mass) / d mass is 1e6 at the floor: what it is multiplied with must take that back."""
    generator, k = torch.Generator().manual_seed(0), 16
    pairs = torch.tensor(list(itertools.product(MASSES, MASSES)), dtype=torch.float64)

    def with_tail(mass: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(len(mass), 200, dtype=torch.float64, generator=generator)
        inside, outside = (part.log_softmax(-1) for part in noise.split([k, 200 - k], -1))
        return torch.cat([inside + torch.log1p(-mass)[:, None], outside + mass.log()[:, None]], -1)

    logits, teacher = with_tail(pairs[:, 0]), with_tail(pairs[:, 1])
    ids = torch.arange(k).expand(len(pairs), k)
    exact, coarse = logits.clone().requires_grad_(), logits.to(dtype).requires_grad_()

    full = naive_divergence(divergence, exact.softmax(-1), teacher.exp(), 0.5)
    value = on_support(divergence, coarse, teacher.to(dtype), ids)
    (of_full,) = torch.autograd.grad(full.sum(), exact)
    (of_value,) = torch.autograd.grad(value.sum(), coarse)

    assert (value >= 0).all()
    assert (value <= full + 1e-5).all(), "never more than the divergence that it stands for"
    assert (of_value.norm(dim=-1) <= 1.1 * of_full.norm(dim=-1) + 0.01).all()


def test_buckets_are_a_distribution_even_when_rounding_made_the_mass_exceed_one() -> None:
    logprobs = torch.tensor([[math.log(0.7), math.log(0.3000005)], [0.0, -200.0]])

    buckets = coarsen(logprobs)

    torch.testing.assert_close(buckets.exp().sum(-1), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.isfinite(buckets).all()


def test_the_mean_of_the_sampled_term_is_the_reverse_kl() -> None:
    student, teacher = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.2, 0.7]).log()

    expected = (student.exp() * sampled_reverse_kl(student, teacher)).sum()

    assert expected.item() == pytest.approx((student.exp() * (student - teacher)).sum().item())


def test_the_higher_estimates_follow_their_formulas_and_are_never_negative() -> None:
    k1 = torch.arange(-8.0, 8.5, 0.5, dtype=torch.float64)

    k2, k3 = higher_estimates(k1)

    torch.testing.assert_close(k2, k1**2 / 2)
    torch.testing.assert_close(k3, (-k1).exp() - 1 + k1)
    assert (k2 >= 0).all() and (k3 >= 0).all()
    assert k2[16] == k3[16] == 0, "and 0 where both agree"


def test_the_mean_of_k3_is_the_reverse_kl() -> None:
    student, teacher = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.2, 0.7]).log()

    _, k3 = higher_estimates(student - teacher)

    expected = (student.exp() * (student - teacher)).sum()
    assert (student.exp() * k3).sum().item() == pytest.approx(expected.item())


def test_one_impossible_token_does_not_drown_the_report() -> None:
    _, k3 = higher_estimates(torch.tensor([-200.0]))

    assert k3.item() == pytest.approx(math.exp(20) - 21, rel=1e-6)


@pytest.mark.parametrize("divergence", ALL)
def test_an_id_that_the_student_lacks_leaves_the_divergence_and_its_gradient_as_they_are(
    divergence: Divergence,
) -> None:
    """Qwen2.5-7B has 152,064 rows and Qwen2.5-0.5B 151,936: what the teacher gives to a row beyond is in its tail."""
    logits, teacher, ids = random_problem(4)
    s, t = (x.log_softmax(-1).gather(-1, ids) for x in (logits, teacher))
    beyond = torch.full((len(s), 1), -math.inf, dtype=s.dtype)
    seen = t - 0.1  # the teacher's mass, of which a part is on the row beyond
    with_it = support_divergence(
        divergence, torch.cat([s, beyond], -1), torch.cat([seen, torch.full_like(beyond, -3.0)], -1)
    )
    without = support_divergence(divergence, s, seen)

    torch.testing.assert_close(with_it, without)
    gradients = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (with_it, without)]
    torch.testing.assert_close(*gradients)
