"""Off-policy corrections against plain loops over tokens and responses."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_api.spec.job_spec import Correction, ImportanceWeight
from distill_workers.objective.corrections import correct
from distill_workers.objective.spans import Spans

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def correction(**fields: Any) -> Correction:
    return Correction.model_validate(fields)


def naive(spec: Correction, ratios: list[float]) -> list[float]:
    """The weights of one response."""
    if spec.importance_weight is ImportanceWeight.TRUNCATED:
        weights = [min(max(r, spec.low), spec.high) for r in ratios]
    elif spec.importance_weight is ImportanceWeight.GATED:
        weights = [r if spec.low <= r <= spec.high else 0.0 for r in ratios]
    else:
        weights = [1.0 for _ in ratios]
    mean = math.prod(ratios) ** (1 / len(ratios))
    kept = mean >= spec.sequence_low and (spec.sequence_high is None or mean <= spec.sequence_high)
    return weights if kept else [0.0 for _ in ratios]


@pytest.mark.parametrize("kind", list(ImportanceWeight))
@settings(max_examples=60)
@given(lengths=LENGTHS, seed=st.integers(0, 1000), masks=st.booleans())
def test_weights_equal_a_plain_loop(kind: ImportanceWeight, lengths: list[int], seed: int, masks: bool) -> None:
    spec = correction(
        importanceWeight=kind, low=0.5, high=1.5, **({"sequenceLow": 0.8, "sequenceHigh": 1.2} if masks else {})
    )
    generator = torch.Generator().manual_seed(seed)
    old, engine = (-torch.rand(sum(lengths), dtype=torch.float64, generator=generator) for _ in range(2))

    found = correct(spec, old, engine, torch.tensor(lengths)).values

    ratios = (old - engine).exp()
    expected = [w for part in ratios.split(lengths) for w in naive(spec, part.tolist())]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_what_was_bounded_gated_and_masked_is_told_apart() -> None:
    # ratios: [e^3, 1], [1, e^-1]
    old, engine = torch.tensor([0.0, 0.0, 0.0, -1.0]), torch.tensor([-3.0, 0.0, 0.0, 0.0])
    lengths = torch.tensor([2, 2])

    truncated = correct(correction(high=2.0), old.requires_grad_(), engine, lengths)
    gated = correct(correction(importanceWeight="gated", low=0.5, high=2.0, sequenceHigh=4.0), old, engine, lengths)

    assert truncated.values.tolist() == pytest.approx([2.0, 1.0, 1.0, math.exp(-1)])
    assert not truncated.values.requires_grad
    assert truncated.capped.tolist() == [True, False, False, False]
    assert not truncated.gated.any() and not truncated.masked.any()
    assert gated.values.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert gated.gated.tolist() == [True, False, False, True] and not gated.capped.any()
    assert gated.masked.tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", list(ImportanceWeight))
def test_an_engine_that_agrees_leaves_every_token_its_full_weight(kind: ImportanceWeight) -> None:
    spec = correction(importanceWeight=kind, low=1.0, high=1.0, sequenceLow=1.0, sequenceHigh=1.0)
    old = -torch.rand(6)

    assert correct(spec, old, old, torch.tensor([4, 2])).values.tolist() == [1.0] * 6


def test_truncation_at_infinity_is_exact_importance_sampling() -> None:
    """The mean over draws of the engine of w f is the mean of f under the trainer."""
    trainer, engine = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.4, 0.35, 0.25]).log()
    values = torch.tensor([1.0, -2.0, 5.0])

    weights = correct(correction(high=100), trainer, engine, torch.tensor([3])).values

    assert (engine.exp() * weights * values).sum().item() == pytest.approx((trainer.exp() * values).sum().item())


def test_tokens_have_the_weight_of_their_span_and_a_response_is_masked_by_its_tokens() -> None:
    old, engine, lengths = torch.tensor([2.0, 2.0, 0.5]).log(), torch.zeros(3), torch.tensor([3])
    spans = Spans(torch.tensor([False, True, True]))

    # The mean ratio is 2^(1/3) over tokens, and would be 2 over the products at them.
    truncated = correct(correction(high=3.0, sequenceHigh=1.5), old, engine, lengths, spans)
    gated = correct(correction(importanceWeight="gated", low=0.4, high=3.0), old, engine, lengths, spans)
    whole = correct(correction(high=5.0), old, engine, lengths, spans)

    assert whole.values.tolist() == pytest.approx([4.0, 4.0, 0.5])
    assert truncated.values.tolist() == pytest.approx([3.0, 3.0, 0.5])
    assert truncated.capped.tolist() == [True, True, False] and not truncated.masked.any()
    assert gated.values.tolist() == pytest.approx([0.0, 0.0, 0.5])
    assert gated.gated.tolist() == [True, True, False]
