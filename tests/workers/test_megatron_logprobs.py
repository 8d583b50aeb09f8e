"""Chunked, vocabulary-parallel log-probs against log_softmax; micro-batches. No Megatron needed."""

import math
import random
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_ranks import make_samples, run_ranks

from distill_workers.megatron.batch import MICRO_BATCH_TOKENS, collate, cost, micro_batches, share, split
from distill_workers.megatron.logprobs import Vocabulary, token_logprobs

TOKENS, HIDDEN, VOCABULARY, WIDTH = 23, 8, 37, 5


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator)
    head = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator)
    ids = torch.randint(0, VOCABULARY, (TOKENS, WIDTH), generator=generator)
    ids[3] = ids[3, 0]  # one id asked for more than once
    weights = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    return hidden.to(dtype), head.to(dtype), ids, weights.to(dtype)


def reference(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()
    logprobs = (hidden @ head.t()).log_softmax(-1)
    wanted = logprobs.gather(-1, ids)
    gradients = torch.autograd.grad((wanted * weights.double()).sum(), (hidden, head))
    return [wanted.detach(), -(logprobs.exp() * logprobs).sum(-1).detach(), *gradients]


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_equal_log_softmax(chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, ids, weights = problem(dtype)
    hidden.requires_grad_(), head.requires_grad_()
    vocabulary = Vocabulary(start=0, rows=VOCABULARY, group=None)

    logprobs, entropy = token_logprobs(hidden, head, ids, vocabulary, chunk_tokens=chunk)
    gradients = torch.autograd.grad((logprobs * weights).sum(), (hidden, head))

    found = [logprobs.detach(), entropy, *gradients]
    for ours, theirs in zip(found, reference(hidden.detach(), head.detach(), ids, weights), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    hidden, head, ids, weights = problem(torch.float64)
    expected = reference(hidden.clone(), head.clone(), ids, weights)[2]
    hidden.requires_grad_()

    logprobs, _ = token_logprobs(hidden, head, ids, Vocabulary(0, VOCABULARY, None), chunk_tokens=7)
    (logprobs * weights).sum().backward()

    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-12)
    assert head.grad is None


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    hidden, head, ids, weights = problem(torch.bfloat16)

    logprobs, entropy = token_logprobs(hidden, head, ids, Vocabulary(0, VOCABULARY, None), chunk_tokens=7)

    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), reference(hidden, head, ids, weights)[0], rtol=0, atol=0.05)


def test_a_head_with_padding_rows_ignores_them() -> None:
    hidden, head, ids, weights = problem(torch.float64)
    padded = torch.cat([head, torch.full((3, HIDDEN), 50.0, dtype=torch.float64)]).requires_grad_()

    logprobs, _ = token_logprobs(hidden, padded, ids, Vocabulary(0, VOCABULARY, None))
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), padded)

    expected = reference(hidden, head, ids, weights)
    torch.testing.assert_close(logprobs.detach(), expected[0])
    assert gradient[VOCABULARY:].abs().max() == 0


def test_ids_that_the_student_lacks_have_probability_zero_and_no_gradient() -> None:
    """Those of a teacher's padded rows, and -1, which stands for an id that belongs to nobody's support."""
    hidden, head, ids, weights = problem(torch.float64)
    expected = reference(hidden.clone(), head.clone(), ids, weights)
    hidden.requires_grad_(), head.requires_grad_()
    alien = torch.tensor([VOCABULARY, VOCABULARY + 900, -1]).expand(TOKENS, 3)

    logprobs, _ = token_logprobs(hidden, head, torch.cat([ids, alien], -1), Vocabulary(0, VOCABULARY, None))
    more = torch.full((TOKENS, 3), 5.0, dtype=torch.float64)
    gradients = torch.autograd.grad((logprobs * torch.cat([weights, more], -1))[:, :WIDTH].sum(), (hidden, head))

    assert (logprobs[:, WIDTH:] == -math.inf).all()
    torch.testing.assert_close([logprobs[:, :WIDTH].detach(), *gradients], [expected[0], *expected[2:]])
    (of_alien,) = torch.autograd.grad(
        token_logprobs(hidden, head, alien, Vocabulary(0, VOCABULARY, None))[0], hidden, more
    )
    assert of_alien.abs().max() == 0


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden = torch.randn(400, 4, requires_grad=True)
    head = torch.randn(300, 4, requires_grad=True)
    ids = torch.zeros(400, 2, dtype=torch.long)
    with Watch():
        logprobs, _ = token_logprobs(hidden, head, ids, Vocabulary(0, 300, None), chunk_tokens=16)
        logprobs.sum().backward()

    assert largest <= 16 * 300


