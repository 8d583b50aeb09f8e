"""The share of the student's likeliest tokens that the teacher names, against plain sets."""

import pytest
import torch
import torch.distributed as dist
from megatron_ranks import run_ranks

from distill_workers.megatron import support_overlap as module
from distill_workers.megatron.logprobs import Vocabulary
from distill_workers.megatron.support_overlap import support_overlap

TOKENS, HIDDEN, VOCABULARY, WIDTH = 50, 8, 37, 6


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, and ids of which between none and all are the student's own likeliest."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    ids = (hidden @ head.t() + 3 * torch.randn(TOKENS, VOCABULARY, generator=generator)).topk(WIDTH, -1).indices
    return hidden, head, ids


def expected() -> torch.Tensor:
    hidden, head, ids = problem()
    likeliest = (hidden @ head.t()).topk(WIDTH, -1).indices.tolist()
    shares = [len(set(a) & set(b)) / WIDTH for a, b in zip(likeliest, ids.tolist(), strict=True)]
    assert len(set(shares)) >= 4
    return torch.tensor(shares)


@pytest.mark.parametrize("padding", [0, 3])
def test_it_equals_the_intersection_of_the_two_sets(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, ids = problem()
    padded = torch.cat([head, torch.full((padding, HIDDEN), 50.0)])
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # chunks of 16 tokens

    torch.testing.assert_close(support_overlap(hidden, padded, ids, Vocabulary(0, VOCABULARY, None)), expected())


def test_no_token_has_no_overlap() -> None:
    hidden, head, ids = problem()

    assert support_overlap(hidden[:0], head, ids[:0], Vocabulary(0, VOCABULARY, None)).tolist() == []


def parallel_overlap(first_rows: int) -> torch.Tensor:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    hidden, head, ids = problem()
    rank = dist.get_rank()
    start, end = ((0, first_rows), (first_rows, VOCABULARY))[rank]
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    return support_overlap(hidden, head[start:end], ids, Vocabulary(start, end - start, group))


def test_two_ranks_with_a_part_of_the_vocabulary_each_find_the_same() -> None:
    # The second has fewer rows than the teacher's k.
    for found in run_ranks(2, parallel_overlap, first_rows=VOCABULARY - WIDTH + 2):
        torch.testing.assert_close(found, expected())
