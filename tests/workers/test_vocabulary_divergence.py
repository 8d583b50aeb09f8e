"""Divergences made by chunks, from hidden states and heads, against the textbook in float64."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill_api.spec.job_spec import Divergence
from distill_workers.megatron import logits as module
from distill_workers.objective.divergences import jensen_shannon, kl

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from vocabulary_divergence import vocabulary_divergence

TOKENS, VOCABULARY = 23, 37


def problem(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """hidden, head, teacher_hidden, teacher_head, token_weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, 8), (VOCABULARY, 8), (TOKENS, 12), (VOCABULARY, 12)]
    tensors = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]
    weights = torch.rand(TOKENS, dtype=torch.float64, generator=generator)
    weights[5] = 0
    return [t.to(dtype) for t in (*tensors, weights)]


def reference(divergence: Divergence, beta: float, problem: list[torch.Tensor]) -> list[torch.Tensor]:
    """The loss, the values [tokens], and the gradients of hidden and head."""
    hidden, head, teacher_hidden, teacher_head, weights = (t.double() for t in problem)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    student = (hidden @ head.t()).log_softmax(-1)
    teacher = (teacher_hidden @ teacher_head.t()).log_softmax(-1)
    match divergence:
        case Divergence.REVERSE_KL:
            values = kl(student, teacher)
        case Divergence.FORWARD_KL:
            values = kl(teacher, student)
        case Divergence.JSD:
            values = jensen_shannon(teacher, student, beta)
    loss = values @ weights
    return [loss.detach(), values.detach(), *torch.autograd.grad(3 * loss, (hidden, head))]


def ours(divergence: Divergence, beta: float, problem: list[torch.Tensor], chunk: int) -> list[torch.Tensor]:
    hidden, head = problem[0].clone().requires_grad_(), problem[1].clone().requires_grad_()
    loss, values = vocabulary_divergence(divergence, hidden, head, *problem[2:], jsd_beta=beta, chunk_tokens=chunk)
    assert not values.requires_grad
    return [loss.detach(), values, *torch.autograd.grad(3 * loss, (hidden, head))]


CASES = [(Divergence.REVERSE_KL, 0.5), (Divergence.FORWARD_KL, 0.5), (Divergence.JSD, 0.5), (Divergence.JSD, 0.1)]


@pytest.mark.parametrize("block_bytes", [1, 5 * VOCABULARY * 8, 2**20])
@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_values_and_gradients_equal_the_textbook(
    divergence: Divergence, beta: float, chunk: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", block_bytes)

    found = ours(divergence, beta, problem(), chunk)

    for own, expected in zip(found, reference(divergence, beta, problem()), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_float32_and_bfloat16_are_summed_in_float32(divergence: Divergence, beta: float) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        found = ours(divergence, beta, problem(dtype), 7)

        assert found[0].dtype == torch.float32 and found[3].dtype == dtype
        for own, expected in zip(found, reference(divergence, beta, problem(dtype)), strict=True):
            torch.testing.assert_close(own.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_certain_and_opposed_models_give_finite_numbers(divergence: Divergence, beta: float) -> None:
    certain = torch.eye(4) * 400
    hidden, head = certain.clone().requires_grad_(), torch.eye(4, requires_grad=True)

    loss, values = vocabulary_divergence(
        divergence, hidden, head, certain.flip(0), torch.eye(4), torch.ones(4), jsd_beta=beta
    )
    loss.backward()

    assert values.isfinite().all() and (values > 0).all()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize(("divergence", "beta"), CASES)
def test_equal_models_have_no_divergence_and_no_gradient(divergence: Divergence, beta: float) -> None:
    hidden, head, _, _, weights = problem(torch.float32)
    _, values, of_hidden, of_head = ours(divergence, beta, [hidden, head, hidden, head, weights], 7)

    assert values.abs().max() < 1e-6
    assert of_hidden.abs().max() < 1e-5 and of_head.abs().max() < 1e-5


def test_a_model_that_is_not_trained_costs_no_gradient() -> None:
    hidden, head, *others = problem()
    expected = ours(Divergence.JSD, 0.5, [hidden, head, *others], 7)
    hidden.requires_grad_()

    loss, _ = vocabulary_divergence(Divergence.JSD, hidden, head, *others, chunk_tokens=7)
    (3 * loss).backward()

    torch.testing.assert_close(hidden.grad, expected[2])
    assert head.grad is None


def test_a_second_backward_pass_is_refused() -> None:
    hidden, *others = problem()
    loss, _ = vocabulary_divergence(Divergence.REVERSE_KL, hidden.requires_grad_(), *others)
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="a second backward pass has none"):
        loss.backward()


def test_models_of_different_vocabularies_are_refused() -> None:
    hidden, head, teacher_hidden, teacher_head, weights = problem()

    with pytest.raises(ValueError, match="the heads of the same vocabulary"):
        vocabulary_divergence(Divergence.JSD, hidden, head, teacher_hidden, teacher_head[:-1], weights)


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().size() // tensor.element_size())
            return out

    hidden, head = torch.randn(400, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    with Watch():
        loss, _ = vocabulary_divergence(
            Divergence.JSD, hidden, head, torch.randn(400, 4), torch.randn(300, 4), torch.ones(400), chunk_tokens=8
        )
        loss.backward()

    # The scratch of one block is three times its rows.
    assert largest <= 3 * 8 * 300
