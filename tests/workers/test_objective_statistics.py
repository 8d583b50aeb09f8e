"""What is reported of a step: each mean over its own tokens, whatever the step is split into."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_workers.objective.statistics import SCOPES, Scope, means, no_sums, sums


def scopes(supervised: torch.Tensor, measured: torch.Tensor) -> dict[Scope, torch.Tensor]:
    some = measured & ~supervised
    return {
        Scope.ALL: torch.ones_like(supervised),
        Scope.OWN: ~supervised,
        Scope.MEASURED: some,
        Scope.TRANSLATED: some,
    }


def test_a_mean_is_over_the_tokens_that_it_says_something_about() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 100.0])
    supervised, measured = torch.tensor([False, False, False, True]), torch.tensor([True, False, True, True])

    found = means(sums({"loss": values, "reverse_kl": values, "overlap_ratio": values}, scopes(supervised, measured)))

    assert found["loss"] == 107 / 4
    assert found["reverse_kl"] == 7 / 3, "the data set's token says nothing of what the student would draw"
    assert found["overlap_ratio"] == 5 / 2
    assert found.keys() == {"loss", "reverse_kl", "overlap_ratio"}, "what nobody measured is not there"


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_split_of_the_tokens_adds_up_to_the_same(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(sizes)
    stats = {name: torch.randn(tokens, dtype=torch.float64, generator=generator) for name in SCOPES}
    supervised, measured = (torch.rand(tokens, generator=generator) < 0.5 for _ in range(2))
    whole = sums(stats, scopes(supervised, measured))

    total, start = no_sums(torch.device("cpu")), 0
    for size in sizes:
        part = slice(start, start + size)
        total = total + sums({n: v[part] for n, v in stats.items()}, scopes(supervised[part], measured[part]))
        start += size

    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


def test_a_value_that_is_not_counted_may_be_anything() -> None:
    values = torch.tensor([1.0, torch.nan])

    found = means(sums({"reverse_kl": values}, scopes(torch.tensor([False, True]), torch.tensor([True, True]))))

    assert found["reverse_kl"] == 1.0
