"""Sequences split over ranks: attention sees all of them, and no token is predicted twice or left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron_ranks import make_checkpoint, make_samples, make_spec, make_trainer, run_ranks

from distill_workers.megatron.context import own_positions

KINDS = ("qwen3-tied", "llama3-rope")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_ranks_have_every_position_once_and_as_much_to_attend_to(size: int) -> None:
    parts = [own_positions(24, rank, size) for rank in range(size)]

    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    assert len({sum(part.tolist()) for part in parts}) == 1


def sequences() -> list[torch.Tensor]:
    """Queries, keys, values, and the weights of the outputs: [batch, heads, sequence, head]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 16, 8, generator=generator).requires_grad_() for _ in range(4)]


def attention(folder: Path) -> dict[str, Any]:
    """Of a part of random sequences; scores of a student whose sequences are split in two."""
    from distill_workers.megatron.batch import collate
    from distill_workers.megatron.context import causal_attention, gather_sequence, own_tokens
    from distill_workers.megatron.student import MegatronStudent

    found: dict[str, Any] = {}
    spec = make_spec(trainer=make_trainer(context=2, ranks=2, max_tokens=50))
    for kind in KINDS:
        student = MegatronStudent(spec, folder / kind)
        found[kind] = student.logprobs(make_samples(6, longest=60))
    ranks = student.ranks
    own = own_positions(16, ranks.context_rank, 2)
    q, k, v, weights = tensors = sequences()
    keys, values = (gather_sequence(x[:, :, own], ranks.context_group) for x in (k, v))
    out = causal_attention(q[:, :, own], keys, values, ranks.context_group)
    gradients = torch.autograd.grad((out * weights[:, :, own]).sum(), tensors[:3])
    for gradient in gradients:
        dist.all_reduce(gradient)
    found["attention"] = own, out.detach(), gradients

    samples = make_samples(3)
    batch = collate(samples, [0, 1, 2], torch.device("cpu"), scored=True)
    length = -(-batch.input_ids.shape[1] // 4) * 4
    found["predicted"] = own_tokens(batch, length // 2, ranks).among
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("context")
    for kind in KINDS:
        make_checkpoint(folder / kind, kind)
    return folder, run_ranks(2, attention, folder=folder)


def test_attention_and_its_gradient_equal_those_of_whole_sequences(parts: Any) -> None:
    q, k, v, weights = sequences()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradients = torch.autograd.grad((expected * weights).sum(), (q, k, v))

    for rank in parts[1]:
        own, out, found = rank["attention"]
        torch.testing.assert_close(out, expected.detach()[:, :, own])
        torch.testing.assert_close(found, gradients)


def test_every_response_token_is_predicted_by_one_rank(parts: Any) -> None:
    first, second = (rank["predicted"] for rank in parts[1])
    assert (first ^ second).all() and first.any() and second.any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_is_told_the_logprobs_of_transformers(parts: Any, kind: str) -> None:
    from conftest import hf_logprobs
    from transformers import AutoModelForCausalLM

    folder, ranks = parts
    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    for i, sample in enumerate(make_samples(6, longest=60)):
        expected = hf_logprobs(model, sample.prompt_ids, sample.response_ids)
        for rank in ranks:
            assert rank[kind][i] == pytest.approx(expected, abs=1e-5)
