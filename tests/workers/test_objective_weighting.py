"""Weights of tokens in the divergence, against plain loops; forward KL where the teacher is unsure."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language import STATES, TOKENS, TOP, VOCABULARY, TinyLanguage

from distill_api.spec.job_spec import Objective
from distill_api.spec.objective import Weighting
from distill_workers.data.sample import Sample
from distill_workers.megatron.batch import collate
from distill_workers.objective.weighting import most_informative, outcome_weight, prefix_agreement

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=5)


def objective(**fields: Any) -> Objective:
    return Objective.model_validate({"advantageClip": 1000.0, **fields})


def values_of(lengths: list[int], seed: int) -> torch.Tensor:
    return torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 100))
def test_agreement_falls_with_the_divergence_before_a_token_as_in_a_plain_loop(lengths: list[int], seed: int) -> None:
    gaps = values_of(lengths, seed)

    found = prefix_agreement(gaps, torch.tensor(lengths))

    expected = []
    for response in gaps.split(lengths):
        total = sum(abs(d) for d in response.tolist())
        expected += [1 - sum(abs(d) for d in response.tolist()[:t]) / total for t in range(len(response))]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_response_that_agrees_everywhere_keeps_its_whole_weight() -> None:
    assert prefix_agreement(torch.zeros(5), torch.tensor([3, 2])).tolist() == [1.0] * 5


@settings(max_examples=40)
@given(LENGTHS, st.floats(0.05, 1), st.integers(0, 100))
def test_the_tokens_with_the_highest_soft_or_of_each_response_are_kept(
    lengths: list[int], share: float, seed: int
) -> None:
    entropy, divergence = values_of(lengths, seed).abs(), values_of(lengths, seed + 1).abs()

    kept = most_informative(entropy, divergence, torch.tensor(lengths), share)

    for h, d, mine in zip(entropy.split(lengths), divergence.split(lengths), kept.split(lengths), strict=True):
        scores = [a + b - a * b for a, b in zip((h / h.max()).tolist(), (d / d.max()).tolist(), strict=True)]
        wanted = sorted(range(len(scores)), key=lambda t: -scores[t])[: math.ceil(share * len(scores))]
        assert mine.nonzero()[:, 0].tolist() == sorted(wanted)


def test_an_unsure_token_and_one_that_is_sure_and_wrong_are_kept_before_one_that_is_sure_and_right() -> None:
    entropy, divergence = torch.tensor([2.0, 0.0, 0.0, 0.1]), torch.tensor([0.0, 3.0, 0.0, 0.1])

    assert most_informative(entropy, divergence, torch.tensor([4]), 0.5).tolist() == [True, True, False, False]
    assert most_informative(torch.zeros(3), torch.zeros(3), torch.tensor([3]), 0.1).tolist() == [True, False, False]


@pytest.mark.parametrize("support", ["sampled-token", "top-k"])
def test_a_weight_is_a_factor_of_each_tokens_divergence_and_not_of_its_reward(support: str) -> None:
    language = TinyLanguage.random(1)
    rewarded = {"advantages": torch.full((len(language.responses) * TOKENS,), 0.7, dtype=torch.float64)}
    reward = {"support": support, "reward": {"source": "exact-match"}}
    plain, stats = language.token_losses(objective(**reward))
    with_reward, _ = language.token_losses(objective(**reward), **rewarded)

    weighted, found = language.token_losses(objective(**reward, weighting={"prefix": 0.5}), **rewarded)

    agreement = prefix_agreement(stats["reverse_kl"], torch.full((len(language.responses),), TOKENS))
    torch.testing.assert_close(found["divergence_weight"], 1 + 0.5 * agreement)
    torch.testing.assert_close(weighted, (1 + 0.5 * agreement) * plain + (with_reward - plain))
    assert stats["divergence_weight"].eq(1).all() and stats["selected_ratio"].eq(1).all()


def test_what_is_not_selected_has_no_gradient_of_the_divergence() -> None:
    language = TinyLanguage.random(2)
    entropy = torch.arange(len(language.responses) * TOKENS, dtype=torch.float64)  # the second of each response
    everything, _ = language.token_losses(objective(support="top-k"))

    loss, stats = language.token_losses(objective(support="top-k", weighting={"share": 0.4}), entropy=entropy)

    kept = stats["selected_ratio"].bool()
    assert kept.view(-1, TOKENS).sum(-1).eq(1).all()
    torch.testing.assert_close(loss[kept], everything[kept])
    assert loss[~kept].eq(0).all()
    with pytest.raises(ValueError, match="share needs the entropy"):
        language.token_losses(objective(support="top-k", weighting={"share": 0.4}), entropy=None)


@pytest.mark.parametrize(("reward", "weight"), [(1.0, 0.25), (2.0, 0.25), (0.99, 3.0), (-1.0, 3.0), (None, 1.0)])
def test_the_outcome_of_a_response_is_a_factor_of_its_divergence(reward: float | None, weight: float) -> None:
    assert outcome_weight(Weighting(correct=0.25, wrong=3.0), reward) == weight


def test_what_a_sample_brings_stands_at_each_of_its_tokens() -> None:
    samples = [
        Sample(0, 0, [5], [6, 7], [-1.0, -1.0], [0, 0], False, [-1.0, -2.0], coefficient=0.5, baseline=0.25),
        Sample(0, 1, [5], [6], [-1.0], [0], False, [-1.0], coefficient=2.0, baseline=-1.0),
    ]
    samples[0].reference_logprobs, samples[1].reference_logprobs = [-3.0, -4.0], [-5.0]
    batch = collate(samples, [0, 1], torch.device("cpu"), scored=True)

    assert batch.teacher_coefficients.tolist() == [0.5, 0.5, 2.0]
    assert batch.baselines.tolist() == [0.25, 0.25, -1.0]
    assert batch.reference_logprobs.tolist() == [-3.0, -4.0, -5.0]
    samples[0].reference_logprobs = [-3.0]
    with pytest.raises(ValueError, match="'reference_logprobs': 1"):
        collate(samples, [0, 1], torch.device("cpu"), scored=True)


def entropies(language: TinyLanguage) -> list[float]:
    """The teacher's over its likeliest tokens and a bucket for the rest, of each state."""
    found = []
    for row in language.teacher.exp().tolist():
        best = sorted(row)[-TOP:]
        found.append(-sum(p * math.log(p) for p in [*best, 1 - sum(best)]))
    return found