def parallel_logprobs(chunk: int) -> list[torch.Tensor]:
    """One of two ranks: its half of the padded vocabulary, 19 rows of which the last of rank 1 is padding."""
    dist.init_process_group("gloo")
    hidden, head, ids, weights = problem(torch.float64)
    rank, rows = dist.get_rank(), 19
    padded = torch.cat([head, torch.full((1, HIDDEN), 50.0, dtype=torch.float64)])
    own = padded[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    vocabulary = Vocabulary(rank * rows, min(rows, VOCABULARY - rank * rows), dist.group.WORLD)
    logprobs, entropy = token_logprobs(hidden, own, ids, vocabulary, chunk_tokens=chunk)
    gradients = torch.autograd.grad((logprobs * weights).sum(), (hidden, own))
    alien, _ = token_logprobs(hidden, own, torch.full((TOKENS, 1), VOCABULARY), vocabulary, chunk_tokens=chunk)
    assert (alien == -math.inf).all(), "the padding row of the last rank is no token"
    return [logprobs.detach(), entropy, *gradients]


def test_two_ranks_with_half_the_vocabulary_each_equal_log_softmax() -> None:
    first, second = run_ranks(2, parallel_logprobs, chunk=6)

    expected = reference(*problem(torch.float64))
    for ours in (first, second):
        for i in range(3):
            torch.testing.assert_close(ours[i], expected[i], rtol=1e-12, atol=1e-12)
    head = torch.cat([first[3], second[3]])[:VOCABULARY]
    torch.testing.assert_close(head, expected[3], rtol=1e-12, atol=1e-12)


def test_every_sample_with_a_response_is_computed_once_and_the_ranks_are_balanced() -> None:
    samples = make_samples(50)
    samples[7].response_ids = []

    shares = share(samples, [0, 0, 0], 100)

    assert sorted(i for own in shares for i in own) == [i for i in range(50) if i != 7]
    loads = [cost(samples, own, 100) for own in shares]
    assert max(loads) - min(loads) <= max(s.tokens for s in samples) + MICRO_BATCH_TOKENS


def test_the_next_group_goes_to_the_rank_with_less_to_do() -> None:
    samples = make_samples(1)

    assert share(samples, [2000, 0], 100) == [[], [0]]
    # The long sample to the rank that waits, and so many of the short ones as make both ends meet.
    samples = make_samples(5)
    for sample, tokens in zip(samples, (3000, 100, 100, 100, 100), strict=True):
        sample.prompt_ids, sample.response_ids = [0], [0] * (tokens - 1)
    assert share(samples, [1500, 0], 3000) == [[1, 2, 3, 4], [0]]


def test_the_rank_with_the_most_to_do_has_least_of_all_runs_of_like_lengths() -> None:
    samples = make_samples(9, longest=900)
    order = sorted(range(9), key=lambda i: (-samples[i].tokens, i))

    found = share(samples, [0, 0, 0], 2000)

    def most(first: int, second: int) -> int:
        runs = (order[:first], order[first:second], order[second:])
        return max(cost(samples, run, 2000) for run in runs)

    best = min(most(first, second) for first in range(10) for second in range(first, 10))
    assert max(cost(samples, own, 2000) for own in found) <= best + 1 + best // 50


def test_micro_batches_stay_within_the_budget_padding_included() -> None:
    samples = make_samples(50)
    indices = list(range(50))

    batches = split(samples, indices, 120)

    assert sorted(i for batch in batches for i in batch) == indices
    for batch in batches:
        assert len(batch) * max(samples[i].tokens for i in batch) <= 120


def test_micro_batches_are_the_cheapest_of_all_cuts_of_the_sorted_samples() -> None:
    samples = make_samples(9, longest=900)
    order = sorted(range(9), key=lambda i: (-samples[i].tokens, i))

    def padded_cost(batches: list[list[int]]) -> int:
        return sum(len(b) * samples[b[0]].tokens + MICRO_BATCH_TOKENS for b in batches)

    cuts = [
        [order[a:b] for a, b in pairwise([0, *inner, 9])]
        for count in range(9)
        for inner in combinations(range(1, 9), count)
    ]
    allowed = [cut for cut in cuts if all(len(b) == 1 or len(b) * samples[b[0]].tokens <= 2000 for b in cut)]
    found = split(samples, list(range(9)), 2000)

    assert found in allowed
    assert cost(samples, range(9), 2000) == padded_cost(found) == min(padded_cost(cut) for cut in allowed)
    assert 1 < len(found) < 9


@pytest.mark.parametrize("ranks", [1, 8])
def test_few_positions_are_padding_where_lengths_differ_widely(ranks: int) -> None:
    draw, samples = random.Random(0), make_samples(64)
    for sample in samples:
        # Log-normal, mean 400, coefficient of variation 1.
        tokens = max(1, round(draw.lognormvariate(math.log(400) - math.log(2) / 2, math.sqrt(math.log(2)))))
        sample.prompt_ids, sample.response_ids = [0] * 100, [0] * tokens

    shares = share(samples, [0] * ranks, 16384)
    batches = [batch for own in shares for batch in split(samples, own, 16384)]

    padded = sum(len(b) * samples[b[0]].tokens for b in batches)
    assert 1 - sum(s.tokens for s in samples) / padded < 0.12
    assert len(batches) < 16 + ranks
    costs = [cost(samples, own, 16384) for own in shares]
    assert max(costs) <= 1.1 * sum(costs) / ranks


def test_a_sample_longer_than_the_budget_is_a_micro_batch_of_its_own() -> None:
    samples = make_samples(3)

    assert all(len(batch) == 1 for batch in split(samples, [0, 1, 2], 1))


def test_rows_point_at_the_predictions_of_the_response_tokens() -> None:
    samples = make_samples(4, top_k=3)

    batch = collate(samples, [0, 1, 2, 3], torch.device("cpu"), scored=True)

    flat = batch.input_ids.t().flatten()  # [sequence * samples], as Megatron's hidden states
    assert flat[batch.rows].tolist() == [i for s in samples for i in [s.prompt_ids[-1], *s.response_ids[:-1]]]
    assert batch.targets.tolist() == [i for s in samples for i in s.response_ids]
    assert batch.support_ids.shape == batch.teacher_support_logprobs.shape == (len(batch.targets), 3)
    assert batch.sampled_in_support.tolist() == [t % 2 == 1 for s in samples for t in range(len(s.response_ids))]


def test_a_sample_without_a_prompt_is_refused() -> None:
    samples = make_samples(1)
    samples[0].prompt_ids = []

    with pytest.raises(ValueError, match="at least 1 is needed"):
        next(micro_batches(samples, [0], 100, torch.device("cpu")))


def test_the_gradient_of_a_bfloat16_head_is_summed_up_in_fp32_where_megatron_keeps_one() -> None:
    torch.manual_seed(0)
    hidden, exact = torch.randn(24, 16).bfloat16(), torch.randn(40, 16)
    head = torch.nn.Parameter(exact.bfloat16())
    head.main_grad = torch.zeros(40, 16)  # type: ignore[attr-defined]  # as Megatron's DistributedDataParallel does
    wide = torch.nn.Parameter(head.detach().float())
    for seed in range(4):
        ids = torch.randint(0, 40, (24, 1), generator=torch.Generator().manual_seed(seed))
        vocabulary = Vocabulary(0, 40, None)
        token_logprobs(hidden, head, ids, vocabulary, chunk_tokens=8)[0].sum().backward()
        token_logprobs(hidden.float(), wide, ids, vocabulary, chunk_tokens=8)[0].sum().backward()
    assert head.grad is None, "nothing is added twice"
    assert wide.grad is not None
    error = (head.main_grad - wide.grad).norm() / wide.grad.norm()  # type: ignore[attr-defined]
    assert error < 4e-3, "of the products, whose factors are bfloat16"
    kept = (head.main_grad != head.main_grad.bfloat16()).float().mean()  # type: ignore[attr-defined]
    assert kept > 0.9, "nothing is rounded between the sums"
