"""Divergences over the whole vocabulary from hidden states and output heads, without [tokens, vocabulary] in memory.

For a teacher whose hidden states are at hand. Those of a teacher that is served are not, so training does not use this:
it is what divergence.py measures beside TRL's, made of the parts of which training makes its log-probs.

The logits of a few hundred tokens are made in one buffer for each model; there, a few rows at a time that stay in the
processor's cache, they become log-probs, the divergence, and in place the gradient of the student's logits, which the
same pass multiplies into the gradients of hidden states and head. That is the least work there is, four products with a
head (two of them for the gradients): nothing is kept and nothing is made again in the backward pass. In exchange the
weight of each token in the loss must be known in the forward pass.
"""

from typing import Any

import torch

from distill_api.spec.job_spec import Divergence
from distill_workers.megatron.logits import add_outer, block_rows, logits, slices

CHUNK_TOKENS = 256
"""Rows of a buffer of logits: fewer take less memory, but read and write the gradient of the head more often."""


def vocabulary_divergence(
    divergence: Divergence,
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    jsd_beta: float = 0.5,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over tokens of weight times divergence, a scalar with gradient in `hidden` and `head`, and the divergence
    of each token [tokens], nats, without.

    hidden [tokens, hidden], head [vocabulary, hidden]: the student's. teacher_hidden [tokens, other],
    teacher_head [vocabulary, other]. token_weights [tokens]: 1 / tokens for a mean, 0 for padding. Reverse KL is
    KL(student || teacher); JSD as divergences.jensen_shannon, GKD (arXiv 2306.13649, eq. 1). Computed in fp32, or the
    type of `hidden` if that is wider. One backward pass only. Raises ValueError for shapes that do not fit.
    """
    tokens, vocabulary = len(hidden), len(head)
    if (len(teacher_hidden), len(teacher_head), token_weights.shape) != (tokens, vocabulary, (tokens,)):
        raise ValueError(
            f"hidden {list(hidden.shape)} and head {list(head.shape)} of the student do not fit to hidden "
            f"{list(teacher_hidden.shape)} and head {list(teacher_head.shape)} of the teacher, with weights "
            f"{list(token_weights.shape)}: all must be of the same tokens, and the heads of the same vocabulary"
        )
    loss, values = _VocabularyDivergence.apply(
        hidden, head, teacher_hidden, teacher_head, token_weights, divergence, jsd_beta, chunk_tokens
    )
    return loss, values


class _VocabularyDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        token_weights: torch.Tensor,
        divergence: Divergence,
        jsd_beta: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens, vocabulary = len(hidden), len(head)
        student_buffer = hidden.new_empty(min(chunk_tokens, tokens), vocabulary, dtype=wide)
        teacher_buffer = torch.empty_like(student_buffer)
        rows_at_once = block_rows(student_buffer)
        scratch = student_buffer.new_empty(3, rows_at_once, vocabulary)
        values = hidden.new_empty(tokens, dtype=wide)
        weights = token_weights.to(wide)
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        of_head = torch.zeros_like(head, dtype=wide) if wanted[1] else None
        for chunk in slices(tokens, chunk_tokens):
            student = logits(hidden[chunk], head, student_buffer)
            teacher = logits(teacher_hidden[chunk], teacher_head, teacher_buffer)
            for block in slices(len(student), rows_at_once):
                at = slice(chunk.start + block.start, chunk.start + block.stop)
                work = scratch[:, : at.stop - at.start]
                values[at] = _divergence_to_gradient(
                    divergence, student[block], teacher[block], weights[at, None], work, jsd_beta
                )
            of_logits = student.to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, head, out=of_hidden[chunk])
            if of_head is not None:
                add_outer(of_head, of_logits, hidden[chunk])
        ctx.gradients = [of_hidden, None if of_head is None else of_head.to(head.dtype)]
        ctx.mark_non_differentiable(values)
        return values @ weights, values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.gradients:
            raise RuntimeError("vocabulary_divergence makes its gradients once: a second backward pass has none")
        # In place, and handed over: a gradient of the head exists once.
        found = [None if g is None else g.mul_(gradients[0]) for g in ctx.gradients]
        ctx.gradients = []
        return (*found, None, None, None, None, None, None)


def _divergence_to_gradient(
    divergence: Divergence,
    student: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    scratch: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """The divergence [rows], and `student`, logits [rows, vocabulary], replaced by weights [rows, 1] times the gradient
    of it. `teacher` and scratch [3, rows, vocabulary] are overwritten."""
    p, q, mixture = scratch
    value: torch.Tensor
    s, t = _normalise(student, p), _normalise(teacher, q)
    match divergence:
        case Divergence.FORWARD_KL:
            # d KL(T || S) / dz = p - q
            value = torch.linalg.vecdot(q, t.sub_(s))
            torch.sub(p, q, out=s).mul_(weights)
        case Divergence.REVERSE_KL:
            # d KL(S || T) / dz = p (log p - log q - KL)
            value = torch.linalg.vecdot(p, s.sub_(t))
            s.sub_(value[:, None]).mul_(p).mul_(weights)
        case Divergence.JSD:
            # log M from M itself: where it underflows both factors are 0.
            tiny = torch.finfo(p.dtype).tiny
            torch.lerp(p, q, beta, out=mixture).clamp_(min=tiny).log_()
            of_teacher = torch.linalg.vecdot(q, t.sub_(mixture))
            # d / dz = (1 - beta) p (log p - log M - KL(S || M)): what passes through M cancels.
            of_student = torch.linalg.vecdot(p, s.sub_(mixture))
            value = beta * of_teacher + (1 - beta) * of_student
            s.sub_(of_student[:, None]).mul_(p).mul_(weights * (1 - beta))
    return value


def _normalise(z: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Logits to log-probs in place, and exp of them into `probabilities`; both [rows, vocabulary]."""
    z -= z.amax(-1, keepdim=True)
    total = torch.exp(z, out=probabilities).sum(-1, keepdim=True)
    probabilities /= total
    z -= total.log()
    return z