def forward_kl(language: TinyLanguage, state: int, sampled: int) -> torch.Tensor:
    """Over the teacher's likeliest tokens, the sampled one and the rest, from probabilities."""
    p, q = language.teacher[state].exp(), language.student[state].exp()
    members = sorted({*p.topk(TOP).indices.tolist(), sampled})
    p, q = (torch.cat([x[members], 1 - x[members].sum(0, keepdim=True)]) for x in (p, q))
    if len(members) == VOCABULARY:
        p, q = p[:-1], q[:-1]
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("support", ["sampled-token", "top-k"])
def test_forward_kl_is_added_in_the_states_in_which_the_teacher_is_unsure_and_nowhere_else(support: str) -> None:
    language = TinyLanguage.random(3, sharpness=2.0)
    of_states = entropies(language)
    threshold = sorted(of_states)[2] + 1e-6
    plain, _ = language.token_losses(objective(support=support, coefficient=2.0))

    loss, stats = language.token_losses(objective(support=support, coefficient=2.0, forwardKlAboveEntropy=threshold))

    places = [(STATES.index(response[:t]), response[t]) for response in language.responses for t in range(TOKENS)]
    added = [
        2 * forward_kl(language, state, token) if of_states[state] > threshold else torch.zeros((), dtype=torch.float64)
        for state, token in places
    ]
    torch.testing.assert_close(loss - plain, torch.stack(added), rtol=1e-5, atol=1e-6)
    weights = language.probabilities.detach().repeat_interleave(TOKENS)
    torch.testing.assert_close(
        language.gradient((weights * (loss - plain)).sum()),
        language.gradient((weights * torch.stack(added)).sum()),
        rtol=1e-5,
        atol=1e-6,
    )
    assert stats["uncertain_ratio"].tolist() == [float(of_states[state] > threshold) for state, _ in places]
    torch.testing.assert_close(
        stats["teacher_entropy"], torch.tensor([of_states[state] for state, _ in places], dtype=torch.float64)
    )


def test_the_gate_depends_on_the_state_and_not_on_the_token_that_was_sampled() -> None:
    """If it did, more forward KL would be added where the student happened to leave the teacher's top-k."""
    _, stats = TinyLanguage.random(4).token_losses(objective(forwardKlAboveEntropy=0.5))

    assert stats["teacher_entropy"].view(-1, TOKENS)[:, 0].unique().numel() == 1


def test_what_is_said_to_be_clipped_is_the_sampled_term_alone() -> None:
    clipped = {
        threshold: TinyLanguage.random(4).token_losses(
            Objective.model_validate({"advantageClip": 1.0, "forwardKlAboveEntropy": threshold})
        )[1]["advantage_clipped_ratio"]
        for threshold in (0.0, 20.0)
    }
    assert clipped[0.0].tolist() == clipped[20.0].tolist()
    assert 0 < clipped[0.0].mean() < 1


@pytest.mark.parametrize(
    "fields",
    [
        {"support": "top-k", "weighting": {"share": 0.5, "prefix": 1.0}},
        {"baseline": "top-k", "forwardKlAboveEntropy": 0.5, "discount": 0.5, "discountedReturn": "sum"},
        {"reference": "base", "extrapolation": 1.5, "referenceCoefficient": 0.1, "discount": 0.5},
    ],
)
def test_a_micro_batch_of_no_token_adds_nothing(fields: dict[str, Any]) -> None:
    """As a rank has it that has fewer micro-batches than the others."""
    language, none = TinyLanguage.random(), torch.zeros(0, dtype=torch.float64)
    whole = {"lengths": none.long(), "supervised": none.bool(), "sampled_in_support": none.bool()}
    rows = {name: none.view(0, TOP) for name in ("support_logprobs", "teacher_support_logprobs")}
    tokens = ["logprobs", "old_logprobs", "engine_logprobs", "teacher_logprobs", "advantages", "entropy", "baselines"]
    tokens += ["reference_logprobs"] if "reference" in fields else []

    loss, stats = language.token_losses(objective(**fields), **whole, **rows, **dict.fromkeys(tokens, none))

    assert loss.shape == (0,) and all(value.shape == (0,) for value in stats.values())
