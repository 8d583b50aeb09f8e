"""Means over ragged responses, against plain loops, and whatever they are split into."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_workers.objective.responses import future_mean, future_sum, response_mean

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def values_of(lengths: list[int], seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_future_mean(values: list[float], discount: float) -> list[float]:
    found = []
    for t in range(len(values)):
        weights = [discount ** (s - t - 1) for s in range(t + 1, len(values))]
        total = sum(w * v for w, v in zip(weights, values[t + 1 :], strict=True))
        found.append(total / sum(weights) if weights else 0.0)
    return found


@settings(max_examples=80)
@given(LENGTHS, st.floats(0.01, 1), st.integers(0, 100))
def test_the_future_mean_equals_a_plain_loop(lengths: list[int], discount: float, seed: int) -> None:
    values = values_of(lengths, seed)

    found = future_mean(values, torch.tensor(lengths), discount)

    expected = [x for part in values.split(lengths) for x in naive_future_mean(part.tolist(), discount)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=40)
@given(LENGTHS, st.floats(0.01, 1), st.integers(0, 100))
def test_the_future_sum_equals_a_plain_loop(lengths: list[int], discount: float, seed: int) -> None:
    values = values_of(lengths, seed)

    found = future_sum(values, torch.tensor(lengths), discount)

    expected = []
    for part in values.split(lengths):
        for t in range(len(part)):
            expected.append(sum(discount ** (s - t - 1) * part[s].item() for s in range(t + 1, len(part))))
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=40)
@given(LENGTHS, st.floats(0.01, 1))
def test_a_response_is_the_same_alone_as_among_others(lengths: list[int], discount: float) -> None:
    values = values_of(lengths)

    together = future_mean(values, torch.tensor(lengths), discount)

    alone = [future_mean(part, torch.tensor([len(part)]), discount) for part in values.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


def test_a_response_of_sixteen_thousand_tokens_neither_underflows_nor_loops() -> None:
    ones = torch.ones(16_384 + 3, dtype=torch.float32)

    for discount in (0.5, 0.999, 1.0):
        found = future_mean(ones, torch.tensor([16_384, 3]), discount)
        torch.testing.assert_close(found, torch.tensor([1.0] * 16_383 + [0.0, 1.0, 1.0, 0.0]))


def test_nothing_has_no_future() -> None:
    assert future_mean(torch.zeros(0), torch.zeros(0, dtype=torch.long), 1.0).tolist() == []


def test_the_mean_of_a_response_stands_at_each_of_its_tokens() -> None:
    found = response_mean(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([2, 0, 1, 1]))

    assert found.tolist() == [2.0, 2.0, 5.0, 7.0]
